"""Dynamically quantized linear layers (`torch.ao.nn.quantized.dynamic.Linear`), which have no backward of their own."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn


QUANTIZED_LAYERS = "torch.ao.nn.quantized."  # where torch defines modules with packed weights


def install(model: nn.Module) -> list[Any]:
    """Let gradients pass every quantized linear layer of a model; returns the handles of the hooks."""
    return [
        m.register_forward_hook(_with_backward) for m in _quantized(model).values() if callable(getattr(m, "weight", None))
    ]


def with_quantized_entries(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """A state dict for a model, together with the entries of its quantized layers.

    These look for their entries, and the version of these, in every state dict that is loaded, and raise KeyError.
    """
    layers = _quantized(model)
    if not layers:
        return state_dict
    entries: Any = OrderedDict()
    entries._metadata = OrderedDict()
    for name, module in layers.items():
        module.state_dict(destination=entries, prefix=f"{name}.")
    entries.update(state_dict)
    found: dict[str, Any] = entries
    return found


def _quantized(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if type(m).__module__.startswith(QUANTIZED_LAYERS)}


def _with_backward(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    if torch.is_grad_enabled() and args[0].requires_grad:
        passed: Tensor = _PassGradient.apply(args[0], output.detach(), module)
        return passed
    return None


class _PassGradient(torch.autograd.Function):
    """The output of a quantized layer, with the gradient of a linear layer of its dequantized weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, module: Any) -> Tensor:
        ctx.module = module
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight: Tensor = ctx.module.weight().dequantize()
        return gradients[0] @ weight.to(gradients[0].dtype), None, None
