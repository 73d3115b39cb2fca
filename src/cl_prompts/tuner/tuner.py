"""PEFT's tuner for prompt pools: adapters by name, tasks, state dicts. The mathematics of the methods is in their pools.

PEFT calls the base model inside `_enable_peft_forward_hooks`, which runs `cl_prompts.tuner.forward`. A plain `PeftModel`
therefore behaves like `PromptPoolModel`.
"""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, set_additional_trainable_modules
from torch import Tensor, nn

from cl_prompts.backbones.frozen_tensors import execution_device
from cl_prompts.backbones.input_checks import check_arguments, checked_base
from cl_prompts.backbones.own_arguments import OWN_ARGUMENTS
from cl_prompts.backbones.plan import PassPlan, PassRecord
from cl_prompts.backbones.prompted_backbone import PromptedBackbone
from cl_prompts.backbones.quantized import with_quantized_entries
from cl_prompts.backbones.readout import resolve_pooling
from cl_prompts.backbones.structure import Structure
from cl_prompts.backbones.timm_models import given_base
from cl_prompts.backbones.trial import check_runs, check_weights
from cl_prompts.learner.checks import check_finite
from cl_prompts.methods import PromptPoolConfig
from cl_prompts.outputs import PromptPoolOutput
from cl_prompts.runtime.peft_type import PREFIX
from cl_prompts.storage.integrity import CLASSES_SUFFIX, SAVED_PREFIX, check_tensors
from cl_prompts.tuner.adapter import PoolAdapter, PromptPoolLayer
from cl_prompts.tuner.argument_checks import check_adapter_name, check_config, check_modules_to_save, chosen_adapter
from cl_prompts.tuner.forward import prompted_forward
from cl_prompts.tuner.mixed_batch import mixed_forward
from cl_prompts.tuner.model_config import config_of_adapter
from cl_prompts.tuner.task_api import TaskAPI
from cl_prompts.tuner.validation import check_base, check_fits, planned_adapter, record_base


SWITCHED = (BaseTunerLayer, AuxiliaryTrainingWrapper)  # what PEFT's tuners switch on and off

ALIGNMENT = 64  # bytes, of the tensors that torch allocates on the CPU


