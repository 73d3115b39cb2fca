"""Storages of their own for the empty tensors of a state dict."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def give_empty_tensors_storage(module: nn.Module) -> None:
    """Give each empty tensor in the state dicts of a module a storage of its own, with an address of its own.

    Accelerate takes tensors whose storages have equal addresses for shared ones and saves only the first of them. Storages
    of no bytes all have address 0, so its `load_state` would miss the other empty tensors.

    Args:
        module: gets a hook on its `state_dict`.
    """
    module.register_state_dict_post_hook(_own_storages)


def _own_storages(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    own = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    if any(isinstance(tensor, nn.Parameter) for tensor in own.values()):
        return  # keep_vars=True: the caller wants the module's own tensors, not their values
    for name, tensor in own.items():
        if not tensor.numel() and not tensor.is_meta:
            state[name] = _at_an_address(tensor)


def _at_an_address(tensor: Tensor) -> Tensor:
    """An empty tensor like `tensor`, whose storage has no bytes but an address, and keeps that address from others."""
    storage = tensor.new_empty(1).untyped_storage()[0:0]
    return tensor.new_empty(0).set_(storage).view(tensor.shape)
