"""Checks that a config, a base model and an adapter fit each other."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from cl_prompts.backbones.structure import Structure, cls_position_embedding
from cl_prompts.interfaces import BackboneShape
from cl_prompts.learner.checks import check_wrapper
from cl_prompts.methods import PromptPoolConfig
from cl_prompts.runtime.distributed import world_size
from cl_prompts.runtime.text import first_line, plain_text, short_repr
from cl_prompts.storage.integrity import SAVED_PREFIX, WEIGHTS_FILE, Declared, check_shapes
from cl_prompts.tuner.adapter import PoolAdapter


def check_fits(config: PromptPoolConfig, model: nn.Module, structure: Structure, pooling: str) -> None:
    """Raise ValueError if a config names blocks that the base lacks, or its adapter was made for a base of other sizes."""
    depth = structure.shape.num_layers
    layers = [layer for name in ("layers", "g_layers", "e_layers") for layer in getattr(config, name, None) or []]
    outside = [layer for layer in layers if layer >= depth]
    if outside:
        raise ValueError(f"layers {short_repr(outside)} are out of range: the base has {depth} blocks, 0 to {depth - 1}")
    if getattr(config, "add_cls_position_embedding", None) and cls_position_embedding(model, structure) is None:
        raise ValueError(
            f"add_cls_position_embedding=True, but {type(model).__name__} has no position embedding of a CLS token: "
            "leave it at None"
        )
    state = config.state
    for what, expected, actual in (
        ("width", state.base_width, structure.shape.width),
        ("number of blocks", state.base_layers, depth),
        ("number of heads", state.base_heads, structure.shape.num_heads),
        ("feature", state.pooling, pooling),
    ):
        if expected is not None and expected != actual:
            raise ValueError(
                f"the adapter was made for a base of {what} {expected}, this one has {actual}: load it on "
                f"{_base_named(config)}"
            )


def _base_named(config: PromptPoolConfig) -> str:
    name = config.base_model_name_or_path
    return short_repr(name) if name else "the base it was trained on"


def check_base(config: PromptPoolConfig, actual: str) -> None:
    """Warn, or with `strict_base` raise ValueError, if the base's fingerprint is not that of the adapter's base."""
    expected = config.state.base_fingerprint
    if expected is not None and actual != expected:
        text = (
            f"the adapter was trained on a base with fingerprint {plain_text(expected[:12])}, this one has {actual[:12]}: "
            f"same shape, other weights. Load {_base_named(config)}"
        )
        if config.strict_base:
            raise ValueError(text)
        warnings.warn(text + ", or expect worse answers", stacklevel=2)


def planned_adapter(config: PromptPoolConfig, shape: BackboneShape, pooling: str) -> PoolAdapter:
    """Build the adapter of a config on the meta device, without allocating memory.

    Raises:
        ValueError: its tensors exceed `max_adapter_bytes`, or differ from those that the file to be loaded declares.
    """
    # Building the head makes a list of all classes, so the head's size is checked first.
    classes = config.num_labels or len(config.state.classes)
    size = classes * (4 * shape.width + 4)
    if size <= config.max_adapter_bytes:
        if config.declared is not None:
            _check_rows(classes, config.declared)
        try:
            with torch.device("meta"):
                planned = PoolAdapter(config, shape, pooling)
            tensors = [*planned.parameters(), *planned.buffers()]
            size = sum(t.numel() * t.element_size() for t in tensors)
            if planned.classifier is not None and not config.inference_mode:
                size += planned.classifier.bytes_to_learn
        except (RuntimeError, OverflowError, TypeError) as error:  # torch raises all three for sizes beyond int64
            reason = first_line(error)
            raise ValueError(f"the config implies tensors of impossible size ({reason}): choose smaller values") from error
    if size > config.max_adapter_bytes:
        raise ValueError(
            f"the config implies {size:,} bytes of tensors, more than max_adapter_bytes={config.max_adapter_bytes:,}: "
            "raise that limit if you trust the adapter"
        )
    if config.declared is not None:
        expected = {f"{SAVED_PREFIX}{name}": tensor for name, tensor in planned.state_dict().items()}
        # With modules_to_save the file also has copies of the base's modules; they are checked after PEFT has made them.
        declared = {n: d for n, d in config.declared.items() if n in expected or not config.modules_to_save}
        check_shapes(declared, expected)
    return planned


def _check_rows(classes: int, declared: Mapping[str, Declared]) -> None:
    rows = max((tensor.shape[0] for tensor in declared.values() if tensor.shape), default=0)
    if classes > rows:
        raise ValueError(
            f"the config has {classes} classes, but no tensor in {WEIGHTS_FILE} has more than {rows} rows: are both files "
            "from the same save?"
        )


def check_ready(adapter: PoolAdapter, *, learning: bool) -> None:
    """Raise ValueError if an adapter is not ready for a forward or, if `learning`, for a training forward."""
    if not adapter.classes:
        raise ValueError("no class is known yet: call begin_task(classes), or set num_labels in the config")
    dtype = adapter.head.weight.dtype
    if dtype != torch.float32:
        raise ValueError(
            f"the adapter was cast to {dtype}, but prompts and head work in float32: cast the base alone, "
            "model.get_base_model().to(dtype), or run under torch.autocast"
        )
    if not learning:
        return
    adapter.tasks.check_training()
    if adapter.config.needs_optimizer and not adapter.update_scaler.attached:
        raise ValueError(
            'this config scales the optimizer\'s steps (modulate="update"): call model.attach_optimizer(optimizer) after '
            "begin_task"
        )
    adapter.update_scaler.check_trains(adapter.named_parameters())
    if adapter.grown and world_size() > 1:
        check_wrapper(adapter)
        adapter.grown = False
