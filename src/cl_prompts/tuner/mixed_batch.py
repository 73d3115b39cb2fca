"""A batch with one adapter per image, as PEFT's LoRA has it: each adapter answers for its images, put back in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.backbones.input_checks import check_argument_names
from cl_prompts.backbones.own_arguments import OWN_ARGUMENTS
from cl_prompts.backbones.prompted_backbone import PromptedBackbone
from cl_prompts.interfaces import IGNORE_INDEX
from cl_prompts.outputs import PromptPoolOutput
from cl_prompts.runtime.text import short_repr
from cl_prompts.tuner.adapter import PoolAdapter
from cl_prompts.tuner.forward import prompted_forward


PER_IMAGE = ("logits", "prompt_ids", "prompt_weights", "scores", "query", "features")


def mixed_forward(
    backbone: PromptedBackbone,
    adapters: Mapping[str, PoolAdapter] | nn.ModuleDict,
    adapter_names: Any,
    kwargs: Mapping[str, Any],
    *,
    training: bool,
) -> PromptPoolOutput:
    """Answers of several adapters for the images of one batch.

    Args:
        backbone: the base model with its hooks.
        adapters: by name.
        adapter_names: the name of each image's adapter [B].
        kwargs: arguments of the forward, all by name.
        training: whether the model is in training.

    Returns:
        An output whose rows are those that each adapter gives its images alone. The logits of an image follow the classes
        of its adapter; those of adapters with fewer classes end in -inf. A field that differs in shape between the adapters
        is None. The loss is the mean over all images with a label.

    Raises:
        TypeError: `adapter_names` is not a list of names.
        ValueError: there is not one name per image, an adapter does not exist, the model is in training, or adapters have
            trained copies of the base's modules (`modules_to_save`).
    """
    images, labels = kwargs.get("pixel_values"), kwargs.get("labels")
    size = len(images) if isinstance(images, Tensor) and images.dim() else 0
    _check_names(adapter_names, adapters, size)
    if training:
        raise ValueError("adapter_names is not for training: a step trains one adapter, choose it with set_adapter(name)")
    if backbone.copied:
        raise ValueError(
            f"adapter_names cannot be used with modules_to_save, here {short_repr(backbone.copied)}: run one batch per "
            "adapter, after set_adapter(name)"
        )
    groups: list[tuple[Tensor, PromptPoolOutput]] = []
    for name in dict.fromkeys(adapter_names):
        members = [row for row, own in enumerate(adapter_names) if own == name]
        rows = torch.tensor(members, device=images.device)  # type: ignore[union-attr]
        own = {key: _rows_of(value, rows, size) for key, value in kwargs.items() if key != "return_dict"}
        adapter: Any = adapters[name]
        with prompted_forward(backbone, adapter, (), own, training=False):
            groups.append((rows, backbone.model(**own)))
    merged: dict[str, Any] = {name: _merged(name, groups, size) for name in PER_IMAGE}
    output = PromptPoolOutput(**merged, adapter_names=list(adapter_names))
    if labels is not None:
        counts = torch.stack([(labels[rows] != IGNORE_INDEX).sum() for rows, _ in groups])
        share = counts / counts.sum().clamp_min(1)
        if kwargs.get("num_items_in_batch") is not None:  # each loss is divided by it already
            share = torch.ones_like(share)
        losses = [answer.losses or {} for _, answer in groups]
        output.losses = {name: sum(w * part[name] for w, part in zip(share, losses, strict=True)) for name in losses[0]}
        output.loss = torch.stack(list(output.losses.values())).sum()
    return output


def check_disabled_forward(
    model: nn.Module,
    adapters: Mapping[str, PoolAdapter] | nn.ModuleDict,
    images: Any,
    adapter_names: Any,
    kwargs: Mapping[str, Any],
) -> None:
    """Check the arguments of a forward while the adapters are disabled.

    Args:
        model: the base.
        adapters: by name.
        images: images [B, 3, H, W].
        adapter_names: the name of each image's adapter [B], without effect; or None.
        kwargs: arguments of the base.

    Raises:
        TypeError: the base has no argument of a name in `kwargs`, or `adapter_names` is not a list of names.
        ValueError: there is not one name per image, or an adapter does not exist.
    """
    check_argument_names(model, kwargs, OWN_ARGUMENTS)
    if adapter_names is not None:
        _check_names(adapter_names, adapters, len(images))


def _check_names(names: Any, adapters: Mapping[str, PoolAdapter] | nn.ModuleDict, size: int) -> None:
    """Raise if `names` are not those of one of the `adapters` for each of `size` images."""
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names must be a list of names, one per image, got {short_repr(names)}")
    unknown = sorted({name for name in names if name not in adapters})
    if unknown:
        raise ValueError(f"no adapter is called {short_repr(unknown)}: there are {short_repr(sorted(adapters.keys()))}")
    if len(names) != size:
        raise ValueError(f"adapter_names has {len(names)} names for {size} images: give one per image")


def _rows_of(value: Any, rows: Tensor, size: int) -> Any:
    """The part of an argument that belongs to some images; arguments without one entry per image are left as they are."""
    if isinstance(value, Tensor) and value.dim() and len(value) == size:
        return value[rows.to(value.device)]
    if isinstance(value, (list, tuple)) and len(value) == size:
        return [value[row] for row in rows.tolist()]
    return value


def _merged(name: str, groups: Sequence[tuple[Tensor, PromptPoolOutput]], size: int) -> Tensor | None:
    parts = [(rows, answer.get(name)) for rows, answer in groups]
    values = [value for _, value in parts if value is not None]
    if name == "logits":
        widest = max(value.shape[1] for value in values)
        values = [nn.functional.pad(value, (0, widest - value.shape[1]), value=float("-inf")) for value in values]
    if len(values) < len(parts) or len({value.shape[1:] for value in values}) > 1:
        return None
    merged = values[0].new_empty(size, *values[0].shape[1:])
    for (rows, _), value in zip(parts, values, strict=True):
        merged[rows] = value
    return merged
