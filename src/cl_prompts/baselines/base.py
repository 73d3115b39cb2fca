"""What all baselines share: tasks, the forward with its loss, state and files. Its calls are those of `PromptPoolModel`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cl_prompts.backbones.feature_extractor import FeatureExtractor
from cl_prompts.backbones.input_checks import check_arguments, check_images, check_query, further_inputs
from cl_prompts.baselines.batch import Batch, cross_entropy
from cl_prompts.baselines.measures import BaselineMeasures
from cl_prompts.baselines.state import BaselineState
from cl_prompts.baselines.steps import StepHooks
from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.interfaces import LossPart
from cl_prompts.learner.checks import check_labels, check_wrapper
from cl_prompts.learner.empty_tensors import give_empty_tensors_storage
from cl_prompts.learner.losses import add_up
from cl_prompts.learner.optimizer_hook import UpdateScaler
from cl_prompts.learner.protocol import Images, Replay
from cl_prompts.learner.task_state import TaskState
from cl_prompts.outputs import PromptPoolOutput
from cl_prompts.runtime.distributed import world_size
from cl_prompts.storage.adapter_state import AdapterState, check_base_arguments


class Baseline(BaselineMeasures, BaselineState):
    """A backbone and a linear head that learn task after task; subclasses say how they avoid forgetting.

    Args:
        backbone: any supported Hugging Face vision transformer; trained in place.
        freeze_backbone: train the head only. Features may then be computed once and passed as `query`.
        pooling: the feature that the head reads: "auto", "cls", "mean", "cls_mean" or "pooler".
        class_mask: classes of the cross entropy: "task", "none" (all known); None: "none" with stored images, or "task".
        num_labels: of a stream without tasks: ids 0 to num_labels - 1 are known from the start.
        base_arguments: further arguments of every forward of the backbone, like {"interpolate_pos_encoding": True}.

    Attributes:
        name: of the baseline in `BASELINES`.
        replay, needs_memory, needs_consolidation, needs_task, calibrates, num_lower_blocks, default_rates: see `Learner`.
        learns_without_tasks: whether it can learn a stream without tasks.
        options, features, head: its settings by name, backbone and classifier.

    Raises:
        TypeError: the backbone is not supported.
        ValueError: a setting is out of range, or does not fit the baseline.
    """

    name: ClassVar[str]
    replay: ClassVar[Replay] = "none"
    needs_memory: ClassVar[bool] = False
    needs_consolidation: ClassVar[bool] = False
    needs_task: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False
    num_lower_blocks: ClassVar[int] = 0
    default_rates: ClassVar[Mapping[str, float]] = {"base": 1e-4}  # 0.005, the prompts' rate, destroys pretrained weights
    needs_features_before: ClassVar[bool] = False
    closed_form: ClassVar[bool] = False
    learns_without_tasks: ClassVar[bool] = False

    def __init__(
        self,
        backbone: nn.Module,
        *,
        freeze_backbone: bool = False,
        pooling: str = "auto",
        class_mask: str | None = None,
        num_labels: int | None = None,
        base_arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
            raise ValueError(f"num_labels={num_labels!r} must be a positive number of classes")
        if num_labels is not None and not self.learns_without_tasks:
            raise ValueError(f"num_labels={num_labels}: {self.name!r} must know when a task ends: use a stream with tasks")
        mask = class_mask or ("task" if self.replay == "none" else "none")
        if mask not in ("task", "none") or (mask == "task" and self.replay != "none"):
            raise ValueError(f'class_mask={class_mask!r}: choose "none", or "task" for a learner that does not rehearse')
        self.class_mask = mask
        self.options: dict[str, Any] = {"freeze_backbone": freeze_backbone, "pooling": pooling}
        check_base_arguments("base_arguments", base_arguments or {})
        self.options |= {"num_labels": num_labels, "class_mask": mask, "base_arguments": base_arguments}
        give_empty_tensors_storage(self)
        self.tasks = TaskState(AdapterState(), num_labels)  # the first module: it checks a state dict before all others
        self.features = FeatureExtractor(backbone, pooling, frozen=freeze_backbone, arguments=base_arguments)
        self.tasks.state.base_fingerprint = self.features.fingerprint
        self.head = IncrementalHead(self.features.width)
        self.update_scaler, self.step_hooks = UpdateScaler(), StepHooks()
        self.grown = False  # since the last training forward
        if num_labels is not None:
            self.head.expand(self.classes, self.classes)

    def number(self, name: str, value: float) -> float:
        """Note the `value` of setting `name` among the options.

        Raises:
            ValueError: it is no non-negative number.
        """
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value!r} must be a non-negative number")
        self.options[name] = value
        return value

    # ---- what subclasses override ------------------------------------------------------------------------------------

    def before_task(self, classes: Sequence[int]) -> None:
        """Called before the head grows for a task of the class ids `classes`."""

    def teacher_logits(self, pixel_values: Tensor, features: Tensor, **kwargs: Any) -> Tensor | None:
        """Logits of an earlier model on training images `pixel_values` [B, earlier classes]; None without one.

        `features` are the learner's own of the same images [B, D], `kwargs` further inputs of the backbone.
        """
        return None

    def loss_parts(self, batch: Batch) -> dict[str, LossPart]:
        """The terms of the training loss of a `batch`, by name."""
        return {"cross_entropy": self.cross_entropy(batch)}

    def predict(self, features: Tensor, logits: Tensor) -> Tensor:
        """Logits at test [B, C] from `features` [B, D] and the head's `logits` [B, C]."""
        return logits

    def answer(
        self, pixel_values: Tensor, features: Tensor, logits: Tensor, *, task: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Logits at test [B, C], here those of `predict`.

        Args:
            pixel_values: images [B, 3, H, W].
            features: the learner's of them [B, D].
            logits: the head's of these [B, C].
            task: number of the images' task where it is known; here not used.
            kwargs: further inputs of the backbone.
        """
        with torch.autocast(features.device.type, enabled=False):
            return self.predict(features, logits)

    def update_factors(self) -> dict[str, Tensor]:
        """Factors in [0, 1] by which optimizer steps on parameters are multiplied, by name; 0 freezes exactly."""
        return {}

    def before_step(self) -> None:
        """Called before each step of the attached optimizer, without gradient."""

    def after_step(self) -> None:
        """Called after each step of the attached optimizer, without gradient."""

    def groups(self) -> dict[str, list[nn.Module]]:
        """Modules of each optimizer group, by its name."""
        return {"base": [self.features], "head": [self.head]}

    def consolidate(self, images: Images, memory: Images | None = None) -> None:
        """See the task's `images` and the stored ones, `memory`, after training, in eval mode and before `end_task`."""

    def trains_task(self, number: int) -> bool:
        """Whether task `number` is trained by gradient."""
        return True

    def rank_images(self, rows: Sequence[int] | NDArray[np.int64], images: Images) -> NDArray[np.float64] | None:
        """Ranks [n] of the `images` with numbers `rows` [n]: the smallest are kept longest. None: no preference."""
        return None

    def check_one_class(self) -> None:
        """Check that a task of one class can be learned.

        Raises:
            ValueError: the cross entropy would see that class only.
        """
        if self.class_mask == "task":
            mend = 'set it to "none", or use "ncm" or a baseline with a memory, like "er"'
            raise ValueError(f'{self.name!r} learns nothing from a task of one class with class_mask="task": {mend}')

    # ---- tasks -------------------------------------------------------------------------------------------------------

    @property
    def classes(self) -> list[int]:
        """Known class ids, in the order of the logits."""
        return self.tasks.classes

    @property
    def num_tasks(self) -> int:
        """Number of tasks that have begun; 0 without tasks."""
        return len(self.tasks.state.tasks)

    def begin_task(
        self, classes: Sequence[int], *, revisit: bool = False, class_names: Mapping[int, str] | None = None
    ) -> None:
        """Open the next task; `classes`, `revisit`, `class_names`: `TaskAPI.begin_task`. Errors: `check_one_class`, too."""
        task = self.tasks.plan_task(classes, revisit, class_names)
        if len(task.classes) == 1:
            self.check_one_class()
        self.before_task(task.classes)
        self.head.expand(task.known, task.classes)
        self.tasks.begin(task)
        self.grown = True
        self.detach_optimizer()

    def name_classes(self, class_names: Mapping[int, str]) -> None:
        """Name classes of a learner without tasks: `class_names` by class id."""
        for class_id, name in class_names.items():
            self.tasks.rename(class_id, name)

    def end_task(self) -> None:
        """Close the current task. Errors as `TaskAPI.end_task`."""
        self.check_finite()
        self.tasks.end()
        self.detach_optimizer()

    def record_features(self, images: Images) -> None:
        """See the next task's `images` before `begin_task`: nothing to do, no baseline compensates drift."""

    def gather_statistics(self) -> None:
        """Sum over processes what each has counted in the current task: nothing, baselines sum at its end."""

    def check_labels(self) -> None:
        """Raise ValueError if wrong labels were seen on a device since the last call."""
        self.tasks.check_labels()

    # ---- training ----------------------------------------------------------------------------------------------------

    def parameter_groups(self, learning_rate: float, **learning_rates: float) -> list[dict[str, Any]]:
        """Optimizer groups by the names of `groups`; `learning_rates` gives one of them another rate than `learning_rate`.

        Raises:
            ValueError: `learning_rates` names no group.
        """
        parts = self.groups()
        unknown = sorted(set(learning_rates) - set(parts))
        if unknown:
            raise ValueError(f"no parameter group is called {unknown}: there are {' and '.join(parts)}")
        groups = {name: [p for m in part for p in m.parameters() if p.requires_grad] for name, part in parts.items()}
        rates = dict.fromkeys(parts, learning_rate) | learning_rates
        return [{"name": name, "params": params, "lr": rates[name]} for name, params in groups.items() if params]

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Announce the `optimizer` that trains the task, after every `begin_task`.

        Raises:
            ValueError: it lacks a trainable parameter.
        """
        self.update_scaler.attach(optimizer, self, self.update_factors(), {})
        self.update_scaler.check_trains(self.named_parameters())
        self.step_hooks.attach(optimizer, self.before_step, self.after_step)

    def detach_optimizer(self) -> None:
        """Take the hooks off the attached optimizer."""
        self.update_scaler.detach()
        self.step_hooks.detach()

    def train(self, mode: bool = True) -> Baseline:
        """Training (`mode`) or eval mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.features.frozen:
            self.features.eval()
        return self

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        *,
        query: Tensor | None = None,
        sample_ids: Sequence[int] | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        task: int | None = None,
        **kwargs: Any,
    ) -> PromptPoolOutput:
        """Logits over the known classes, and with labels the loss; arguments as `PromptPoolModel.forward`.

        Args:
            pixel_values: images [B, 3, H, W].
            labels: class ids [B]; -100 marks padding that counts nowhere.
            query: features of a frozen backbone [B, D], if the caller has them.
            sample_ids: a number per image [B], the same in every epoch.
            num_items_in_batch: number of images of the whole accumulated batch, a scalar.
            task: at test, number of the images' task, for learners that need it (`needs_task`).
            kwargs: go to the backbone.

        Raises:
            ValueError: wrong images, labels of undeclared classes, no class known yet.
        """
        if not self.classes:
            raise ValueError("no class is known yet: call begin_task(classes), or set num_labels")
        check_arguments(self.features.base, kwargs)
        check_images(self.features.base, self.features.structure, pixel_values, self.features.arguments | kwargs)
        learning = self.training and torch.is_grad_enabled()
        check_labels(labels, len(pixel_values), num_items_in_batch, learning=learning)
        only_current = learning and self.class_mask == "task"
        targets = None if labels is None else self.tasks.targets(labels, self.head, only_current=only_current)
        if learning and labels is not None:
            self._check_ready()
        features = self.compute_features(pixel_values, query, **kwargs)
        taught = self.teacher_logits(pixel_values, features, **kwargs) if learning and targets is not None else None
        logits = self.logits_of(features)
        answer = self.masked(logits) if learning else self.answer(pixel_values, features, logits, task=task, **kwargs)
        if targets is None:
            return PromptPoolOutput(logits=answer, features=features)
        with torch.autocast(features.device.type, enabled=False):
            valid = targets >= 0
            batch = Batch(features, logits, targets, valid, sample_ids, taught, pixel_values, kwargs)
            parts = self.loss_parts(batch) if learning else {"cross_entropy": cross_entropy(answer, targets)}
            loss, losses = add_up(parts, valid, num_items_in_batch, over_processes=learning)
        return PromptPoolOutput(loss=loss, logits=answer, losses=losses, features=features)

    def _check_ready(self) -> None:
        self.tasks.check_training()
        self.update_scaler.check_trains(self.named_parameters())
        if self.grown and world_size() > 1:
            check_wrapper(self)
            self.grown = False

    def cross_entropy(self, batch: Batch) -> LossPart:
        """Cross entropy of a training `batch` over the classes that `class_mask` leaves."""
        return cross_entropy(self.masked(batch.logits), batch.targets)

    def masked(self, logits: Tensor) -> Tensor:
        """The `logits` [B, C] with -inf at the classes that the cross entropy does not see."""
        return logits.masked_fill(~self.head.current, float("-inf")) if self.class_mask == "task" else logits

    def compute_features(self, pixel_values: Tensor, query: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Features [B, D] of images; without gradient where the backbone is frozen.

        Args:
            pixel_values: images [B, 3, H, W].
            query: their features [B, D] if the caller has them and the backbone is frozen.
            kwargs: further inputs of the backbone.

        Raises:
            ValueError: `query` is given, and the backbone is trained.
        """
        if not self.features.frozen:
            if query is not None:
                raise ValueError("query holds features of a frozen backbone, and this one is trained: leave it out")
            return self.features(pixel_values, **kwargs)
        if query is not None:
            check_query(query, len(pixel_values), self.features.width)
            return query.detach().float()
        with torch.no_grad():
            return self.features(pixel_values, **kwargs)

    def refuse_checkpointing(self) -> None:
        """Check that blocks are not recomputed in the backward pass, where what this learner does to them is not in force.

        Raises:
            ValueError: gradient checkpointing is on in training.
        """
        if self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.features.base.modules()):
            raise ValueError(
                f"{self.name!r} changes what blocks compute, and gradient checkpointing would recompute them unchanged: "
                "call gradient_checkpointing_disable() of the base"
            )

    def features_of(self, batch: Mapping[str, Any]) -> Tensor:
        """Features [B, D] of a `batch` with `pixel_values`, further inputs of the backbone and, if known, `query`."""
        further = further_inputs(self.features.base, batch)
        return self.compute_features(batch["pixel_values"], batch.get("query"), **further)

    def logits_of(self, features: Tensor) -> Tensor:
        """The head's logits [B, C] of `features` [B, D], in float32 also under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features)

    # ---- backbone ----------------------------------------------------------------------------------------------------

    @property
    def needs_query(self) -> bool:
        """Whether features that were computed once can be used: the backbone is frozen."""
        return self.features.frozen

    @property
    def query_pooling(self) -> str:
        """Which feature the head reads: "cls", "mean", "cls_mean" or "pooler"."""
        return self.features.pooling

    def get_base_model(self) -> nn.Module:
        """The backbone."""
        return self.features.base

    def extract_lower_blocks(self, pixel_values: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """The features [B, D] of `extract_features`, and None: a baseline has no prompts, and no blocks below them.

        Args:
            pixel_values: images [B, 3, H, W].
            kwargs: further inputs of the base.
        """
        return self.extract_features(pixel_values, **kwargs), None

    @torch.no_grad()
    def extract_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Features [B, D] float32 of `pixel_values` [B, 3, H, W], without gradient; `kwargs` are for the base."""
        return self.features(pixel_values, **kwargs)
