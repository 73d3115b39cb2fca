"""What a trainer asks of an answer, for learners without prompts and class statistics."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from cl_prompts.heads.novelty import energy
from cl_prompts.outputs import PromptPoolOutput


class BaselineMeasures:
    """Measures that all baselines share.

    Attributes:
        novelty_threshold, drift_explained: see `Learner`; a baseline has none.
    """

    novelty_threshold: ClassVar[float | None] = None
    drift_explained: ClassVar[float | None] = None

    def chosen_tasks(self, output: PromptPoolOutput) -> Tensor | None:
        """The task whose prompts answered for each image of an `output` [B]: None, there are no prompts."""
        return None

    def novelty(self, output: PromptPoolOutput) -> Tensor:
        """The energy of the logits of an `output`: [B]."""
        assert output.logits is not None
        return energy(output.logits, 1.0)
