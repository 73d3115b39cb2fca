"""Fields of the methods that can tell an image's task by class statistics (`pools.prototypes`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cl_prompts.methods.shared.field_checks import choice, positive_number
from cl_prompts.methods.shared.prefix_config import PrefixPromptConfig


@dataclass
class TaskInferenceConfig(PrefixPromptConfig):
    """Base of prefix methods that can infer the task from un-prompted features, at test. Both fields are ours.

    Args:
        task_statistics: an image belongs to the task of the class that its un-prompted feature fits best, by "mean"
            (largest cosine with the class mean) or by "covariance" (smallest Mahalanobis distance from the class mean,
            under one covariance for all classes; it adds 8 * width^2 bytes to the adapter: 4.7 MB for ViT-B).
        covariance_shrinkage: r in (0, 1] of (1 - r) S + r * trace(S) / width * I; 1 compares Euclidean distances. None: OAS
            (Chen et al., IEEE TSP 2010), from the statistics themselves.
    """

    task_statistics: str = "mean"
    covariance_shrinkage: float | None = None

    # The field, and its value, by which a method infers tasks from class statistics; None: it always does.
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
        """Whether the task of an image is inferred from class statistics."""
        return self.infers_task_by is None or getattr(self, self.infers_task_by[0]) == self.infers_task_by[1]
