"""Checks that a config, a base model and an adapter fit each other."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.backbones.fingerprint import fingerprint
from cl_prompts.backbones.frozen_tensors import DTYPES, precision
from cl_prompts.backbones.structure import Structure, cls_position_embedding
from cl_prompts.interfaces import BackboneShape
from cl_prompts.learner.checks import check_wrapper
from cl_prompts.methods import PromptPoolConfig
from cl_prompts.runtime.distributed import world_size
from cl_prompts.runtime.text import first_line, plain_text, short_repr
from cl_prompts.storage.declared import WEIGHTS_FILE, Declared
from cl_prompts.storage.integrity import SAVED_PREFIX, check_shapes
from cl_prompts.tuner.adapter import PoolAdapter


def check_fits(config: PromptPoolConfig, model: nn.Module, structure: Structure, pooling: str) -> None:
    """Raise ValueError if a config names blocks that the base lacks, or its adapter was made for a base of other sizes."""
    depth = structure.shape.num_layers
    layers = [layer for name in ("layers", "g_layers", "e_layers") for layer in getattr(config, name, None) or []]
    outside = [layer for layer in layers if layer >= depth]
    if outside:
        where = " in its last stage, which takes prompts" if structure.shape.windowed else ""
        raise ValueError(
            f"layers {short_repr(outside)} are out of range: the base has {depth} blocks{where}, 0 to {depth - 1}"
        )
    if getattr(config, "add_cls_position_embedding", None) and cls_position_embedding(model, structure) is None:
        raise ValueError(
            f"add_cls_position_embedding=True, but {type(model).__name__} has no position embedding of a CLS token: "
            "leave it at None"
        )
    accepted = {
        *signature(type(model).forward).parameters,
        *signature(type(model.get_submodule(structure.inner)).forward).parameters,
    }
    unknown = sorted({*(config.base_arguments or {}), *config.state.base_arguments} - accepted)
    if unknown:
        raise ValueError(
            f"base_arguments {short_repr(unknown)}: the forward of {type(model).__name__} takes no such argument"
        )
    if config.modules_to_save:
        for name, module in model.named_modules():
            if name.endswith(tuple(config.modules_to_save)) and any(p.is_meta for p in module.parameters()):
                raise ValueError(
                    f"modules_to_save: {name!r} of the base is offloaded and cannot be trained: keep it in memory"
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


def check_same_settings(config: PromptPoolConfig, saved: Mapping[str, Any], source: str) -> None:
    """Check that tensors of one model can be those of another.

    Args:
        config: of the model that gets them.
        saved: `settings` of the other's config; fields that it lacks are not compared.
        source: where they are from, for the message.

    Raises:
        ValueError: a field differs.
    """
    own = config.settings()
    other = [name for name, value in saved.items() if own.get(name) != value]
    if other:
        theirs, ours = ({name: values.get(name) for name in other} for values in (saved, own))
        raise ValueError(
            f"{source} is of a config with {short_repr(theirs)}, this model has {short_repr(ours)}: make the model with "
            "the same config"
        )


def check_same_adapter(own: PromptPoolConfig, saved: PromptPoolConfig, source: str) -> None:
    """Check that the tensors of a file can be read into an adapter that is there.

    Args:
        own: its config.
        saved: the config in the file.
        source: the file, for the message.

    Raises:
        ValueError: they have other tasks or settings.
    """
    if saved.state.tasks != own.state.tasks:
        raise ValueError(
            f"this adapter knows the tasks {own.state.tasks}, the one in {source} {saved.state.tasks}: load it under "
            "another name"
        )
    check_same_settings(own, saved.settings(), source)


def check_base(config: PromptPoolConfig, model: nn.Module, structure: Structure, pooling: str) -> None:
    """Warn, or with `strict_base` raise ValueError, if the base has other weights than the adapter's, or another precision.

    A base whose fingerprint cannot be computed passes with the warning of `fingerprint`, but not with `strict_base`.
    """
    expected, trained = config.state.base_fingerprint, config.state.base_precision
    actual = None if expected is None else fingerprint(model, structure, pooling)
    if actual is not None and actual == expected:
        return
    found = precision(model.get_submodule(structure.inner))
    if trained is not None and trained != found:
        text = f"the adapter was trained on a base in {trained}, this one is in {found}: another precision"
        if actual is not None and _contains(found, trained):
            same = fingerprint(model, structure, pooling, DTYPES[trained]) == expected
            text += " of the same weights" if same else ", and other weights"
        elif actual is not None:
            text += ", so that weights cannot be compared"
        text += f". Load {_base_named(config)} " + (
            f"with dtype=torch.{trained}" if trained in DTYPES else "and quantize it as in training"
        )
    elif actual is not None and expected is not None:
        text = (
            f"the adapter was trained on a base with fingerprint {plain_text(expected[:12])}, this one has {actual[:12]}: "
            f"same shape, other weights. Load {_base_named(config)}"
        )
    elif config.strict_base and expected is not None:
        raise ValueError("strict_base=True, but the weights of this base cannot be read and compared: load it in memory")
    else:
        return
    if config.strict_base:
        raise ValueError(text)
    warnings.warn(text + ", or expect worse answers", stacklevel=2)


def record_base(adapter: PoolAdapter, model: nn.Module, structure: Structure) -> None:
    """Write the base's fingerprint, precision and sizes into the state of an adapter that has none."""
    state, shape = adapter.config.state, structure.shape
    if state.base_fingerprint is None:
        state.base_fingerprint = fingerprint(model, structure, adapter.query_pooling)
        state.base_precision = precision(model.get_submodule(structure.inner))
        state.base_width, state.base_layers, state.base_heads = shape.width, shape.num_layers, shape.num_heads
        state.pooling = adapter.query_pooling


