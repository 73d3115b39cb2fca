"""VPT-NSP2: visual prompt tuning in null space (Lu et al., NeurIPS 2024).

Each block has L prompt rows, the same for all images, as in VPT-deep (`methods/vpt/pool.py`). From the second task on

    loss  = CE(logits / T) + lambda * sum over blocks of the mean over rows of
            |mean(p) - mean(p_prev)| + |std(p) - std(p_prev)|         p_prev: at the end of the task before
    step  u [L, D] of an optimizer becomes B2 u B1  (`shared/null_space.py`)

C1 is the second moment of q_h W_k,h, C2 that of the attention on the L rows, both over images, heads and tokens; q_h is a
token's query in head h and W_k,h the key weight of that head. A step in their null space does not change the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_prompts.interfaces import AttentionSeen, BackboneShape, LossPart, PoolInput, PrefixKV, Prompts
from cl_prompts.methods.shared.initialization import initial
from cl_prompts.methods.shared.null_space import ProjectedPool


class VPTNSP2Pool(ProjectedPool):
    """The pool.

    Tensors: `prompts` [layers, L, D], trained by every task; `previous`, those at the end of the task before; the matrices
    of `ProjectedPool`, with n = L.
    """

    roles: ClassVar[dict[str, str]] = {"prompts": "prompts"}
    previous: Tensor

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        layers = range(shape.num_layers) if config.layers is None else config.layers
        super().__init__(config, shape, layers, config.prompt_length)
        self.prompts = initial(config.prompt_init, len(self.layers), config.prompt_length, shape.width)
        self.register_buffer("previous", torch.zeros_like(self.prompts))

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """Keep a copy of the prompts."""
        super().begin_task(class_indices)
        self.previous = self.prompts.detach().clone()

    def forward(self, batch: PoolInput) -> Prompts:
        """Each block's prompts, and from the second task on the losses of their distribution."""
        rows = self.prompts[:, None].expand(-1, batch.batch_size, -1, -1)
        answer = Prompts(prefixes={n: PrefixKV(own, own, normed=True) for n, own in zip(self.layers, rows, strict=True)})
        if batch.task and self.config.distribution_weight:
            for name, now, before in (
                ("prompt_mean", self.prompts.mean(-1), self.previous.mean(-1)),
                ("prompt_std", self.prompts.std(-1, correction=0), self.previous.std(-1, correction=0)),
            ):
                moved = (now - before).abs().mean(1).sum()
                answer.losses[name] = LossPart(self.config.distribution_weight * moved, "batch")
        return answer

    def moments(self, seen: AttentionSeen, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `ProjectedPool`."""
        queries, attention = seen.queries[valid].float(), seen.prefix_attention()[valid]
        by_head = torch.einsum("bhnd,bhne->hde", queries, queries)
        first = torch.einsum("hdx,hde,hey->xy", seen.key_weight, by_head, seen.key_weight)
        rows = attention.flatten(0, 2)
        return first, rows.T @ rows, valid.sum() * queries.shape[1] * queries.shape[2]

    def update_projections(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """A step [layers, L, D] becomes B2 u B1."""
        found = self.projections()
        if found is None:
            return {}
        first, second = found
        return {"prompts": lambda step: second @ step @ first}

    def prompt_table(self) -> Tensor:
        """[layers, 1, L, D]."""
        return self.prompts[:, None]
