"""Query -> pool -> prompted pass -> head, under whatever PEFT model wraps it. No method's mathematics.

PEFT calls the base model inside `_enable_peft_forward_hooks`. There the tuner runs the un-prompted pass, asks the pool,
and sets the prompts; the base model's own forward is then the prompted pass, and a hook on it replaces what it returns by
`PromptPoolOutput`. A plain `PeftModel` therefore behaves like `PromptPoolModel`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _delete_auxiliary_adapter
from peft.utils.other import set_additional_trainable_modules
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.adapter import PoolAdapter, PromptPoolLayer
from cl_prompts.backbones.prefix import PrefixInjector
from cl_prompts.backbones.query import in_order_noise, resolve_pooling, take_feature, whole_image
from cl_prompts.backbones.structure import Structure, cls_position_embedding, expected_image, find_structure, fingerprint
from cl_prompts.backbones.tokens import TokenInjector
from cl_prompts.collectives import sum_over_processes, world_size
from cl_prompts.config import PromptPoolConfig
from cl_prompts.fitting import check_base, check_fits, check_images, check_labels, refuse_large
from cl_prompts.integrity import check_tensors
from cl_prompts.losses import add_up
from cl_prompts.outputs import PromptPoolOutput
from cl_prompts.pools import Observation
from cl_prompts.prompts import LossPart, PoolInput, Prompts


# Arguments of the forward that are ours; the base model never sees them while an adapter is active.
OWN_ARGUMENTS = ("labels", "query", "sample_ids", "num_items_in_batch")
# What transformers.Trainer, which asks the base's config, is not to gather in an evaluation: all but loss and logits.
NOT_GATHERED = ("losses", "prompt_ids", "prompt_weights", "query", "features")


@dataclass
class Call:
    """One forward, from the query to the answer."""

    adapter: PoolAdapter
    prompts: Prompts
    batch_size: int
    training: bool
    query: Tensor | None
    columns: Tensor | None
    counted: Tensor
    sample_ids: Any
    num_items: Any
    noise: dict[str, Tensor]


class PromptPoolTuner(BaseTuner):
    """PEFT's tuner for prompt pools: owns the adapters and the hooks on the base model, which stays frozen and in eval."""

    prefix = "prompt_pool"
    tuner_layer_cls = PromptPoolLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - the type BaseTuner declares
    uses_shared_state = True
    structure: Structure
    pools: PromptPoolLayer
    active_adapter: str | list[str]

    # ---- adapters ----------------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Build an adapter; the first one also puts the hooks on the base model.

        Raises:
            TypeError: the base is no supported transformer.
            ValueError: the config does not fit the base, or asks for too much memory.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, PromptPoolConfig):
            raise TypeError(f"a prompt pool needs a PromptPoolConfig, got {type(config).__name__}")
        # The config keeps the adapter's state, so two models made from one config must not share it.
        config = self.peft_config[adapter_name] = copy.deepcopy(config)
        first = not hasattr(self, "pools")
        structure: Structure = find_structure(model) if first else self.structure
        pooling = resolve_pooling(config.query_pooling, structure, type(model).__name__)
        resolve_pooling(config.readout if config.readout != "prompt" else "auto", structure, type(model).__name__)
        check_fits(config, model, structure, pooling)
        refuse_large(config, structure.shape, pooling)
        if config.state.base_fingerprint is not None:
            check_base(config, fingerprint(model, structure, pooling))
        adapter = PoolAdapter(config, structure.shape, pooling)

        if first:
            self.structure = structure
            model.requires_grad_(False)
            model.eval()
            self.tokens = TokenInjector(model, structure)
            self.prefix_kv = PrefixInjector(model, structure)
            self.pools = PromptPoolLayer()
            self._call: Call | None = None
            base_config: Any = getattr(model, "config", None)
            if base_config is not None:
                own = getattr(type(base_config), "keys_to_ignore_at_inference", ())
                base_config.keys_to_ignore_at_inference = [*own, *NOT_GATHERED]
            self._base_hooks = [
                model.register_forward_pre_hook(self._strip_arguments, with_kwargs=True),
                model.register_forward_hook(self._answer, with_kwargs=True),
            ]
        self.prefix_kv.install(adapter.pool.layers)
        if not low_cpu_mem_usage and all(p.device.type != "meta" for p in adapter.parameters()):
            adapter.to(next(model.parameters()).device)
        adapter.train(self.training and not config.inference_mode)
        self.pools.prompt_pool[adapter_name] = adapter
        active = adapter_name in self.active_adapters
        if active:
            self.pools._active_adapter = list(self.active_adapters)
        adapter.requires_grad_(active and not config.inference_mode)
        if config.num_labels is not None:
            self._record_base(adapter)
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

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("a prompt pool replaces no module of the base model")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter the one that answers, trainable unless `inference_mode`."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self.pools.set_adapter(adapter_name, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch gradients of adapters on or off."""
        super().set_requires_grad(adapter_names, requires_grad)
        self.pools.set_requires_grad(adapter_names, requires_grad)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        # PEFT's layers also switch gradients here, which would make a frozen adapter trainable by switching it off and on.
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        super()._enable_adapter_layers(enabled)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        self.pools._disable_adapters = not enabled

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's last step of a load with `low_cpu_mem_usage`: the tensors lie where it read them."""
        self.pools.prompt_pool[adapter_name].to(device or next(self.model.parameters()).device)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; if it was the active one, the first of the others takes over."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"adapter {adapter_name!r} does not exist; there are {sorted(self.peft_config)}")
        del self.peft_config[adapter_name]
        self.pools.delete_adapter(adapter_name)
        if adapter_name in self.active_adapters:
            self.active_adapter = next(iter(self.peft_config), [])
        _delete_auxiliary_adapter(self.model, adapter_name, new_active_adapters=self.active_adapters or None)

    def unload(self) -> nn.Module:
        """Take every hook off the base model and give it back as it was, frozen."""
        self.tokens.uninstall()
        self.prefix_kv.uninstall()
        for hook in self._base_hooks:
            hook.remove()
        if hasattr(self.model, "config"):
            vars(self.model.config).pop("keys_to_ignore_at_inference", None)
        if hasattr(self.model, "peft_config"):  # not yet, when the first adapter failed
            del self.model.peft_config
        return self.model

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Prompts depend on the image and cannot become weights."""
        raise TypeError("prompts cannot be merged into weights; unload() gives the base model back")

    def train(self, mode: bool = True) -> PromptPoolTuner:
        """Pools and heads follow `mode`; the base stays in eval, where its answers are those the query was made for."""
        super().train(mode)
        self.model.eval()
        for name in self.structure.blocks:
            # Blocks checkpoint their activations only while their own flag says training; what is inside stays in eval.
            self.model.get_submodule(name).training = mode
        return self

    # ---- tasks -------------------------------------------------------------------------------------------------------

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
    def needs_query(self) -> bool:
        """Whether the method reads the un-prompted feature; a caller who has it saves a pass with `query=`."""
        return self.adapter.pool.needs_query

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
        self._grown = True

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

    def parameter_groups(self, lr: float, **lrs: float) -> list[dict[str, Any]]:
        """Optimizer groups of all trainable parameters, by kind.

        Args:
            lr: learning rate.
            lrs: other rates for "prompts", "keys", "routers", "head" or "base" (`modules_to_save`).

        Returns:
            dicts with `name`, `params` and `lr`, for any torch optimizer. Build it after `begin_task`.
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
        """Report labels of undeclared classes seen on a device since the last call; call it where you log.

        Raises:
            ValueError: there were some.
        """
        self.adapter.check_labels()

    def compile_backbone(self, **options: Any) -> None:
        """Compile the base model's forward (both passes) with `torch.compile(**options)`.

        Pool, routers of prompt tokens and head stay outside, so that growing them compiles nothing again.
        """
        self.model.forward = torch.compile(self.model.forward, **options)

    # ---- forward -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if self.pools.disable_adapters:
            yield
            return
        try:
            with whole_image(self.model, self.structure):
                self._call = self._prepare(self.adapter, args, kwargs)
                yield
        finally:
            self._call = None
            self.tokens.clear()
            self.prefix_kv.clear()

    def extract_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """The un-prompted feature (the query) of images [B, 3, H, W]: [B, D] float32, without gradient."""
        check_images(self.model, self.structure, pixel_values, kwargs)
        with whole_image(self.model, self.structure):
            feature = self._query(self.adapter, (), {"pixel_values": pixel_values, **kwargs})
        self.tokens.clear()
        return feature

    def _query(self, adapter: PoolAdapter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        call, self._call = self._call, None
        images = kwargs.get("pixel_values", args[0] if args else None)
        assert images is not None
        with torch.no_grad():
            self.model(*args, **kwargs, **in_order_noise(self.model, self.structure, kwargs, images))
            feature = take_feature(self.model, self.structure, self.tokens, adapter.query_pooling)
        self._call = call
        return feature

    def _prepare(self, adapter: PoolAdapter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Check the input, run the un-prompted pass if the pool asks for it, set the prompts."""
        images: Any = kwargs.get("pixel_values", args[0] if args else None)
        labels, query = kwargs.get("labels"), kwargs.get("query")
        base_kwargs = {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}
        check_images(self.model, self.structure, images, base_kwargs)
        if labels is not None:
            check_labels(labels, len(images))
        training = self.training and torch.is_grad_enabled()
        self._check_ready(adapter, training and labels is not None)
        columns = adapter.to_columns(labels) if labels is not None else None
        everything = torch.ones(len(images), dtype=torch.bool, device=images.device)
        counted = everything if columns is None else columns >= 0
        if query is None and adapter.pool.needs_query:
            query = self._query(adapter, args, base_kwargs)
        if query is not None:
            if not isinstance(query, Tensor):
                raise TypeError(f"query must be a tensor [B, width] from extract_features, got {type(query).__name__}")
            query = query.detach().float()
            if query.shape != (len(images), self.structure.shape.width):
                raise ValueError(
                    f"query has shape {list(query.shape)}, expected {[len(images), self.structure.shape.width]}"
                )
        task = max(adapter.pool.num_tasks - 1, 0) if training else None
        with torch.autocast(images.device.type, enabled=False):
            prompts = adapter.pool(PoolInput(len(images), query, task, counted))
        self._set_prompts(prompts)
        return Call(
            adapter=adapter,
            prompts=prompts,
            batch_size=len(images),
            training=training,
            query=query,
            columns=columns,
            counted=counted,
            sample_ids=kwargs.get("sample_ids"),
            num_items=kwargs.get("num_items_in_batch"),
            noise=in_order_noise(self.model, self.structure, base_kwargs, images),
        )

    def _check_ready(self, adapter: PoolAdapter, learning: bool) -> None:
        if not adapter.classes:
            raise ValueError("no class is known yet: call begin_task(classes), or set num_labels in the config")
        if not learning:
            return
        if adapter.config.num_labels is None and not adapter.config.state.task_open:
            raise ValueError("a training forward outside a task: call begin_task(classes) first, or model.eval()")
        if adapter.config.needs_optimizer and not adapter.link.attached:
            raise ValueError(
                "this config scales the optimizer's steps (modulate=\"update\"): call "
                "model.attach_optimizer(optimizer) after begin_task"
            )
        adapter.link.check_trains(adapter.named_parameters())
        if world_size() > 1 and getattr(self, "_grown", False):
            self._check_wrapper(adapter)

    def _check_wrapper(self, adapter: PoolAdapter) -> None:
        """A DistributedDataParallel made before begin_task would not average the new parameters' gradients."""
        wrapper = nn.parallel.DistributedDataParallel._get_active_ddp_module()
        if wrapper is not None:
            wrapped = {id(p) for p in wrapper._module_parameters}
            if any(p.requires_grad and id(p) not in wrapped for p in adapter.parameters()):
                raise ValueError(
                    "the model grew after it was wrapped: unwrap it, begin_task, new optimizer, then prepare it again"
                )
        self._grown = False

    def _set_prompts(self, prompts: Prompts) -> None:
        tokens = prompts.tokens
        if tokens is not None and prompts.tokens_take_cls_position:
            position = cls_position_embedding(self.model, self.structure)
            tokens = tokens if position is None else tokens + position.detach()
        self.tokens.tokens = tokens
        self.tokens.index = int(prompts.tokens_after_cls and self.structure.has_cls)
        self.prefix_kv.prefixes = prompts.prefixes
        self.prefix_kv.used = {}

    def _strip_arguments(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._call
        if call is None:
            return None
        kwargs = {**{name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}, **call.noise}
        if call.prompts.candidates > 1:

            def repeat(value: Any) -> Any:
                per_image = isinstance(value, Tensor) and value.dim() and len(value) == call.batch_size
                return value.repeat_interleave(call.prompts.candidates, 0) if per_image else value

            args, kwargs = tuple(map(repeat, args)), {name: repeat(value) for name, value in kwargs.items()}
        return args, kwargs

    def _answer(self, base: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call = self._call
        if call is None:
            return None
        adapter = call.adapter
        with torch.autocast(call.counted.device.type, enabled=False):
            features = take_feature(self.model, self.structure, self.tokens, adapter.readout)
            logits = adapter.head(features)
            ids, weights = self._choices(call.prompts)
            if call.prompts.candidates > 1:
                best = _most_confident(logits, call.batch_size)
                features, logits = features[best], logits[best]
                ids, weights = (None if x is None else x[best] for x in (ids, weights))
            loss, losses = None, None
            if call.training:
                logits = self._masked(call, logits)
            if call.columns is not None:
                loss, losses = self._loss(call, logits)
        if call.training:
            with torch.no_grad():
                fresh = adapter.ledger.fresh(call.sample_ids, call.counted)
                adapter.pool.observe(Observation(ids, call.query, call.columns, fresh))
        answer = PromptPoolOutput(
            loss=loss,
            logits=logits,
            losses=losses,
            prompt_ids=ids,
            prompt_weights=weights,
            query=call.query,
            features=features,
        )
        return answer.to_tuple() if kwargs.get("return_dict") is False else answer

    def _choices(self, prompts: Prompts) -> tuple[Tensor | None, Tensor | None]:
        """Chosen prompts and weights: the pool's own, or those that the layers chose, [B, layers, k]."""
        used = [self.prefix_kv.used[layer] for layer in sorted(self.prefix_kv.used)]
        used = [kv for kv in used if kv.ids is not None]
        if prompts.ids is not None or not used:
            return prompts.ids, prompts.weights
        ids, weights = zip(*((kv.ids, kv.weights) for kv in used), strict=True)
        return torch.stack(ids, 1), torch.stack(weights, 1)

    def _masked(self, call: Call, logits: Tensor) -> Tensor:
        mask = call.adapter.config.class_mask
        if mask == "task":
            return logits.masked_fill(~call.adapter.head.current, float("-inf"))
        if mask == "batch" and call.columns is not None:
            present = torch.zeros(logits.shape[1] + 1, dtype=torch.int64, device=logits.device)
            present[torch.where(call.counted, call.columns, logits.shape[1])] = 1
            return logits.masked_fill(sum_over_processes(present)[:-1] == 0, float("-inf"))
        return logits

    def _loss(self, call: Call, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert call.columns is not None
        each = F.cross_entropy(logits, call.columns, reduction="none")
        parts = {"cross_entropy": LossPart(each, "mean"), **(call.prompts.losses if call.training else {})}
        return add_up(parts, call.counted, call.num_items, over_processes=call.training)

    # ---- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in state_dict.items() if f".prompt_pool.{adapter_name}." in name}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        own = key.replace(f".prompt_pool.{adapter_name}.", ".prompt_pool.")
        return own if own != key else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PromptPoolConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Names as in the model, after every check; nothing is written into the model before."""
        infix, copies = f".prompt_pool.{adapter_name}.", f".modules_to_save.{adapter_name}."
        expected = {
            name.replace(infix, ".prompt_pool.").replace(copies, "."): tensor
            for name, tensor in model.state_dict().items()
            if infix in name or copies in name
        }
        found = {name.replace(copies, "."): tensor for name, tensor in state_dict.items()}
        # The checksum is that of one file; the adapter may take in others later (a trainer's best checkpoint).
        sha256, config.state.weights_sha256 = config.state.weights_sha256, None
        check_tensors(found, expected, sha256 if config.verify else None)
        return {name.replace(".prompt_pool.", infix): tensor for name, tensor in state_dict.items()}


def _most_confident(logits: Tensor, images: int) -> Tensor:
    """Row of the most confident candidate of each image, for logits [images * candidates, C]."""
    confidence = logits.softmax(1).amax(1).view(images, -1)
    first = torch.arange(images, device=logits.device) * confidence.shape[1]
    return first + confidence.argmax(1)