def _contains(wide: str, narrow: str) -> bool:
    """Whether a cast from one precision to the other gives back numbers that were cast the other way."""
    return wide in DTYPES and narrow in DTYPES and torch.promote_types(DTYPES[wide], DTYPES[narrow]) == DTYPES[wide]


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
            if planned.classifier is not None:
                size += planned.classifier.bytes_to_answer
                size += 0 if config.inference_mode else planned.classifier.bytes_to_learn
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


def check_trainable(adapter: PoolAdapter) -> None:
    """Raise ValueError if an adapter was loaded for inference, so that no parameter would be trained."""
    if adapter.config.inference_mode and not any(parameter.requires_grad for parameter in adapter.parameters()):
        raise ValueError("the adapter was loaded for inference: load it with is_trainable=True to train it")


def check_answerable(adapter: PoolAdapter, targets: Tensor | None) -> None:
    """Check that the classifier used at test can be measured on labels.

    Args:
        adapter: whose logits at test are measured.
        targets: index of the logit of each image's class [B], -100 for padding; None without labels.

    Raises:
        ValueError: a label is of a new class of the open task, for which a closed-form classifier has no logit before
            `consolidate`.
    """
    if targets is None or not adapter.awaits_consolidation or torch.compiler.is_compiling():
        return
    classes, earlier = adapter.classes, adapter.tasks.earlier_classes
    unknown = sorted({classes[index] for index in targets[targets >= 0].unique().tolist()} - earlier)
    if unknown:
        raise ValueError(
            f"labels {short_repr(unknown)} are of classes that the {adapter.config.head} head answers for only after "
            "model.consolidate(images): evaluate after it"
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
    check_trainable(adapter)
    adapter.tasks.check_training()
    if adapter.config.needs_optimizer and not adapter.update_scaler.attached:
        raise ValueError(
            f"{adapter.config.method} changes the optimizer's steps: call model.attach_optimizer(optimizer) after "
            "begin_task; with transformers.Trainer pass callbacks=[cl_prompts.hf_trainer.AttachOptimizer()]"
        )
    adapter.update_scaler.check_trains(adapter.named_parameters())
    adapter.check_open_task()
    if adapter.grown and world_size() > 1:
        check_wrapper(adapter)
        adapter.grown = False
