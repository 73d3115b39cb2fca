"""Random tensors that depend on their seed alone."""

import torch
from torch import Tensor


def draw(*size: int, seed: int = 0) -> Tensor:
    """Normal values."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *size: int, seed: int = 0) -> Tensor:
    """Integers below `high`."""
    return torch.randint(high, size, generator=torch.Generator().manual_seed(seed))
