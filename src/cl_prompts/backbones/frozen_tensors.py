"""The tensors of a base that is not dense and in memory: offloaded by Accelerate, quantized, sharded or sparse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
_PLAIN = (str, int, float, torch.dtype, type(None))


def stored_tensor(model: nn.Module, name: str, tensor: Any) -> Any:
    """A tensor of a model, given its name; one that Accelerate has offloaded is read from where its hooks keep it.

    Raises:
        ValueError: it is on the meta device, and no hook knows its values.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_meta:
        return tensor
    path = name.split(".")
    for depth in reversed(range(len(path))):  # its own module first, then the modules around it
        for hook in _hooks(model.get_submodule(".".join(path[:depth]))):
            try:
                return hook.weights_map[".".join(path[depth:])]
            except (AttributeError, KeyError, TypeError):
                continue
    raise ValueError(f"{name} is on the meta device, without values")


def execution_device(model: nn.Module) -> torch.device:
    """The device on which a model runs: that of its parameters or, for offloaded ones, the one that Accelerate moves to."""
    parameter = next(model.parameters(), None)
    if parameter is None or not parameter.is_meta:
        return torch.device("cpu") if parameter is None else parameter.device
    for module in model.modules():
        for hook in _hooks(module):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    return parameter.device


@contextmanager
def kept_offloaded(model: nn.Module) -> Iterator[None]:
    """Until the block ends, PEFT leaves an offloaded model to Accelerate's hooks.

    PEFT would remove the hooks, without which the weights cannot be read, and put others on the model and the adapter.
    """
    placed = vars(model).pop("hf_device_map", None)
    try:
        yield
    finally:
        if placed is not None:
            model.hf_device_map = placed


def dense_parts(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The numbers in an entry of a state dict, as dense tensors with names.

    Raises:
        TypeError: the entry is neither a tensor nor made of tensors.
    """
    if isinstance(value, (tuple, list)):
        for number, entry in enumerate(value):
            yield from dense_parts(f"{name}.{number}", entry)
    elif isinstance(value, _PLAIN):
        yield f"{name}={value}", torch.empty(0)
    elif not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, not a tensor")
    elif hasattr(value, "full_tensor"):
        # A process holds a part of each sharded block (cl_prompts.tuner.sharding); all processes gather the whole together.
        yield from dense_parts(name, value.full_tensor())
    elif value.is_quantized:
        yield name, value.dequantize()
    elif value.layout is not torch.strided:
        yield name, value.to_dense()
    elif hasattr(value, "__tensor_flatten__"):  # a subclass that wraps others, like the quantized tensors of torchao
        for inner in value.__tensor_flatten__()[0]:
            yield from dense_parts(f"{name}.{inner}", getattr(value, inner))
    else:
        yield name, value.detach()


def precision(model: nn.Module) -> str:
    """The kinds of numbers of a model, the most frequent one first, like "bfloat16" or, if quantized, "qint8+float32"."""
    counts: Counter[str] = Counter()
    state = model.state_dict()
    for name, value in state.items():
        packed = state.get(f"{name.rpartition('.')[0]}.dtype")  # of a dynamically quantized layer
        for tensor in () if ".modules_to_save." in name else _tensors(value):
            plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ or hasattr(tensor, "full_tensor")
            kind = str(tensor.dtype).removeprefix("torch.") if plain else type(tensor).__name__
            if packed is torch.float16:  # the values are kept as float32
                kind = "dynamic_float16"
            if tensor.is_floating_point() or tensor.is_quantized or tensor.dtype in (torch.int8, torch.uint8):
                counts[kind] += tensor.numel()
    return "+".join(kind for kind, _ in counts.most_common())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, (tuple, list)):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, Tensor):
        yield value


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Accelerate's hooks on a module."""
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,)))
