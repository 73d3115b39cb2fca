"""A device "mps" on a machine that has none: its tensors are those of the CPU with a mark, and none may be of float64."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map


MPS, CPU = torch.device("mps"), torch.device("cpu")
DEVICE: Callable[..., Any] = Tensor.device.__get__  # type: ignore[attr-defined]


class OnApple(Tensor):
    """A tensor that says that it is on "mps"."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone()
        made = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo.setdefault(id(self), made)


class AppleDevice(TorchFunctionMode):
    """Within this context `device="mps"` works. As there, float64 and arrays of NumPy raise a TypeError.

    Operations may mix devices here, other than there.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs))
        there = any(isinstance(x, OnApple) for x in given)
        if func == DEVICE:
            return MPS if there else CPU
        if func in (torch.device, torch._C._nn._parse_to):  # the latter reads the arguments of Module.to
            return func(*args, **kwargs or {})
        if there and func is Tensor.numpy:
            raise TypeError("can't convert mps:0 device type tensor to numpy: use Tensor.cpu() first")
        asked = [x for x in given if _is_device(x)]
        if func is Tensor.cpu:
            there = False
        elif asked:
            there = torch.device(asked[0]).type == "mps"
        elif func in (Tensor.to, Tensor.type_as) and len(args) > 1 and isinstance(args[1], Tensor):
            there = isinstance(args[1], OnApple)
        elif func in (Tensor.to, Tensor.copy_):
            there = isinstance(args[0], OnApple)
        args, kwargs = tree_map(lambda x: CPU if _is_device(x) else x, (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return tree_map(lambda x: _marked(x, there) if isinstance(x, Tensor) else x, func(*args, **kwargs))


def _is_device(given: Any) -> bool:
    return isinstance(given, torch.device) or (isinstance(given, str) and given in ("mps", "cpu"))


def _marked(tensor: Tensor, there: bool) -> Tensor:
    if there and tensor.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    if there == isinstance(tensor, OnApple):
        return tensor
    return tensor.as_subclass(OnApple if there else Tensor)


@contextmanager
def apple_device() -> Iterator[torch.device]:
    """`AppleDevice`, with modules that move by new parameters; gives the device."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with AppleDevice():
            yield MPS
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