class PromptPoolTuner(TaskAPI, BaseTuner):
    """PEFT's tuner for prompt pools. It owns the adapters of one model; the base model stays frozen and in eval mode.

    `PromptPoolModel` and PEFT's `PeftModel` create it. Several models may share one base.

    Args:
        model: the base model.
        peft_config: a method's config, or a dict of configs by adapter name.
        adapter_name: name of the adapter to create.
        kwargs: passed to PEFT's `BaseTuner`.

    Raises:
        TypeError: the base is a `PeftModel` or not a supported transformer.
        ValueError: the config does not fit the base or needs more than `max_adapter_bytes`, or another model on this base
            trains copies of the base's modules (`modules_to_save`).
    """

    prefix = PREFIX
    tuner_layer_cls = PromptPoolLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - the type BaseTuner declares
    uses_shared_state = True
    backbone: PromptedBackbone
    pools: PromptPoolLayer
    released = False
    active_adapter: str | list[str]

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        model = checked_base(model)
        if not isinstance(peft_config, dict):  # `inject_adapter_in_model` of PEFT before 0.21, which drops the tuner
            raise ValueError("a prompt pool cannot be injected into the base alone: use `get_peft_model` instead")
        if isinstance(model, PeftModel):
            raise TypeError(f"the base is a {type(model).__name__}: pass model.get_base_model(), its LoRA stays inside")
        # Adapters of other kinds inside the base (LoRA) are part of it: switching pools leaves them as they are.
        self._of_the_base = {id(module) for module in model.modules() if isinstance(module, SWITCHED)}
        # `peft_config` of other adapters on the base: a LoRA, or another model's pools. PEFT must not see it.
        others = vars(model).pop("peft_config", None)
        try:
            super().__init__(model, peft_config, adapter_name, **kwargs)
        except BaseException:
            self._release()
            raise
        finally:
            if others is not None:
                model.peft_config = others

    # ---- adapters ----------------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Build an adapter. The first one also freezes the base model and registers the hooks on it.

        Args:
            model: the base model.
            adapter_name: name of the adapter; its config is already in `peft_config`.
            autocast_adapter_dtype: as in PEFT; adapters are float32 in any case.
            low_cpu_mem_usage: leave the tensors on the meta device, to be filled from a file.
            state_dict: not used; PEFT passes it.

        Raises:
            TypeError: the base is not a supported transformer.
            ValueError: the config does not fit the base or needs more than `max_adapter_bytes`.
        """
        check_adapter_name(adapter_name)
        config = self.peft_config[adapter_name]
        check_config(config)
        # The config keeps the adapter's state, so two models made from one config must not share it.
        config = self.peft_config[adapter_name] = copy.deepcopy(config)
        first = "backbone" not in vars(self)  # `hasattr` would find a part of the base that is called so
        check_weights(model, training=not config.inference_mode)
        if first:
            self.backbone = PromptedBackbone.of(model, self)
        structure: Structure = self.structure
        self._check_shared_base(config)
        pooling = resolve_pooling(config.query_pooling, structure, type(model).__name__)
        resolve_pooling(config.readout if config.readout != "prompt" else "auto", structure, type(model).__name__)
        check_fits(config, model, structure, pooling)
        check_modules_to_save(config, model, structure, pooling)
        planned = planned_adapter(config, structure.shape, pooling)
        check_base(config, model, structure, pooling)
        # Values that are read from a file next need no initialization.
        loaded, config.declared = config.declared is not None, None
        adapter = planned.materialized() if loaded else PoolAdapter(config, structure.shape, pooling)

        if first:
            model.requires_grad_(False)
            model.eval()
            check_runs(self.backbone, adapter.base_arguments, training=not config.inference_mode)
            self.pools = PromptPoolLayer()
        if not low_cpu_mem_usage and all(p.device.type != "meta" for p in adapter.parameters()):
            adapter.to(execution_device(model))
        adapter.train(self.training and not config.inference_mode)
        self.pools.prompt_pool[adapter_name] = adapter
        active = adapter_name in self.active_adapters
        if active:
            self.pools._active_adapter = list(self.active_adapters)
        adapter.requires_grad_(active and not config.inference_mode)
        if config.num_labels is not None:
            record_base(adapter, model, structure)
        try:
            set_additional_trainable_modules(
                model=model,
                peft_config=config,
                model_config=self.get_model_config(model),
                adapter_name=adapter_name,
                activate_adapter=active,
            )
        except BaseException:
            del self.pools.prompt_pool[adapter_name]
            raise
        if config.modules_to_save:
            self.backbone.copied = [name for name, module in model.named_modules() if module in set(self._copies())]

    def _check_shared_base(self, config: PromptPoolConfig) -> None:
        """Raise ValueError if a module of the base would be trained that another model uses."""
        if not self.backbone.copied and not config.modules_to_save:
            return
        if len(self.backbone.users) > 1:
            gc.collect()  # a model without references may still be in a reference cycle
        if len(self.backbone.users) > 1:
            raise ValueError(
                f"modules_to_save={config.modules_to_save}: this base belongs to several models, and one of them trains "
                "copies of its modules, which would change the outputs of the others: unload() the other model, or load "
                "the base once more"
            )
        if "pools" not in self._modules:
            self._restore_modules()  # left by a model that no longer exists

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("a prompt pool replaces no module of the base model")

    def _copies(self) -> Iterator[AuxiliaryTrainingWrapper]:
        """Wrappers with trained copies of the base's own modules (`modules_to_save`)."""
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and id(module) not in self._of_the_base:
                yield module

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make `adapter_name`, a name or a list of one, the active adapter, trainable unless `inference_mode`.

        Raises:
            ValueError: there are several names, or no adapter has that name.
        """
        adapter_name = chosen_adapter(adapter_name, self.peft_config)
        for copies in self._copies():
            name = copies.check_set_adapter(adapter_name)
            copies.set_adapter(name if name in copies._adapters else [], inference_mode=inference_mode)
        self.pools.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set `requires_grad` of the parameters of the adapters `adapter_names`.

        Raises:
            ValueError: no adapter has one of the names.
        """
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            chosen_adapter(name, self.peft_config)
        for copies in self._copies():
            copies.set_requires_grad(adapter_names, requires_grad)
        self.pools.set_requires_grad(adapter_names, requires_grad)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        # PEFT's copies also set requires_grad here, so disabling and enabling a frozen adapter would make it trainable.
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for copies in self._copies():
            copies.enable_adapters(enabled)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        self.pools._disable_adapters = not enabled

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base's device. PEFT calls it at the end of a load with `low_cpu_mem_usage`."""
        self.pools.prompt_pool[adapter_name].to(device or execution_device(self.model))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast an adapter's float16 and bfloat16 tensors to float32. PEFT's own version would search the whole base."""
        adapter = self.pools.prompt_pool[adapter_name]
        for tensor in (*adapter.parameters(), *adapter.buffers()):
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter `adapter_name`. If it was active, the first remaining adapter becomes active.

        Raises:
            ValueError: no adapter has that name.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"adapter {adapter_name!r} does not exist; there are {sorted(self.peft_config)}")
        del self.peft_config[adapter_name]
        self.pools.delete_adapter(adapter_name)
        if adapter_name in self.active_adapters:
            self.active_adapter = next(iter(self.peft_config), [])
        for copies in self._copies():
            copies.delete_adapter(adapter_name, new_active_adapters=self.active_adapters or None)

    def unload(self) -> nn.Module:
        """Remove this model from the base and return the base, frozen. Its hooks are removed with its last model."""
        if not self.released:
            self._restore_modules()
            self._release()
        return given_base(self.model)

    def _restore_modules(self) -> None:
        """Replace the wrappers of `modules_to_save` by the base's own modules."""
        for name in self.backbone.copied:
            wrapper: Any = self.model.get_submodule(name)
            self.model.set_submodule(name, wrapper.original_module)
        self.backbone.copied = []

    def _release(self) -> None:
        """Unregister this tuner from the base. Later calls do nothing."""
        backbone = vars(self).get("backbone")
        if backbone is None or self.released:
            return
        self.released = True
        backbone.release(self)
        if not backbone.users:
            _remove_attributes(self.model)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Not possible: prompts depend on the image and cannot become weights. `args` and `kwargs` are ignored.

        Raises:
            TypeError: always.
        """
        raise TypeError("prompts cannot be merged into weights; unload() gives the base model back")

    merge_adapter = merge_and_unload

    def train(self, mode: bool = True) -> PromptPoolTuner:
        """Set pools and heads to `mode`. The base stays in eval mode: queries and features have no dropout."""
        super().train(mode)
        self.model.eval()
        for name in self.structure.blocks:
            # A block checkpoints its activations only if its own flag is set; its submodules stay in eval mode.
            self.model.get_submodule(name).training = mode
        return self

    @property
    def config(self) -> Any:
        """The base's config with the classes of the active adapter (`id2label`, ...); if it is disabled, the base's own."""
        config: Any = self.model.config
        pools = self._modules.get("pools")
        if pools is None or self.pools.disable_adapters or not self.active_adapters:
            return config
        return config_of_adapter(config, self.adapter.tasks)

    # ---- forward -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if self.pools.disable_adapters:
            yield
            return
        self._check_not_released()
        check_arguments(self.model, kwargs, (*OWN_ARGUMENTS, "adapter_names"))
        if kwargs.get("adapter_names") is not None:
            output = self.mixed_forward(*args, **kwargs)
            # The base's own forward cannot be left out here. `PromptPoolModel.forward` does not call it.
            with self.backbone.prompted(
                PassPlan(PassRecord()), lambda return_dict: output if return_dict else output.to_tuple()
            ):
                yield
            return
        kwargs.pop("adapter_names", None)
        training = self.training and torch.is_grad_enabled()
        with prompted_forward(self.backbone, self.adapter, args, kwargs, training=training):
            yield

    def mixed_forward(self, *args: Any, adapter_names: Any, **kwargs: Any) -> PromptPoolOutput:
        """The forward of a batch with one adapter per image, `adapter_names` [B]; see `cl_prompts.tuner.mixed_batch`.

        `args` and `kwargs` are those of the forward.
        """
        if args:
            kwargs = inspect.signature(type(self.model).forward).bind_partial(self.model, *args).arguments | kwargs
            kwargs.pop("self", None)
        training = self.training and torch.is_grad_enabled()
        return mixed_forward(self.backbone, self.pools.prompt_pool, adapter_names, kwargs, training=training)

    # ---- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PromptPoolConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        own, copies = f".prompt_pool.{adapter_name}.", f".modules_to_save.{adapter_name}."
        saved = {n.split(own)[-1]: tensor for n, tensor in state_dict.items() if own in n or copies in n}
        check_finite(saved, config.state.tasks)
        return {name: tensor for name, tensor in state_dict.items() if own in name}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        own = key.replace(f".prompt_pool.{adapter_name}.", ".prompt_pool.")
        return own if own != key else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PromptPoolConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors of a file, checked and renamed to the names in the model. The model is not changed here."""
        infix, copies = f".prompt_pool.{adapter_name}.", f".modules_to_save.{adapter_name}."
        expected = {
            name.replace(infix, ".prompt_pool.").replace(copies, "."): tensor
            for name, tensor in model.state_dict().items()
            if infix in name or copies in name
        }
        actual = {name.replace(copies, "."): tensor for name, tensor in state_dict.items()}
        classes = SAVED_PREFIX + CLASSES_SUFFIX
        if classes in actual:  # its error says more than that of a shape
            model.get_submodule(f"base_model.pools{infix}tasks").set_extra_state(actual[classes])
        # The checksum is for this file only; other files may be loaded into the adapter later (Trainer's best checkpoint).
        sha256, config.state.weights_sha256 = config.state.weights_sha256, None
        check_tensors(actual, expected, sha256 if config.verify else None)
        known = {classes: expected[classes]} | state_dict  # files of earlier versions do not have the classes
        # A tensor of a file may begin at any address, where kernels round differently; with `low_cpu_mem_usage` it becomes
        # the adapter's own, and training would differ in the last bit.
        # Prompts may be saved in half precision.
        known = {name: t.to(expected[name].dtype) if name.startswith(SAVED_PREFIX) else t for name, t in known.items()}
        renamed = {
            name.replace(".prompt_pool.", infix): tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
            for name, tensor in known.items()
        }
        return with_quantized_entries(renamed, model)


def _remove_attributes(model: nn.Module) -> None:
    """Remove this library's attributes from a base without models. A `peft_config` of adapters of other kinds stays."""
    if any(isinstance(config, PromptPoolConfig) for config in vars(model).get("peft_config", {}).values()):
        del model.peft_config
