"""Learning without forgetting."""

from __future__ import annotations

from typing import Any

from torch import nn

from cl_prompts.baselines.batch import Batch
from cl_prompts.baselines.teacher import DistillingBaseline, distillation
from cl_prompts.interfaces import LossPart


class LwF(DistillingBaseline):
    """On new images, the earlier model's answers for the earlier classes are part of what is learnt.

    Li & Hoiem, "Learning without Forgetting", ECCV 2016, section 3: strength times the distillation loss joins the
    cross entropy over the new classes. The paper distils each task's head by itself, and warms the new head up first; here
    all earlier classes are one softmax (as for class-incremental learning in the iCaRL paper), and there is no warm-up.

    Args:
        backbone: see `Baseline`.
        strength: lambda_o, 1 in the paper.
        temperature: 2 in the paper.
        options: see `Baseline`.
    """

    name = "lwf"

    def __init__(self, backbone: nn.Module, *, strength: float = 1.0, temperature: float = 2.0, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.strength = self.number("strength", strength)
        self.temperature = self.number("temperature", temperature)
        if temperature == 0:
            raise ValueError("temperature=0 would divide by zero: choose a positive number")

    def loss_parts(self, batch: Batch) -> dict[str, LossPart]:
        """Cross entropy and, from the second task on, distillation."""
        parts = super().loss_parts(batch)
        if batch.teacher_logits is not None:
            parts["distillation"] = distillation(batch.teacher_logits, batch.logits, self.temperature, self.strength)
        return parts
