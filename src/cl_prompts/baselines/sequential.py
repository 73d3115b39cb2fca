"""Sequential fine-tuning: what happens when nothing is done against forgetting."""

from __future__ import annotations

from typing import Any

from torch import nn

from cl_prompts.baselines.base import Baseline


class SequentialFineTuning(Baseline):
    """Backbone and head are trained on one task after the other (McCloskey & Cohen, 1989, describe what that forgets)."""

    name = "finetune"
    learns_without_tasks = True


class FrozenBackbone(Baseline):
    """Only the head is trained, on one task after the other (the sequential linear probe).

    Args:
        backbone: see `Baseline`.
        freeze_backbone: must be True.
        options: see `Baseline`.
    """

    name = "frozen"
    learns_without_tasks = True

    def __init__(self, backbone: nn.Module, *, freeze_backbone: bool = True, **options: Any) -> None:
        if not freeze_backbone:
            raise ValueError(f'freeze_backbone={freeze_backbone!r}: with a trained backbone this learner is "finetune"')
        super().__init__(backbone, freeze_backbone=True, **options)
