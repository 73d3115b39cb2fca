"""Noise on the gates of CPG in training, as the paper has it (Shazeer et al., ICLR 2017).

With z = W q the scores of an image, W_n [M, D] the trained noise gate and n normal draws, the gates are those of

    z' = z + n s,   s = softplus(W_n q) + 0.01

and an expert's load, a count without noise, is the sum over images of the probability that it is used if its noise is drawn
again: Phi((z - t) / s), t the value that it must exceed to be among the K largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.methods.shared.selection import top_k


SMALLEST = 0.01  # standard deviation of the noise


@dataclass(frozen=True)
class GateNoise:
    """The noise of one block in one training step.

    Args:
        gate: W_n [M, D].
        draws: n [B, M].
        valid: True for real images, False for padding [B].
        weight: of the block's balance losses.
    """

    gate: Tensor
    draws: Tensor
    valid: Tensor
    weight: float

    def spread(self, query: Tensor) -> Tensor:
        """s for queries [B, D]: [B, M]."""
        return F.softplus(query @ self.gate.T) + SMALLEST


def soft_load(scores: Tensor, noisy: Tensor, spread: Tensor, k: int) -> Tensor:
    """Probability that an image uses each expert, for z, z' and s [B, M]: [B, M].

    As in the released code, t is a softmax probability of z', where z and z' are not.
    """
    p = noisy.softmax(-1)
    if k == p.shape[-1]:
        return torch.ones_like(p)
    ranked = p.gather(-1, top_k(p.detach(), k + 1))
    last_used, next_one = ranked[:, k - 1 : k], ranked[:, k:]
    threshold = torch.where(noisy > next_one, next_one, last_used)
    return torch.special.ndtr((scores - threshold) / spread)


def normal_draws(*size: int, rank: int, device: torch.device) -> Tensor:
    """Normal draws of a training step, other ones on each process.

    They follow from one number of torch's CPU generator. So a run that goes on with the state of that generator draws the
    same again, and generators of processes that were at the same state stay so.
    """
    seed = int(torch.randint(2**62, (), device="cpu"))
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + rank), device="cpu").to(device)
