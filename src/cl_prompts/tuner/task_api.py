"""What a training loop calls: tasks, parameter groups, looks at images for the classifier. No method's mathematics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_prompts.backbones.fingerprint import fingerprint
from cl_prompts.backbones.input_checks import check_images
from cl_prompts.backbones.prompted_backbone import PromptedBackbone
from cl_prompts.backbones.structure import Structure, expected_image
from cl_prompts.heads.incremental import GrowingHead
from cl_prompts.learner.features import record
from cl_prompts.outputs import PromptPoolOutput
from cl_prompts.tuner.adapter import PoolAdapter, PromptPoolLayer
from cl_prompts.tuner.forward import prompted_forward
from cl_prompts.tuner.resize import grow_pool
from cl_prompts.tuner.training_state import rebuilt, training_state


class TaskLearner:
    """The part of `PromptPoolTuner` that learns task after task with its active adapter."""

    model: nn.Module
    backbone: PromptedBackbone
    pools: PromptPoolLayer
    peft_config: Any
    active_adapters: Any

    @property
    def structure(self) -> Structure:
        """Where the base's parts are."""
        return self.backbone.structure

    @property
    def adapter(self) -> PoolAdapter:
        """The adapter that answers."""
        if not self.active_adapters:
            raise ValueError("no adapter is active: add one, or choose one with set_adapter(name)")
        return self.pools.prompt_pool[self.active_adapters[0]]  # type: ignore[return-value]

    @property
    def classes(self) -> list[int]:
        """Class ids as they stand in `labels`, in the order of the logits' columns."""
        return self.adapter.classes

    @property
    def class_mask(self) -> str:
        """Which logits the training loss sees (the config's)."""
        return self.adapter.config.class_mask

    @property
    def closed_form(self) -> bool:
        """Whether nothing can be answered before the first task is consolidated."""
        return self.adapter.config.closed_form

    @property
    def head(self) -> GrowingHead:
        """The trained head."""
        return self.adapter.head

    @property
    def needs_query(self) -> bool:
        """Whether the method reads the un-prompted feature; a caller who has it saves a pass with `query=`."""
        return self.adapter.pool.needs_query

    @property
    def query_pooling(self) -> str:
        """Which feature the un-prompted pass takes: "cls", "mean", "cls_mean" or "pooler"."""
        return self.adapter.query_pooling

    def chosen_tasks(self, output: PromptPoolOutput) -> Tensor | None:
        """Task whose prompts answered for each image, as far as the method chooses prompts by task.

        Args:
            output: the answer of a pass in eval mode.

        Returns:
            Numbers of tasks [B], or [B, layers] where each layer chooses; None where no task is chosen.
        """
        if output.prompt_ids is None:
            return None
        return self.adapter.pool.chosen_tasks(output.prompt_ids, output.prompt_weights, output.query)

    def begin_task(
        self, classes: Sequence[int], *, revisit: bool = False, class_names: dict[int, str] | None = None
    ) -> None:
        """Open the next task: the head grows by new classes, the method adds what a task needs.

        On a wrapped model the order is: unwrap, begin_task, new optimizer, wrap (`accelerator.prepare`) again.

        Args:
            classes: class ids as they stand in `labels`, in any order.
            revisit: known classes may come back (new domain, recurring classes); the head does not grow for them.
            class_names: names by class id, saved with the adapter.

        Raises:
            ValueError: a class is declared twice or known already, or a task is still open.
        """
        self._record_base(self.adapter)
        self.adapter.begin_task(classes, revisit, class_names)

    def _record_base(self, adapter: PoolAdapter) -> None:
        """Note in the adapter's state which base it is trained on."""
        state, shape = adapter.config.state, self.structure.shape
        if state.base_fingerprint is None:
            state.base_fingerprint = fingerprint(self.model, self.structure, adapter.query_pooling)
            state.base_width, state.base_layers, state.base_heads = shape.width, shape.num_layers, shape.num_heads
            state.pooling = adapter.query_pooling
            size = expected_image(self.model, self.structure)[1]
            state.image_size = list(size) if size else None

    def end_task(self) -> None:
        """Close the current task."""
        self.adapter.end_task()

    def grow_pool(self, pool_size: int, optimizer: Any = None) -> None:
        """Give a method with a fixed `pool_size` more prompts, between tasks or in one. Old rows stay bit-equal.

        New rows start as a new pool's would. Parameters are replaced: on a wrapped model the order is that of
        `begin_task`, except that an optimizer can be kept.

        Args:
            pool_size: the new number of prompts, larger than the old one.
            optimizer: trains the grown pool from now on, with the state it has for old rows and none (zeros) for new
                ones; Adam's step count is one for all rows. None: build a new one before training goes on.

        Raises:
            ValueError: no larger size, a method whose pool grows with its tasks, an optimizer that cannot grow along, or
                more than `max_adapter_bytes`. Nothing has changed then.
        """
        self.adapter.check_pool_learns()
        grow_pool(self.adapter, self.structure.shape, pool_size, optimizer)

    def initialize_prompts(self, pixel_values: Tensor, seed: int = 0, **kwargs: Any) -> None:
        """Start the trainable prompts from real images: every row becomes the embedding of one of their patches. Ours.

        Call it before training (after the first `begin_task`, or before it), on several processes with the same images.

        Args:
            pixel_values: images [B, 3, H, W]; their patches are what enters block 0, positions included.
            seed: draws the patches, with replacement.
            kwargs: further inputs of the base.
        """
        self.adapter.check_pool_learns()
        check_images(self.model, self.structure, pixel_values, kwargs)
        vectors = self.backbone.patch_embeddings(pixel_values, kwargs)
        self.adapter.pool.fill_prompts(vectors, torch.Generator().manual_seed(seed))

    def parameter_groups(self, lr: float, **lrs: float) -> list[dict[str, Any]]:
        """Optimizer groups of all trainable parameters, by kind.

        Args:
            lr: learning rate.
            lrs: other rates for "prompts", "keys", "routers", "head" or "base" (`modules_to_save`).

        Returns:
            dicts with `name`, `params` and `lr`, for any torch optimizer. Build it after `begin_task`.

        Raises:
            ValueError: `lrs` names no group.
        """
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.adapter.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(self.adapter.group_of(name), []).append(parameter)
        base = [p for p in self.model.parameters() if p.requires_grad]
        if base:
            groups["base"] = base
        known = {"prompts", "keys", "routers", "head", "base"}
        if set(lrs) - known:
            raise ValueError(f"no parameter group is called {sorted(set(lrs) - known)}: choose from {sorted(known)}")
        return [{"name": name, "params": params, "lr": lrs.get(name, lr)} for name, params in groups.items()]

    def attach_optimizer(self, optimizer: Any) -> None:
        """Let the method protect what it must when `optimizer` steps. Call it after every `begin_task`.

        Raises:
            ValueError: the optimizer lacks a trainable parameter.
        """
        adapter = self.adapter
        adapter.link.attach(optimizer, adapter, adapter.pool.update_factors(), "pool.")
        adapter.link.check_trains(adapter.named_parameters())

    def check_labels(self) -> None:
        """Report labels of undeclared classes seen on a device or in a compiled model; call it where you log.

        Raises:
            ValueError: there were some.
        """
        self.adapter.check_labels()

    def training_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that training has changed, also in the middle of a task: tensors by name, and JSON-able values."""
        return training_state(self.adapter, self.model)

    def load_training_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on where `training_state` was taken, with a model made from the same config on the same base.

        `tensors` and `values` are what it gave. Parameters are replaced: build a new optimizer and attach it.

        Raises:
            ValueError: the state was taken from another config.
        """
        old = self.adapter
        new = rebuilt(old, self.structure.shape, self.model, tensors, values)
        name = self.active_adapters[0]
        self.peft_config[name] = new.config
        self.pools.prompt_pool[name] = new

    rehearses: ClassVar[str] = "beside"  # rehearsed images join the batches

    @property
    def needs_features_before(self) -> bool:
        """Whether `consolidate` wants the task's images to be seen before `begin_task` (not before the first)."""
        classifier = self.adapter.classifier
        return classifier is not None and classifier.needs_before

    @property
    def needs_consolidation(self) -> bool:
        """Whether the classifier wants to see a task's images when its training is done."""
        return self.adapter.classifier is not None

    def trains_task(self, number: int) -> bool:
        """Whether there is something to train by gradient in task `number`."""
        config = self.adapter.config
        if config.trained_tasks == "first" and number:
            return not config.closed_form  # the head goes on
        return config.trains_features or not config.closed_form

    def record_features(self, images: Iterable[Mapping[str, Any]]) -> None:
        """See a task's images before it begins, for drift compensation.

        Args:
            images: this process's share of all its images, not augmented: batches on the model's device with
                `pixel_values`, `labels`, `sample_ids` and, if known, `query`.

        Raises:
            ValueError: a task is open, so that the model is no longer the one before it.
        """
        if self.adapter.config.state.task_open:
            raise ValueError("record_features shows the next task's images to the model before begin_task, a task is open")
        self.adapter.recorded = record(self.features_of, images)

    def consolidate(self, images: Iterable[Mapping[str, Any]], memory: Any = None) -> None:
        """See a task's images when its training is done, before `end_task`: statistics of its classes, and the classifier.

        Args:
            images: as for `record_features`, the same images.
            memory: not used; what rehearsal keeps.

        Raises:
            ValueError: the config has no classifier that wants it, or `record_features` was left out.
        """
        if self.adapter.classifier is None:
            raise ValueError(
                f"head={self.adapter.config.head!r} without alignment has nothing to consolidate: leave it out"
            )
        self.adapter.consolidate(record(self.features_of, images))

    def features_of(self, batch: Mapping[str, Any]) -> Tensor:
        """What the classifier reads of images, as at test: [B, D] float32.

        Args:
            batch: with `pixel_values` and, if known, `query`.
        """
        own = {name: batch[name] for name in ("pixel_values", "query") if name in batch}
        with prompted_forward(self.backbone, self.adapter, (), own, training=False, features_only=True):
            return self.model(**own).features

    def describe(self) -> str:
        """Sha256 of what defines the learner before it has learnt: its config, and the base's weights."""
        config = {name: value for name, value in self.adapter.config.to_dict().items() if name != "state"}
        base = fingerprint(self.model, self.structure, self.adapter.query_pooling)
        return hashlib.sha256(json.dumps([config, base], sort_keys=True, default=str).encode()).hexdigest()

    def compile_backbone(self, **options: Any) -> None:
        """Compile the base model's forward (both passes) with `torch.compile(**options)`.

        `options` are torch's. Pool and head stay outside, and token routers enter the graph as inputs of one shape, so that
        growing them compiles nothing again.
        """
        self.backbone.compile(**options)
