"""Prompts of a saved adapter in half precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cl_prompts.storage.integrity import SAVED_PREFIX


DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def with_prompts_in(
    dtype: torch.dtype, tensors: Mapping[str, Tensor], adapters: Any, names: Sequence[str]
) -> dict[str, Tensor]:
    """A model's tensors with the prompts of some adapters cast to `dtype`.

    Keys, routers, heads, statistics and counts stay as they are: a rounded key can select another prompt, and later tasks
    continue the statistics.

    Args:
        dtype: float16, bfloat16 or float32.
        tensors: the model's tensors by name.
        adapters: the `nn.ModuleDict` of the model's `PoolAdapter`s by name.
        names: adapters that are saved; names of others are ignored.

    Raises:
        ValueError: `dtype` is another one, or a prompt is too large for it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: prompts are saved in one of {[str(known) for known in DTYPES]}")
    cast = dict(tensors)
    for name in set(names) & set(adapters):
        for prompt in sorted(adapters[name].pool.prompt_names):
            key = f"{SAVED_PREFIX}{name}.pool.{prompt}"
            if key not in cast:
                continue
            full = cast[key]
            cast[key] = full.to(dtype)
            if (cast[key].isinf() & full.isfinite()).any():
                raise ValueError(
                    f"{prompt} holds {full.abs().max():.3g}, more than {torch.finfo(dtype).max:.3g}, the largest number of "
                    f"{dtype}: save with dtype=torch.bfloat16, or without dtype"
                )
    return cast
