"""What a training loop calls on a prompt learner: tasks, optimizer, consolidation, state. No method's mathematics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cl_prompts.backbones.cache_key import backbone_cache_key
from cl_prompts.backbones.fingerprint import fingerprint as base_fingerprint
from cl_prompts.backbones.input_checks import check_images
from cl_prompts.backbones.prompted_backbone import PromptedBackbone
from cl_prompts.backbones.structure import Structure, expected_image
from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.learner.features import record
from cl_prompts.learner.protocol import Images, Replay
from cl_prompts.outputs import PromptPoolOutput
from cl_prompts.tuner.adapter import PoolAdapter, PromptPoolLayer
from cl_prompts.tuner.forward import prompted_forward
from cl_prompts.tuner.resize import grow_pool
from cl_prompts.tuner.training_state import restored_adapter, training_state_dict


class TaskAPI:
    """The methods that `PromptPoolTuner` and `PromptPoolModel` have in common: all act on the active adapter.

    The tuner holds the attributes below; `PromptPoolModel` finds them on its tuner, as `PeftModel` does.

    Attributes:
        model: the frozen base model.
        backbone: the base model with its hooks.
        released: whether the base was given back by `unload`.
        pools: the adapters by name.
        peft_config: configs by adapter name.
        active_adapters: names; the first one answers.
    """

    model: nn.Module
    backbone: PromptedBackbone
    released: bool
    pools: PromptPoolLayer
    peft_config: Any
    active_adapters: Any

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    def structure(self) -> Structure:
        """Where the base's parts are."""
        return self.backbone.structure

    @property
    def adapter(self) -> PoolAdapter:
        """The active adapter.

        Raises:
            ValueError: none is active.
        """
        if not self.active_adapters:
            raise ValueError("no adapter is active: add one, or choose one with set_adapter(name)")
        return self.pools.prompt_pool[self.active_adapters[0]]  # type: ignore[return-value]

    @property
    def classes(self) -> list[int]:
        """Class ids as they stand in `labels`, in the order of the logits."""
        return self.adapter.classes

    @property
    def class_mask(self) -> str:
        """Which logits the training loss sees: the config's `class_mask`."""
        return self.adapter.config.class_mask

    @property
    def closed_form(self) -> bool:
        """Whether the classifier is made from features, so that nothing is known before the first `consolidate`."""
        return self.adapter.config.closed_form

    @property
    def head(self) -> IncrementalHead:
        """The trained classifier."""
        return self.adapter.head

    @property
    def needs_query(self) -> bool:
        """Whether the method reads the un-prompted feature, so that `query=` spares a pass."""
        return self.adapter.pool.needs_query

    @property
    def query_pooling(self) -> str:
        """Which feature the un-prompted pass takes: "cls", "mean", "cls_mean" or "pooler"."""
        return self.adapter.query_pooling

    @property
    def replay(self) -> Replay:
        """How stored images are trained on: always "mixed" into the batches."""
        return "mixed"

    @property
    def needs_memory(self) -> bool:
        """Whether stored images are needed: never."""
        return False

    @property
    def needs_features_before(self) -> bool:
        """Whether `consolidate` needs `record_features` before `begin_task`, from the second task on."""
        classifier = self.adapter.classifier
        return classifier is not None and classifier.needs_before

    @property
    def needs_consolidation(self) -> bool:
        """Whether the classifier needs to see a task's images when the task has been trained."""
        return self.adapter.classifier is not None

    def get_base_model(self) -> nn.Module:
        """The base model."""
        return self.model

    # ---- tasks -------------------------------------------------------------------------------------------------------

    def begin_task(
        self, classes: Sequence[int], *, revisit: bool = False, class_names: Mapping[int, str] | None = None
    ) -> None:
        """Open the next task: the head grows by new classes, the method adds what a task needs.

        On a wrapped model the order is: unwrap, begin_task, new optimizer, wrap (`accelerator.prepare`) again.

        Args:
            classes: class ids as they stand in `labels`, in any order.
            revisit: known classes may come back (new domain, recurring classes); the head does not grow for them.
            class_names: names by class id, saved with the adapter.

        Raises:
            TypeError: class ids are not integers.
            ValueError: a class is declared twice or known already, or a task is still open.
        """
        self._record_base(self.adapter)
        self.adapter.begin_task(classes, revisit=revisit, class_names=class_names)

    def _record_base(self, adapter: PoolAdapter) -> None:
        """Note in the adapter's state which base it is trained on."""
        state, shape = adapter.config.state, self.structure.shape
        if state.base_fingerprint is None:
            state.base_fingerprint = base_fingerprint(self.model, self.structure, adapter.query_pooling)
            state.base_width, state.base_layers, state.base_heads = shape.width, shape.num_layers, shape.num_heads
            state.pooling = adapter.query_pooling
            size = expected_image(self.model, self.structure)[1]
            state.image_size = list(size) if size else None

    def end_task(self) -> None:
        """Close the current task.

        Raises:
            ValueError: no task is open, or the classifier has not seen it (`consolidate`).
        """
        self.adapter.end_task()

    def trains_task(self, number: int) -> bool:
        """Whether something is trained by gradient in task `number`, counted from 0."""
        config = self.adapter.config
        if config.trained_tasks == "first" and number:
            return not config.closed_form  # the head goes on
        return config.trains_features or not config.closed_form

    def grow_pool(self, pool_size: int, optimizer: torch.optim.Optimizer | None = None) -> None:
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

    # ---- training ----------------------------------------------------------------------------------------------------

    def parameter_groups(self, learning_rate: float, **learning_rates: float) -> list[dict[str, Any]]:
        """Optimizer groups of all trainable parameters, by kind.

        Args:
            learning_rate: of all groups that are not in `learning_rates`.
            learning_rates: of "prompts", "keys", "routers", "head" or "base" (`modules_to_save`).

        Returns:
            dicts with `name`, `params` and `lr`, for any torch optimizer. Build it after `begin_task`.

        Raises:
            ValueError: `learning_rates` names no group.
        """
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.adapter.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(self.adapter.group_of(name), []).append(parameter)
        base = [p for p in self.model.parameters() if p.requires_grad]
        if base:
            groups["base"] = base
        known = {"prompts", "keys", "routers", "head", "base"}
        unknown = sorted(set(learning_rates) - known)
        if unknown:
            raise ValueError(f"no parameter group is called {unknown}: choose from {sorted(known)}")
        return [
            {"name": name, "params": params, "lr": learning_rates.get(name, learning_rate)}
            for name, params in groups.items()
        ]

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the method protect what it must when `optimizer` steps. Call it after every `begin_task`.

        Accelerate's wrapper of an optimizer will do too.

        Raises:
            ValueError: the optimizer lacks a trainable parameter.
        """
        adapter = self.adapter
        adapter.update_scaler.attach(optimizer, adapter, adapter.pool.update_factors(), "pool.")
        adapter.update_scaler.check_trains(adapter.named_parameters())

    def check_labels(self) -> None:
        """Report wrong labels seen on a device or in a compiled model since the last call. Call it where you log.

        Raises:
            ValueError: there were some.
        """
        self.adapter.tasks.check_labels()

    def compile_backbone(self, **options: Any) -> None:
        """Compile the base model's forward (both passes) with `torch.compile(**options)`.

        `options` are torch's. Pool and head stay outside, and token routers enter the graph as inputs of one shape, so that
        growing them compiles nothing again.
        """
        self.backbone.compile(**options)

    # ---- passes over images outside training -------------------------------------------------------------------------

    def record_features(self, images: Images) -> None:
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

    def consolidate(self, images: Images, memory: Images | None = None) -> None:
        """See a task's images when its training is done, before `end_task`: statistics of its classes, and the classifier.

        Args:
            images: as for `record_features`, the same images.
            memory: stored images; not used.

        Raises:
            ValueError: the config has no classifier to consolidate, or `record_features` was left out.
        """
        if self.adapter.classifier is None:
            raise ValueError(
                f"head={self.adapter.config.head!r} without alignment has nothing to consolidate: leave it out"
            )
        self.adapter.consolidate(record(self.features_of, images))

    def rank_images(self, rows: Sequence[int] | NDArray[np.int64], images: Images) -> NDArray[np.float64] | None:
        """Which of the `images` with numbers `rows` rehearsal should keep: None, there is no preference."""
        return None

    def features_of(self, batch: Mapping[str, Any]) -> Tensor:
        """What the classifier reads of images, as at test: [B, D] float32.

        Args:
            batch: with `pixel_values` and, if known, `query`.
        """
        own = {name: batch[name] for name in ("pixel_values", "query") if name in batch}
        with prompted_forward(self.backbone, self.adapter, (), own, training=False, features_only=True):
            return self.model(**own).features

    def extract_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """The frozen backbone's feature of each image, the query of the methods that ask for one.

        Args:
            pixel_values: images [B, 3, H, W].
            kwargs: further inputs of the base.

        Returns:
            float32 [B, D], without gradient.

        Raises:
            ValueError: the images do not fit the base, or it was unloaded.
        """
        self._check_not_released()
        check_images(self.model, self.structure, pixel_values, kwargs)
        return self.backbone.features((), {"pixel_values": pixel_values, **kwargs}, self.adapter.query_pooling)[0]

    def _check_not_released(self) -> None:
        if self.released:
            raise ValueError("the base of this model was unloaded: wrap it anew with get_prompt_pool_model")

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

    # ---- identity and state ------------------------------------------------------------------------------------------

    def cache_key(self) -> dict[str, Any]:
        """What `extract_features` depends on, JSON-able: equal keys mean equal features.

        Raises:
            cl_prompts.interfaces.NotCacheableError: the base has code or hooks of others, or is compiled.
        """
        return backbone_cache_key(self.model, self.query_pooling) | {"reader": "PromptedBackbone.features"}

    def fingerprint(self) -> str:
        """Sha256 of what defines the learner before it has learned: its config, and the base's weights."""
        config = {name: value for name, value in self.adapter.config.to_dict().items() if name != "state"}
        base = base_fingerprint(self.model, self.structure, self.adapter.query_pooling)
        return hashlib.sha256(json.dumps([config, base], sort_keys=True, default=str).encode()).hexdigest()

    def training_state_dict(self) -> dict[str, Any]:
        """All that training has changed, also in the middle of a task.

        Returns:
            `tensors` by name, and JSON-able `values`.
        """
        return training_state_dict(self.adapter, self.model)

    def load_training_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state` that `training_state_dict` of a model with the same config on the same base returned.

        Parameters are replaced: build a new optimizer and attach it.

        Raises:
            ValueError: the state was taken with another config.
        """
        new = restored_adapter(self.adapter, self.structure.shape, self.model, state)
        name = self.active_adapters[0]
        self.peft_config[name] = new.config
        self.pools.prompt_pool[name] = new
