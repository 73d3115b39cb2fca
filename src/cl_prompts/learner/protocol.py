"""What a trainer may ask of a learner: the members that prompt learners and baselines have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.outputs import PromptPoolOutput


# Batches of one pass over images, on the learner's device: `pixel_values` [B, 3, H, W], `labels` [B], `sample_ids` (a
# number per image) and, if known, `query` [B, D]. A learner may iterate several times.
Images = Iterable[Mapping[str, Any]]

Replay = Literal["mixed", "memory_only", "none"]


class Learner(Protocol):
    """A model that learns classes task after task, not wrapped.

    `PromptPoolModel`, its tuner and every `Baseline` are learners. One task is: `record_features` where the learner wants
    it, `begin_task`, a new optimizer from `parameter_groups`, `attach_optimizer`, training, `consolidate` where the learner
    wants it, `end_task`.
    """

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    def classes(self) -> list[int]:
        """Class ids as they stand in `labels`, in the order of the logits."""
        ...

    @property
    def num_tasks(self) -> int:
        """Number of tasks that have begun; 0 without tasks."""
        ...

    @property
    def class_mask(self) -> str:
        """Which logits the training loss sees: "task" (those of the current task), "batch" or "none" (all)."""
        ...

    @property
    def closed_form(self) -> bool:
        """Whether the learner cannot answer before its first task is consolidated."""
        ...

    @property
    def head(self) -> IncrementalHead:
        """The trained classifier."""
        ...

    @property
    def needs_query(self) -> bool:
        """Whether the forward uses the un-prompted feature, so that `query=` spares a pass."""
        ...

    @property
    def query_pooling(self) -> str:
        """Which un-prompted feature is taken: "cls", "mean", "cls_mean" or "pooler"."""
        ...

    @property
    def replay(self) -> Replay:
        """How it trains on stored images: mixed into each batch, on these only, or not at all."""
        ...

    @property
    def needs_memory(self) -> bool:
        """Whether it cannot learn without stored images."""
        ...

    @property
    def needs_features_before(self) -> bool:
        """Whether `consolidate` needs `record_features` before `begin_task`, from the second task on."""
        ...

    @property
    def needs_consolidation(self) -> bool:
        """Whether `consolidate` is to be called when a task has been trained."""
        ...

    @property
    def needs_task(self) -> bool:
        """Whether its answers are to be read over the classes of the image's task, which the user must know.

        `evaluate` then passes `task`, the number of the images' task, to the forward.
        """
        ...

    @property
    def calibrates(self) -> bool:
        """Whether `consolidate` chooses the temperature of the scores, also where it is not needed."""
        ...

    @property
    def num_lower_blocks(self) -> int:
        """Number of blocks below the lowest prompt, whose output depends on the image only."""
        ...

    @property
    def default_rates(self) -> Mapping[str, float]:
        """Learning rates of parameter groups, by name, that a trainer uses unless it is told others."""
        ...

    training: bool

    # ---- tasks -------------------------------------------------------------------------------------------------------

    def begin_task(
        self, classes: Sequence[int], *, revisit: bool = False, class_names: Mapping[int, str] | None = None
    ) -> None:
        """Open the next task, whose class ids are `classes`; known ones only with `revisit`."""
        ...

    def name_classes(self, class_names: Mapping[int, str]) -> None:
        """Name classes, by id, of a learner without tasks."""
        ...

    def end_task(self) -> None:
        """Close the current task."""
        ...

    def parameter_groups(self, learning_rate: float, **learning_rates: float) -> list[dict[str, Any]]:
        """Optimizer groups with `name`, `params` and `lr`; `learning_rates` are those of single groups."""
        ...

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Announce the optimizer that trains the task, after every `begin_task`."""
        ...

    def gather_statistics(self) -> None:
        """Sum over processes what each has counted in the current task; all processes call it."""
        ...

    def check_labels(self) -> None:
        """Raise ValueError if labels seen on a device since the last call could not be learned."""
        ...

    def check_one_class(self) -> None:
        """Raise ValueError if it cannot learn a task of one class."""
        ...

    def check_finite(self) -> None:
        """Raise FloatingPointError if anything that training has changed holds NaN or Inf."""
        ...

    def trains_task(self, number: int) -> bool:
        """Whether task `number` is trained by gradient."""
        ...

    # ---- passes over images outside training, in eval mode -----------------------------------------------------------

    def record_features(self, images: Images) -> None:
        """See the next task's images before `begin_task`."""
        ...

    def consolidate(self, images: Images, memory: Images | None = None) -> None:
        """See the task's images, and the stored ones, when it has been trained and before `end_task`."""
        ...

    def rank_images(self, rows: Sequence[int] | NDArray[np.int64], images: Images) -> NDArray[np.float64] | None:
        """Which images of the task rehearsal should keep.

        Args:
            rows: numbers of the images [n].
            images: this process's share of them.

        Returns:
            ranks [n], within each class: the smallest are kept longest. None: the learner has no preference.
        """
        ...

    def features_of(self, batch: Mapping[str, Any]) -> Tensor:
        """What the classifier reads of a batch of `Images`: [B, D] float32."""
        ...

    def novelty(self, output: PromptPoolOutput) -> Tensor:
        """How unlike the known classes the images of an answer in eval mode are: [B] float32; high: unknown."""
        ...

    @property
    def novelty_threshold(self) -> float | None:
        """Novelty beyond which an image is of none of the known classes; None where it is unknown."""
        ...

    @property
    def drift_explained(self) -> float | None:
        """R^2 of the newest drift map on held-out images of the newest task; None without one."""
        ...

    def chosen_tasks(self, output: PromptPoolOutput) -> Tensor | None:
        """Tasks whose prompts gave an answer in eval mode: [B] or [B, layers]; None where none is chosen."""
        ...

    def extract_lower_blocks(self, pixel_values: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The features of `extract_features`, and what the forward takes as `lower_blocks`, or None; both without gradient.

        Args:
            pixel_values: images [B, 3, H, W].
            kwargs: further inputs of the base.
        """
        ...

    def extract_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Un-prompted features of images [B, 3, H, W]: [B, D] float32, without gradient."""
        ...

    def get_base_model(self) -> nn.Module:
        """The backbone."""
        ...

    # ---- identity and state ------------------------------------------------------------------------------------------

    def cache_key(self) -> dict[str, Any]:
        """What `extract_features` depends on: equal keys mean equal features.

        Raises:
            cl_prompts.interfaces.NotCacheableError: this cannot be told.
        """
        ...

    def fingerprint(self) -> str:
        """Sha256 of what defines the learner before it has learned: settings and backbone."""
        ...

    def training_state_dict(self) -> dict[str, Any]:
        """All that training has changed, also within a task: {"tensors": by name, "values": JSON-able}."""
        ...

    def load_training_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `training_state_dict` of a learner with the same settings on the same backbone.

        Parameters are replaced: build a new optimizer and attach it.

        Raises:
            ValueError: the state is of other settings or another backbone.
        """
        ...

    # ---- as torch.nn.Module ------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward; arguments as `PromptPoolModel.forward`, returns `PromptPoolOutput`."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters with their names."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Switch to training mode, or with False to eval mode."""
        ...

    def eval(self) -> Any:
        """Switch to eval mode."""
        ...

    def to(self, device: torch.device) -> Any:
        """Move to a device."""
        ...
