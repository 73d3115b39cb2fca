"""A-GEM: averaged gradient episodic memory."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_prompts.baselines.gem import EpisodicMemory


class AGEM(EpisodicMemory):
    """No step may raise the mean loss of the remembered images.

    Chaudhry et al., "Efficient Lifelong Learning with A-GEM", ICLR 2019. With g the gradient of the new images' loss and
    g_ref that of the remembered images in the batch, if <g, g_ref> < 0 the step uses

        g' = g - <g, g_ref> / <g_ref, g_ref> g_ref   (equation 11)

    Args:
        backbone: see `Baseline`.
        options: see `Baseline`.
    """

    name = "a_gem"

    def constraint_of(self, task: Tensor) -> Tensor:
        """One constraint for all earlier tasks: 0 [B] for every `task` [B]."""
        return torch.zeros_like(task)

    def project(self, gradient: Tensor, references: Tensor) -> Tensor:
        """The gradient of the step; see `EpisodicMemory`, with its `gradient` and `references`."""
        reference = references[0]
        slope = gradient @ reference
        return gradient if slope >= 0 else gradient - slope / (reference @ reference) * reference
