"""One adapter: a pool, its classifier, and the tasks they have learned. The tuner keeps several by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cl_prompts.heads import FeatureClassifier, RetrainedHead, build_classifier
from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.heads.running_gaussians import RunningGaussians
from cl_prompts.interfaces import BackboneShape
from cl_prompts.learner.empty_tensors import give_empty_tensors_storage
from cl_prompts.learner.features import Recorded
from cl_prompts.learner.optimizer_hook import UpdateScaler
from cl_prompts.learner.sample_counter import SampleCounter, checked_ids
from cl_prompts.learner.task_state import TaskState
from cl_prompts.methods import METHODS, PromptPool, PromptPoolConfig
from cl_prompts.runtime.precision import without_autocast
from cl_prompts.runtime.text import short_repr
from cl_prompts.storage.integrity import SAVED_PREFIX
from cl_prompts.tuner.calibration import Calibration


class PoolAdapter(nn.Module):
    """Pool and classifier of one adapter, with tensors for all tasks in `config.state`.

    Args:
        config: the method's config; its `state` is updated with every task.
        shape: sizes of the backbone.
        pooling: feature of the un-prompted pass: "cls", "mean", "cls_mean" or "pooler".

    Attributes:
        tasks: tasks and classes.
        calibration: what divides the logits at test.
        pool: the method's prompts.
        head: the trained classifier.
        running_gaussians: of the trained head's features, for tasks of one class; None with a closed-form head.
        classifier: a classifier computed from features, which replaces the head at test or aligns it; None without one.
        update_scaler: hooks on the optimizer.
        sample_counter: images that the pool's statistics have counted in this task.
        recorded: features of the next task's images, computed before that task, for drift compensation; or None.
        grown: whether parameters were added since the last training forward.
    """

    def __init__(self, config: PromptPoolConfig, shape: BackboneShape, pooling: str) -> None:
        super().__init__()
        self.config = config
        give_empty_tensors_storage(self)
        self.query_pooling = pooling
        self.readout = pooling if config.readout == "auto" else config.readout
        # The first module: it checks the classes of a state dict before others load.
        self.tasks = TaskState(config.state, config.num_labels)
        self.calibration = Calibration(config, self.tasks)
        self.pool: PromptPool = METHODS[config.method].pool_class(config, shape)
        width = shape.width * (2 if self.readout == "cls_mean" else 1)
        self.head = IncrementalHead(width, config.scale, layer_norm=config.trained_head == "layer_norm")
        self.running_gaussians = None if config.closed_form else RunningGaussians(width, save=_saves_gaussians(config))
        self.classifier = build_classifier(config, width)
        self.recorded: Recorded | None = None
        self.update_scaler = UpdateScaler()
        self.sample_counter = SampleCounter()
        self.grown = False
        if config.num_labels is not None:
            self.head.expand(self.classes, self.classes)
            if self.running_gaussians is not None:
                self.running_gaussians.expand(config.num_labels, range(config.num_labels))
            if self.classifier is not None:
                self.classifier.begin_task(range(config.num_labels))
        if config.state.tasks:
            self._rebuild()

    def materialized(self) -> PoolAdapter:
        """Replace every meta tensor by zeros on the CPU, to be overwritten from a file. Returns the adapter."""
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    module._parameters[name] = nn.Parameter(torch.zeros_like(parameter, device="cpu"))
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.zeros_like(buffer, device="cpu")
        return self

    @property
    def base_arguments(self) -> dict[str, Any]:
        """Further arguments of every forward of the base: those of the config, and those of training."""
        return {**(self.config.base_arguments or {}), **self.config.state.base_arguments}

    @property
    def classes(self) -> list[int]:
        """Known class ids, in the order of the logits."""
        return self.tasks.classes

    def calibrated(self, logits: Tensor, features: Tensor) -> Tensor:
        """Logits at test [B, C] from those of `classify` for `features` [B, D]."""
        by_image = self.config.state.image_scale and self.classifier is not None
        return self.calibration.calibrated(logits, self.classifier.scale(features) if by_image else None)  # type: ignore[union-attr]

    def first_seen(self, sample_ids: Any, valid: Tensor) -> Tensor:
        """Which `valid` images [B] are new in this task: bool [B]; all, if the pool does not count images."""
        if self.pool.counts_images:
            return self.sample_counter.first_seen(sample_ids, valid)
        checked_ids(sample_ids, valid)  # a mistake is told by every method
        return valid

    @property
    def frozen(self) -> bool:
        """Whether the pool is no longer trained (`trained_tasks="first"`, after the first task)."""
        return self.config.trained_tasks == "first" and len(self.config.state.tasks) > 1

    def requires_grad_(self, requires_grad: bool = True) -> PoolAdapter:
        """Set `requires_grad` of all parameters; a frozen pool's stay False."""
        super().requires_grad_(requires_grad)
        if self.frozen:
            self.pool.requires_grad_(False)
        return self

    @property
    def awaits_consolidation(self) -> bool:
        """Whether a closed-form classifier has not seen the open task yet."""
        found = self.classifier if self.config.closed_form else None
        return found is not None and int(found.fitted) < found.num_tasks

    @property
    def collects(self) -> bool:
        """Whether the pool has statistics of a task's images to collect at its end."""
        return self.pool.collects and self.config.num_labels is None and self.config.trained_tasks == "all"

    def check_pool_learns(self) -> None:
        """Raise ValueError if the pool is frozen."""
        if self.frozen:
            raise ValueError('trained_tasks="first": prompts are frozen after the first task and cannot be changed')

    def _rebuild(self) -> None:
        """Create the tensors of the tasks in `config.state`. Their values are then read from a file."""
        class_indices = self.tasks.class_indices(self.config.state.tasks)
        self.head.expand(self.classes, self.tasks.current_classes)
        if self.running_gaussians is not None:
            self.running_gaussians.expand(len(self.classes), class_indices[-1])
        self.pool.rebuild(class_indices if self.config.trained_tasks == "all" else class_indices[:1])
        if self.classifier is not None:
            self.classifier.rebuild(class_indices)

    @without_autocast()
    def begin_task(
        self, classes: Sequence[int], *, revisit: bool = False, class_names: Mapping[int, str] | None = None
    ) -> None:
        """Begin the next task; see `TaskAPI.begin_task`."""
        task = self.tasks.plan_task(classes, revisit, class_names)
        self.pool.check_statistics()
        if self.classifier is not None:
            self.classifier.check_statistics()
            self._check_room(self.classifier, len(task.classes))
            self._check_recorded(self.classifier)
        if 1 in (len(task.classes), len(self.classes)):
            self.check_one_class()
        # All checks passed; from here on the state changes.
        self.head.expand(task.known, task.classes)
        self.tasks.begin(task)
        self.calibration.update(self.tasks)
        (class_indices,) = self.tasks.class_indices([task.classes])
        if self.running_gaussians is not None:
            self.running_gaussians.expand(len(task.known), class_indices)
        # A pool that is frozen after the first task gets no prompts for later ones.
        if self.config.trained_tasks == "all" or not self.pool.num_tasks:
            self.pool.begin_task(class_indices)
        if self.classifier is not None:
            self.classifier.begin_task(class_indices)
        if self.frozen:
            self.pool.requires_grad_(False)
        self.sample_counter.clear()
        self.grown = True
        self.update_scaler.detach()

    def check_one_class(self) -> None:
        """Check that the head can learn a task of one class; see `TaskAPI.check_one_class`."""
        if self.running_gaussians is None:
            return
        known = self.tasks.earlier_classes if self.config.state.task_open else set(self.classes)
        unseen = [c for c, seen in zip(self.classes, self.running_gaussians.seen(), strict=True) if c in known and not seen]
        if unseen:
            raise ValueError(
                f"a task of one class is learned against the features of earlier classes, {short_repr(unseen)}, and "
                "this adapter was saved without their statistics: save with save_statistics=True in its config, or use "
                'head="discriminant", which always saves them'
            )

    def check_open_task(self) -> None:
        """The same for a training forward, once: the open task, too, may come from a file or a state dict."""
        gaussians = self.running_gaussians
        if gaussians is None or not gaussians.num_loaded or torch.compiler.is_compiling():
            return
        if 1 in (len(self.tasks.current_classes), len(self.tasks.earlier_classes)):
            self.check_one_class()
            gaussians.num_loaded = 0  # its own classes are seen from now on

    def _check_recorded(self, classifier: FeatureClassifier) -> None:
        """Raise ValueError if the next task could not be consolidated, for want of features from before it."""
        if classifier.needs_before and int(classifier.fitted) and self.recorded is None:
            raise ValueError(
                "drift compensation needs the features of the task's images from before the task: call "
                'model.record_features(images) before begin_task, or set drift_compensation="none" in the config'
            )

    def _check_room(self, classifier: FeatureClassifier, classes: int) -> None:
        """Raise ValueError if the statistics of further `classes` would exceed `max_adapter_bytes`."""
        tensors = [*self.parameters(), *self.buffers()]
        size = sum(t.numel() * t.element_size() for t in tensors) + classifier.bytes_to_answer + classifier.bytes_to_learn
        size += classes * classifier.bytes_per_class
        limit = self.config.max_adapter_bytes
        if size > limit:
            raise ValueError(
                f"with {classes} more classes of {classifier.bytes_per_class:,} bytes of statistics each the adapter would "
                f"take {size:,} bytes, more than max_adapter_bytes={limit:,}: choose {classifier.lighter}, or "
                "raise that limit"
            )

    @without_autocast()
    def end_task(self) -> None:
        """End the current task; see `TaskAPI.end_task`."""
        self.tasks.check_open()
        if self.classifier is not None and int(self.classifier.fitted) < self.classifier.num_tasks:
            raise ValueError("the classifier has not seen this task: call model.consolidate(images) before end_task()")
        if not self.frozen:
            self.pool.end_task()
        self.tasks.end()
        self.update_scaler.detach()

    def classify(self, features: Tensor) -> Tensor:
        """Features [B, D] -> logits [B, C] of the classifier used at test: a closed-form one, else the trained head."""
        if self.classifier is None or not self.config.closed_form:
            return self.head(features)
        return self.classifier(features)

    @without_autocast()
    def consolidate(self, seen: Recorded) -> None:
        """Fit the classifier to the features of a task after its training, if there is one, and calibrate the scores.

        Raises:
            ValueError: features from before the task are of other images, or a label is not of the task.

        Warns:
            UserWarning: the adapter was loaded from a file that was saved within the task, which has no features from
                before it: statistics of earlier classes stay where they are.
        """
        before, classifier = None, self.classifier
        if classifier is not None:
            classifier.check_turn()
        if classifier is not None and classifier.needs_before and int(classifier.fitted):
            if self.recorded is None:  # `begin_task` has checked it, so the open task is of a file
                warnings.warn(
                    "this adapter was saved within a task, without the features of its images from before it: the class "
                    "statistics of earlier tasks stay where they are. To move them, load the adapter of before the task, "
                    "call record_features(images) and begin_task(classes), and then load the tensors of this one",
                    stacklevel=4,
                )
            before = seen.features if self.recorded is None else self.recorded.features_of(seen)
        targets, _ = self.head.to_targets(seen.labels)
        outside = ~self.head.current[targets.clamp_min(0)] | (targets < 0)
        if outside.any():
            raise ValueError(
                f"labels {seen.labels[outside].unique().tolist()} do not belong to the current task: pass images of "
                "the current task only"
            )
        calibrated = self.calibration.choose(self.tasks, seen, targets, before, self.head, classifier)
        if classifier is not None:
            classifier.fit(seen.features, targets, before, self.head)
        for name, value in calibrated.items():
            setattr(self.config.state, name, value)
        self.calibration.update(self.tasks)
        self.recorded = None
        if isinstance(classifier, RetrainedHead):
            classifier.hand_over(self.head)

    def novelty(self, features: Tensor, logits: Tensor) -> Tensor:
        """Novelty of images [B] from what the classifier reads, [B, D], and the logits at test [B, C]."""
        closed_form = self.config.closed_form and self.classifier is not None
        score = self.classifier.novelty(features) if closed_form else None  # type: ignore[union-attr]
        return self.calibration.energy(logits) if score is None else score

    def attach_optimizer(self, optimizer: Any) -> None:
        """Scale and project the steps that an optimizer takes, as the method needs it; see `TaskAPI.attach_optimizer`."""
        pool = self.pool
        factors = {f"pool.{name}": factor for name, factor in pool.update_factors().items()}
        projections = {} if self.frozen else {f"pool.{name}": f for name, f in pool.update_projections().items()}
        if self.config.freezes_old_rows and self.config.class_mask == "task" and not self._learns_one_class:
            current = self.head.current.float()
            factors |= {f"head.{name}": current.view(-1, *[1] * (p.dim() - 1)) for name, p in self.head.named_parameters()}
        self.update_scaler.attach(optimizer, self, factors, projections)

    @property
    def _learns_one_class(self) -> bool:
        """Whether the head's rows of earlier classes are trained, on Gaussians of their features (`head_losses`)."""
        return 1 in (len(self.tasks.current_classes), len(self.tasks.earlier_classes))

    def group_of(self, name: str) -> str:
        """The parameter group of one of the adapter's parameters."""
        return "head" if name.startswith("head.") else self.pool.roles[name.removeprefix("pool.")]

    def to_targets(self, labels: Tensor) -> Tensor:
        """The index of the logit of each label's class [B]; -100 stays. See `TaskState.targets`."""
        only_current = self.training and self.config.class_mask == "task"
        return self.tasks.targets(labels, self.head, only_current=only_current)


def _saves_gaussians(config: PromptPoolConfig) -> bool:
    """Whether an adapter file has the running Gaussians. Files of version 0.1 do not, whatever `save_statistics` says."""
    name = f"{SAVED_PREFIX}running_gaussians.count"
    return config.save_statistics and (config.declared is None or name in config.declared)


class PromptPoolLayer(nn.Module, BaseTunerLayer):
    """All adapters by name, as the tuner layer that PEFT expects. No module of the base is replaced."""

    adapter_layer_names = ("prompt_pool",)
    other_param_names = ()
    # Methods of BaseTunerLayer, declared here because PEFT has no type annotations.
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

    def _no_base_layer(self) -> NoReturn:
        # PEFT's properties would call themselves without end, for example where TorchScript asks for all attributes.
        raise AttributeError("a prompt pool has no weight and no bias: it replaces no layer of the base")

    weight = property(_no_base_layer)
    bias = property(_no_base_layer)

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        """Set `requires_grad` of frozen pools back to False. PEFT calls it after it has set it to True."""
        adapters: Any = self.prompt_pool.values()
        for adapter in adapters:
            if adapter.frozen:
                adapter.pool.requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Does nothing: the tuner moves adapters. PEFT's version needs a base layer."""
