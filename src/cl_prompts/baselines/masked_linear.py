"""Linear layers of a backbone whose weights a pass may mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.backbones.feature_extractor import FeatureExtractor


# What the masked layers of the pass in progress compute, from the layer and its input; None: what they always do.
Compute = Callable[["MaskedLinear", Tensor], Tensor]
RUNNING: ContextVar[Compute | None] = ContextVar("masked_linear", default=None)


class MaskedLinear(nn.Linear):
    """A linear layer that computes what the pass in progress says.

    A layer of a backbone gets this class in place, so that names, tensors and files stay as they are. A context variable
    instead of an attribute, so that two threads do not see the masks of one another.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Inputs [..., in] -> outputs [..., out]."""
        compute = RUNNING.get()
        return super().forward(input) if compute is None else compute(self, input)


def masked_linear_layers(features: FeatureExtractor) -> dict[str, MaskedLinear]:
    """The linear layers in the blocks of a backbone by name, made `MaskedLinear` in place.

    Raises:
        TypeError: it has none, or they are quantized.
    """
    blocks = tuple(f"{block}." for block in features.structure.blocks)
    found = {}
    for name, module in features.base.named_modules():
        if name.startswith(blocks) and type(module) in (nn.Linear, MaskedLinear):
            module.__class__ = MaskedLinear
            found[name] = module
    if not found:
        raise TypeError(f"the blocks of {type(features.base).__name__} have no plain linear layers, whose weights to mask")
    return found


@contextmanager
def computing(compute: Compute) -> Iterator[None]:
    """Within this context masked layers compute what `compute` returns."""
    token = RUNNING.set(compute)
    try:
        yield
    finally:
        RUNNING.reset(token)


def with_masks(masks: Mapping[nn.Module, Tensor]) -> Compute:
    """Layers that use their weight times their mask in `masks` [out, in], and the whole weight without one."""

    def compute(layer: MaskedLinear, input: Tensor) -> Tensor:
        weight = layer.weight * masks[layer] if layer in masks else layer.weight
        return F.linear(input, weight, layer.bias)

    return compute
