"""One adapter: a pool, its head, and the classes they know. The tuner keeps several by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cl_prompts.heads import AlignedClassifier, build_classifier
from cl_prompts.heads.incremental import GrowingHead
from cl_prompts.interfaces import IGNORE_INDEX, BackboneShape
from cl_prompts.learner.features import Recorded
from cl_prompts.learner.optimizer_hook import ImageLedger, OptimizerLink
from cl_prompts.methods import METHODS, PromptPool, PromptPoolConfig


class PoolAdapter(nn.Module):
    """Pool and head of one adapter, grown to the tasks in `config.state`.

    Args:
        config: the method's config; its `state` is kept up to date.
        shape: sizes of the backbone.
        pooling: the resolved feature of the un-prompted pass.
    """

    unknown_labels: Tensor

    def __init__(self, config: PromptPoolConfig, shape: BackboneShape, pooling: str) -> None:
        super().__init__()
        self.config = config
        self.query_pooling = pooling
        self.readout = pooling if config.readout == "auto" else config.readout
        self.pool: PromptPool = METHODS[config.method].pool_class(config, shape)
        width = shape.width * (2 if self.readout == "cls_mean" else 1)
        self.head = GrowingHead(width, config.scale)
        self.classifier = build_classifier(config, width)
        self.recorded: Recorded | None = None  # the coming task's images, seen before it
        self.link = OptimizerLink()
        self.ledger = ImageLedger()
        self.grown = False  # since the last training forward
        # Labels of undeclared classes seen on a device or in a compiled graph, where a step must not look at them.
        self.register_buffer("unknown_labels", torch.zeros((), dtype=torch.int64), persistent=False)
        if config.num_labels is not None:
            self._declare(range(config.num_labels))
        if config.state.tasks:
            self._rebuild(config.state.tasks)

    def materialised(self) -> PoolAdapter:
        """Give every tensor on the meta device zeros to hold what a file will fill in."""
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    module._parameters[name] = nn.Parameter(torch.zeros_like(parameter, device="cpu"))
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.zeros_like(buffer, device="cpu")
        return self

    @property
    def classes(self) -> list[int]:
        """Known class ids, in the order of the head's columns."""
        if self.config.num_labels is not None:
            return list(range(self.config.num_labels))
        return self.config.state.classes

    @property
    def frozen(self) -> bool:
        """Whether the pool is done learning (`trained_tasks="first"`)."""
        return self.config.trained_tasks == "first" and len(self.config.state.tasks) > 1

    def requires_grad_(self, requires_grad: bool = True) -> PoolAdapter:
        """Switch gradients on or off; a frozen pool stays without."""
        super().requires_grad_(requires_grad)
        if self.frozen:
            self.pool.requires_grad_(False)
        return self

    def check_pool_learns(self) -> None:
        """Raise ValueError if the pool must not change any more."""
        if self.frozen:
            raise ValueError('trained_tasks="first": prompts are frozen after the first task, statistics rely on them')

    def _declare(self, known: Sequence[int], task: Sequence[int] | None = None) -> None:
        self.head.declare(known, task if task is not None else known)
        column_of = {c: column for column, c in enumerate(known)}
        columns = [column_of[c] for c in (task if task is not None else known)]
        # Prompts that are frozen after the first task have no part in later ones.
        if task is not None and (self.config.trained_tasks == "all" or not self.pool.num_tasks):
            self.pool.begin_task(columns)
        if self.classifier is not None:
            self.classifier.begin_task(columns)

    def _rebuild(self, tasks: Sequence[Sequence[int]]) -> None:
        """Make room for what these tasks left, whose values come from a file."""
        known = self.config.state.classes
        column_of = {c: column for column, c in enumerate(known)}
        columns = [[column_of[c] for c in task] for task in tasks]
        self.head.declare(known, tasks[-1])
        self.pool.rebuild(columns if self.config.trained_tasks == "all" else columns[:1])
        if self.classifier is not None:
            self.classifier.rebuild(columns)

    def begin_task(self, classes: Sequence[int], revisit: bool, class_names: dict[int, str] | None) -> None:
        """Grow for a task; see `PromptPoolTuner.begin_task`."""
        state = self.config.state
        if self.config.num_labels is not None:
            raise ValueError(f"num_labels={self.config.num_labels} makes this adapter task-free: leave begin_task out")
        declared = state.check_task(classes, revisit)
        if self.classifier is not None:
            self.classifier.check_statistics()  # before anything has grown
        names = {str(int(c)): str(name) for c, name in (class_names or {}).items()}
        self._declare(list(dict.fromkeys(self.classes + declared)), declared)
        state.tasks.append(declared)
        state.task_open = True
        state.class_names.update(names)
        if self.frozen:
            self.pool.requires_grad_(False)
        self.ledger.clear()
        self.grown = True
        self.link.detach()

    def end_task(self) -> None:
        """Close the task; see `PromptPoolTuner.end_task`."""
        if not self.config.state.task_open:
            raise ValueError("no task is open: call begin_task(classes) first")
        if self.classifier is not None and int(self.classifier.fitted) < self.classifier.num_tasks:
            raise ValueError("the classifier has not seen this task: call model.consolidate(images) before end_task()")
        if not self.frozen:
            self.pool.end_task()
        self.config.state.task_open = False
        self.link.detach()

    def classify(self, features: Tensor) -> Tensor:
        """What answers: logits [B, C] of features [B, D]."""
        if self.classifier is None or not self.config.closed_form:
            return self.head(features)
        return self.classifier(features)

    def consolidate(self, seen: Recorded) -> None:
        """Show the classifier a task whose training is done.

        Raises:
            ValueError: the features before the task are missing or of other images, or these are of no class of the task.
        """
        assert self.classifier is not None
        self.classifier.check_turn()
        before = None
        if self.classifier.needs_before and int(self.classifier.fitted):
            if self.recorded is None:
                raise ValueError(
                    "drift compensation needs the task's images as they were seen before the task: call "
                    'model.record_features(images) before begin_task, or set drift_compensation="none"'
                )
            before = self.recorded.features_of(seen)
        columns, _ = self.head.to_columns(seen.labels)
        outside = ~self.head.current[columns.clamp_min(0)] | (columns < 0)
        if outside.any():
            raise ValueError(
                f"labels {seen.labels[outside].unique().tolist()} do not belong to the current task: show the classifier "
                "the task's images only"
            )
        self.classifier.fit(seen.features, columns, before, self.head)
        self.recorded = None
        if isinstance(self.classifier, AlignedClassifier):
            self.classifier.hand_over(self.head)

    def group_of(self, name: str) -> str:
        """The parameter group of one of the adapter's parameters."""
        return "head" if name.startswith("head.") else self.pool.roles[name.removeprefix("pool.")]

    def to_columns(self, labels: Tensor) -> Tensor:
        """Head columns of class ids [B]; -100 stays.

        Raises:
            ValueError: a label on the CPU is of no declared class, or in training of none of the current task.
        """
        columns, unknown = self.head.to_columns(labels)
        masked = self.training and self.config.class_mask == "task"
        outside = (columns >= 0) & ~self.head.current[columns.clamp_min(0)] & masked
        if torch.compiler.is_compiling() or labels.device.type != "cpu":
            # Ignored until check_labels reports them: a label whose logit is masked would make the loss infinite.
            self.unknown_labels += (unknown | outside).sum()
            return torch.where(outside, IGNORE_INDEX, columns)
        if unknown.any():
            self._raise_unknown(sorted(set(labels[unknown].tolist())))
        if outside.any():
            raise ValueError(
                f"labels {sorted(set(labels[outside].tolist()))} do not belong to the current task "
                f'{self.config.state.tasks[-1]}: declare them in begin_task, or set class_mask to "none"'
            )
        return columns

    def check_labels(self) -> None:
        """Raise ValueError if labels of undeclared classes were seen on a device since the last call."""
        count = int(self.unknown_labels)
        self.unknown_labels.zero_()
        if count:
            raise ValueError(
                f"{count} labels are of no declared class, or in training of none of the current task, and were ignored; "
                f"declared are {self.classes}: see begin_task"
            )

    def _raise_unknown(self, what: Any) -> None:
        raise ValueError(f"labels {what} are of no declared class; declared are {self.classes}: see begin_task")


class PromptPoolLayer(nn.Module, BaseTunerLayer):
    """The tuner layer PEFT looks for: all adapters by name. Nothing in the base is replaced."""

    adapter_layer_names = ("prompt_pool",)
    other_param_names = ()
    # BaseTunerLayer's, named here because PEFT carries no types
    set_adapter: Any
    set_requires_grad: Any
    delete_adapter: Any

    def __init__(self) -> None:
        super().__init__()
        self.prompt_pool = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    @property
    def merged(self) -> bool:
        """Prompts cannot be merged into weights."""
        return False

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        """PEFT calls it when it has switched gradients on."""
        adapters: Any = self.prompt_pool.values()
        for adapter in adapters:
            if adapter.frozen:
                adapter.pool.requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """The tuner places adapters; PEFT's way needs a base layer."""
