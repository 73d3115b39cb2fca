"""Initial values of prompts and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def initial(init: str, *size: int) -> nn.Parameter:
    """A new trainable tensor.

    Args:
        init: "uniform" U(-1, 1), "unit_uniform" U[0, 1), "small_uniform" U[0, 0.01), "normal" (std 0.02), "zeros", or
            "lower_layer": the first slice of the first axis is "uniform", each other one is the slice before plus normal
            noise (std 0.02).
        size: its shape.
    """
    values = torch.empty(*size)
    if init in ("uniform", "lower_layer"):
        values.uniform_(-1.0, 1.0)
    elif init == "unit_uniform":
        values.uniform_(0.0, 1.0)
    elif init == "small_uniform":
        values.uniform_(0.0, 0.01)
    elif init == "normal":
        values.normal_(std=0.02)
    else:
        values.zero_()
    if init == "lower_layer":
        values[1:].normal_(std=0.02)
        values = values.cumsum(0)
    return nn.Parameter(values)


def gram_schmidt(rows: Tensor, earlier: Tensor) -> Tensor:
    """Initial values of new CODA-Prompt components: random rows, orthogonalized to all rows before them, of length 1.

    One pass of classical Gram-Schmidt, as in the released code: all projections are taken of the raw row. A row that has no
    orthogonal part left (more rows than dimensions) keeps its random direction.

    Args:
        rows: random rows [n, F].
        earlier: rows in use, of any length [m, F]; rows of zeros are ignored.

    Returns:
        [n, F].
    """
    lengths = earlier.square().sum(1)
    used = (lengths > 0).sum()
    rests = rows - (rows @ earlier.T / lengths.clamp_min(1e-12)) @ earlier
    done: list[Tensor] = []
    for row, rest in zip(rows, rests, strict=True):
        rest = rest - sum((other @ row) * other for other in done)
        # Rows that span the space leave rounding noise or, if some of them are not orthogonal, a copy of one of them.
        room = used + len(done) < row.numel()
        rest = torch.where(room & (rest.norm() > 1e-4 * row.norm()), rest, row)
        done.append(rest / rest.norm().clamp_min(1e-12))
    return torch.stack(done)
