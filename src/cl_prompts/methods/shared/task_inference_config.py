"""Config fields of methods that can infer the task of an image from class statistics (`ClassPrototypes`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cl_prompts.methods.shared.field_checks import choice, positive_number
from cl_prompts.methods.shared.prefix_config import PrefixPromptConfig


@dataclass
class TaskInferenceConfig(PrefixPromptConfig):
    """Base of prefix methods that can infer an image's task at test, from its un-prompted feature. The fields are ours.

    Args:
        task_statistics: how the best class, and with it the task, of a feature is found: "mean" (largest cosine with the
            class mean) or "covariance" (smallest Mahalanobis distance from the class mean, with one covariance for all
            classes; adds 8 * width^2 bytes to the adapter, 4.7 MB for ViT-B).
        covariance_shrinkage: r in (0, 1] of (1 - r) S + r * trace(S) / width * I; with 1, distances are Euclidean. None:
            OAS (Chen et al., IEEE TSP 2010), from the statistics themselves.
    """

    task_statistics: str = "mean"
    covariance_shrinkage: float | None = None

    # Field and value with which a method infers tasks from class statistics; None: it always does.
    infers_task_by: ClassVar[tuple[str, str] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "task_statistics", ("mean", "covariance"))
        if self.task_statistics != "mean" and self.infers_task_by and not self.infers_task:
            field, value = self.infers_task_by
            raise ValueError(
                f'task_statistics={self.task_statistics!r} is for {field}={value!r}: set that, or leave it at "mean"'
            )
        if self.covariance_shrinkage is None:
            return
        positive_number(self, "covariance_shrinkage")
        if self.covariance_shrinkage > 1:
            raise ValueError(f"covariance_shrinkage={self.covariance_shrinkage} must lie in (0, 1]: 1 leaves the identity")
        if self.task_statistics != "covariance":
            raise ValueError(
                f'covariance_shrinkage={self.covariance_shrinkage} is for task_statistics="covariance": set that, or leave '
                "it at None"
            )

    @property
    def infers_task(self) -> bool:
        """Whether tasks are inferred from class statistics."""
        return self.infers_task_by is None or getattr(self, self.infers_task_by[0]) == self.infers_task_by[1]
