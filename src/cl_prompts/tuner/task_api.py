"""The methods of a prompt learner that a training loop calls: tasks, optimizer, consolidation, state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cl_prompts.backbones.cache_key import backbone_cache_key
from cl_prompts.backbones.fingerprint import fingerprint as base_fingerprint
from cl_prompts.backbones.input_checks import check_arguments, check_images
from cl_prompts.backbones.prompted_backbone import PromptedBackbone
from cl_prompts.backbones.structure import Structure, expected_image
from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.learner.features import record
from cl_prompts.learner.protocol import Images, Replay
from cl_prompts.outputs import PromptPoolOutput
from cl_prompts.tuner.adapter import PoolAdapter, PromptPoolLayer
from cl_prompts.tuner.class_api import ClassAPI
from cl_prompts.tuner.consolidation import consolidate, features_of
from cl_prompts.tuner.lower_blocks import LowerBlocks
from cl_prompts.tuner.measures_api import MeasuresAPI
from cl_prompts.tuner.parameter_groups import parameter_groups
from cl_prompts.tuner.resize import grow_pool
from cl_prompts.tuner.training_state import restored_adapter, training_state_dict
from cl_prompts.tuner.validation import record_base


class TaskAPI(ClassAPI, MeasuresAPI, LowerBlocks):
    """The methods that `PromptPoolTuner` and `PromptPoolModel` share. All act on the active adapter.

    The tuner holds the attributes below; `PromptPoolModel` looks them up on its tuner, as `PeftModel` does.

    Attributes:
        model: the frozen base model.
        backbone: the base model with its hooks.
        released: whether the base was given back by `unload`.
        pools: the adapters by name.
        peft_config: configs by adapter name.
        active_adapters: names; the first one is used by the forward.
        calibrates: whether `consolidate` chooses a temperature.
        set_requires_grad: PEFT's method, which sets `requires_grad` of the parameters of an adapter.
        replay: how stored images join training: "mixed" into the batches.
        needs_memory: whether stored images are needed.
        default_rates: learning rates of groups that differ from the trainer's; none.
    """

    model: nn.Module
    backbone: PromptedBackbone
    released: bool
    pools: PromptPoolLayer
    peft_config: Any
    active_adapters: Any
    set_requires_grad: Any
    replay: ClassVar[Replay] = "mixed"
    needs_memory: ClassVar[bool] = False
    calibrates: ClassVar[bool] = True
    default_rates: ClassVar[Mapping[str, float]] = {}

    @property
    def structure(self) -> Structure:
        """Names of the base's parts, and its sizes."""
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
        """Known class ids (values of `labels`), in the order of the logits."""
        return self.adapter.classes

    @property
    def num_tasks(self) -> int:
        """Number of tasks that have begun; 0 without tasks."""
        return len(self.adapter.config.state.tasks)

    @property
    def class_mask(self) -> str:
        """Logits that the training loss uses: the config's `class_mask`."""
        return self.adapter.config.class_mask

    @property
    def closed_form(self) -> bool:
        """Whether the classifier is computed from features and must be fitted (`consolidate`) before the model predicts."""
        return self.adapter.config.closed_form

    @property
    def head(self) -> IncrementalHead:
        """The trained classifier."""
        return self.adapter.head

    @property
    def needs_query(self) -> bool:
        """Whether the method uses the un-prompted feature. If so, passing `query=` saves a pass."""
        return self.adapter.pool.needs_query

    @property
    def query_pooling(self) -> str:
        """Feature that the un-prompted pass returns: "cls", "mean", "cls_mean" or "pooler"."""
        return self.adapter.query_pooling

    @property
    def needs_features_before(self) -> bool:
        """Whether `consolidate` needs `record_features` before `begin_task`, from the second task on."""
        classifier = self.adapter.classifier
        return classifier is not None and classifier.needs_before

    @property
    def needs_consolidation(self) -> bool:
        """Whether `consolidate` must be called after a task's training."""
        return self.adapter.classifier is not None or self.adapter.collects

    @property
    def image_size(self) -> list[int] | None:
        """Height and width of the images of training or, before it, of those that the base requires; None: any."""
        if self.adapter.config.state.image_size is not None:
            return self.adapter.config.state.image_size
        size = None if self.takes_any_size else expected_image(self.model, self.structure)[1]
        return list(size) if size else None

    @property
    def takes_any_size(self) -> bool:
        """Whether the base takes images of any size, as it is or with the adapter's `base_arguments`."""
        interpolates = bool(self.adapter.base_arguments.get("interpolate_pos_encoding"))
        return interpolates or expected_image(self.model, self.structure)[1] is None

    def get_base_model(self) -> nn.Module:
        """The base model."""
        return self.model

    # ---- tasks -------------------------------------------------------------------------------------------------------

    def begin_task(
        self, classes: Sequence[int], *, revisit: bool = False, class_names: Mapping[int, str] | None = None
    ) -> None:
        """Begin the next task. The head grows by the new classes, and the method adds the parameters of a task.

        An adapter that was loaded without `is_trainable` becomes trainable.

        For a wrapped model the order is: unwrap, begin_task, new optimizer, wrap (`accelerator.prepare`) again.

        Args:
            classes: class ids (values of `labels`), in any order.
            revisit: allow known classes (a new domain, recurring classes); the head does not grow for them.
            class_names: names by class id, saved with the adapter.

        Raises:
            TypeError: class ids are not integers.
            ValueError: a class is declared twice or known already, a task is still open, or a class would be alone in the
                loss and the adapter was saved without the feature statistics of earlier classes (`save_statistics`).
        """
        record_base(self.adapter, self.model, self.structure)
        self.adapter.begin_task(classes, revisit=revisit, class_names=class_names)
        if self.adapter.config.inference_mode:
            self.adapter.config.inference_mode = False
            self.set_requires_grad(self.active_adapters[0])

    def end_task(self) -> None:
        """End the current task.

        Raises:
            ValueError: no task is open, or `consolidate` was not called for it.
            FloatingPointError: a tensor holds NaN or Inf.
        """
        self.gather_statistics()
        self.check_finite()
        self.adapter.end_task()

    def check_one_class(self) -> None:
        """Raise ValueError if a trained head lacks the feature statistics of its classes, which were not saved."""
        self.adapter.check_one_class()

    def trains_task(self, number: int) -> bool:
        """Whether task `number`, counted from 0, is trained by gradient descent."""
        config = self.adapter.config
        if config.trained_tasks == "first" and number:
            return not config.closed_form  # only the head is trained
        return config.trains_features or not config.closed_form

    def grow_pool(self, pool_size: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Add prompts to a pool with a fixed `pool_size`, between tasks or within one. Old rows stay bit-equal.

        New rows are initialized as in a new pool. Parameters are replaced: for a wrapped model the order is that of
        `begin_task`, except that the optimizer can be kept.

        Args:
            pool_size: the new number of prompts, larger than the old one.
            optimizer: optimizer to continue with. Its state is kept for old rows and zero for new ones; Adam's step count
                is shared by all rows. None: build a new optimizer before training continues.

        Raises:
            ValueError: the size is not larger, the method's pool grows with its tasks, the optimizer's state cannot grow,
                or the pool would exceed `max_adapter_bytes`. After an error nothing has changed.
        """
        self.adapter.check_pool_learns()
        grow_pool(self.adapter, self.structure.shape, pool_size, optimizer)

    def initialize_prompts(self, pixel_values: Tensor, seed: int = 0, **kwargs: Any) -> None:
        """Initialize the trainable prompts from images: each row becomes the embedding of a random patch.

        Not from a paper. Call it before training; on several processes, with the same images on each.

        Args:
            pixel_values: images [B, 3, H, W]. The embeddings are the patch tokens that enter block 0, with positions added.
            seed: seed of the draw of patches, with replacement.
            kwargs: further inputs of the base.
        """
        self.adapter.check_pool_learns()
        check_arguments(self.model, kwargs)
        kwargs = self.adapter.base_arguments | kwargs
        check_images(self.model, self.structure, pixel_values, kwargs)
        vectors = self.backbone.patch_embeddings(pixel_values, kwargs)
        self.adapter.pool.fill_prompts(vectors, torch.Generator().manual_seed(seed))

    # ---- training ----------------------------------------------------------------------------------------------------

    def parameter_groups(self, learning_rate: float, **learning_rates: float) -> list[dict[str, Any]]:
        """Optimizer groups of all trainable parameters, by kind. Call it after `begin_task`.

        Args:
            learning_rate: learning rate of all groups that are not in `learning_rates`.
            learning_rates: learning rates of "prompts", "keys", "routers", "head" or "base" (`modules_to_save`).

        Returns:
            dicts with `name`, `params` and `lr`, for any torch optimizer.

        Raises:
            ValueError: a name in `learning_rates` is not a group, or the adapter was loaded without `is_trainable`.
        """
        return parameter_groups(self.adapter, self.model, learning_rate, learning_rates)

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Register the optimizer, so that the method can scale its updates. Call it after every `begin_task`.

        `optimizer` may be wrapped by Accelerate.

        Raises:
            ValueError: the optimizer does not train all trainable parameters.
        """
        adapter = self.adapter
        adapter.attach_optimizer(optimizer)
        adapter.update_scaler.check_trains(adapter.named_parameters())

    def check_labels(self) -> None:
        """Check labels of the forwards since the last call, on an accelerator or in a compiled model. Call it at logging.

        Raises:
            ValueError: a label was of no declared class.
        """
        self.adapter.tasks.check_labels()

    def check_finite(self) -> None:
        """Check all tensors that training has changed. `end_task`, `training_state_dict` and saves do it, too.

        Raises:
            FloatingPointError: one holds NaN or Inf.
        """
        self.training_state_dict()

    def compile_backbone(self, **options: Any) -> None:
        """Compile the base model's forward (both passes) with `torch.compile`, which gets the `options`.

        Pool and head are not compiled. Token routers are inputs of the graph with a fixed shape, so that growing them does
        not recompile it.
        """
        self.backbone.compile(**options)

    # ---- passes over images outside training -------------------------------------------------------------------------

    def record_features(self, images: Images) -> None:
        """Keep the features of the next task's images before `begin_task`, for drift compensation. The first has none.

        Args:
            images: this process's share of all the task's images, not augmented: batches on the model's device with
                `pixel_values`, `labels`, `sample_ids` and, if known, `query`.

        Raises:
            ValueError: a task is open.
        """
        if self.adapter.config.state.task_open:
            raise ValueError("record_features must be called before begin_task, a task is open: call end_task first")
        self.adapter.recorded = record(self.features_of, images) if self.classes else None

    def consolidate(self, images: Images, memory: Images | None = None) -> None:
        """Fit the classifier, if it is made from features, collect the pool's statistics, and calibrate the scores.

        Call it after training, before `end_task`. A trained head can do without it; its scores are then not calibrated.

        Args:
            images: the same images as for `record_features`, in the same form.
            memory: stored images; not used.

        Raises:
            ValueError: `record_features` was not called, or an image is of no class of the newest task.
        """
        consolidate(self.backbone, self.adapter, images)

    def rank_images(self, rows: Sequence[int] | NDArray[np.int64], images: Images) -> NDArray[np.float64] | None:
        """Ranking of the `images` with numbers `rows` for rehearsal: None, prompt learners have no preference."""
        return None

    def features_of(self, batch: Mapping[str, Any]) -> Tensor:
        """Features that the classifier gets at test: [B, D] float32.

        Args:
            batch: with `pixel_values` and, if known, `query`.
        """
        return features_of(self.backbone, self.adapter, batch)

    def extract_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Features of the frozen backbone without prompts. They are the query of the methods that use one.

        Args:
            pixel_values: images [B, 3, H, W].
            kwargs: further inputs of the base.

        Returns:
            float32 [B, D], without gradient.

        Raises:
            ValueError: the images do not fit the base, or it was unloaded.
        """
        self._check_not_released()
        check_arguments(self.model, kwargs)
        kwargs = self.adapter.base_arguments | kwargs
        check_images(self.model, self.structure, pixel_values, kwargs)
        return self.backbone.features((), {"pixel_values": pixel_values, **kwargs}, self.adapter.query_pooling)[0]

    def _check_not_released(self) -> None:
        if self.released:
            raise ValueError("the base of this model was unloaded: wrap it again with get_prompt_pool_model")

    def chosen_tasks(self, output: PromptPoolOutput) -> Tensor | None:
        """Task whose prompts were selected for each image, if the method selects prompts by task.

        Args:
            output: output of a forward in eval mode.

        Returns:
            Numbers of tasks [B], or [B, layers] if each layer selects; None if the method does not select a task.
        """
        if output.prompt_ids is None:
            return None
        return self.adapter.pool.chosen_tasks(output.prompt_ids, output.prompt_weights, output.query)

    # ---- identity and state ------------------------------------------------------------------------------------------

    def cache_key(self) -> dict[str, Any]:
        """Cache key of `extract_features`, JSON-able: equal keys mean equal features.

        Raises:
            cl_prompts.interfaces.NotCacheableError: the base has hooks or code from outside transformers, or is compiled.
        """
        reader = {"reader": "PromptedBackbone.features", "arguments": self.adapter.base_arguments}
        return backbone_cache_key(self.model, self.query_pooling) | reader

    def fingerprint(self) -> str:
        """Sha256 of the config without its state, and of the base's weights. Training does not change it."""
        config = {name: value for name, value in self.adapter.config.to_dict().items() if name != "state"}
        base = base_fingerprint(self.model, self.structure, self.adapter.query_pooling)
        return hashlib.sha256(json.dumps([config, base], sort_keys=True, default=str).encode()).hexdigest()

    def training_state_dict(self) -> dict[str, Any]:
        """Everything that training has changed, between tasks or within one.

        Returns:
            a dict with `tensors` by name, and JSON-able `values`.

        Raises:
            FloatingPointError: a tensor holds NaN or Inf.
        """
        return training_state_dict(self.adapter, self.model)

    def load_training_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a training state. Parameters are replaced: build a new optimizer and attach it.

        Args:
            state: from `training_state_dict` of a model with the same config on the same base.

        Raises:
            ValueError: the state is of a model with another config.
        """
        new = restored_adapter(self.adapter, self.structure.shape, self.model, state)
        name = self.active_adapters[0]
        self.peft_config[name], self.pools.prompt_pool[name] = new.config, new
