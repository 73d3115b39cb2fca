"""CPG: consistent mixture-of-experts prompt generator (Lu et al., AAAI 2025).

Each block has M experts P_m [L, D] and a gate W [M, D], shared by all tasks. For an image, with q the CLS token that enters
the block, before its norm:

    p = softmax(W q),  a = the K largest      g = softmax of the K probabilities p_a, 0 elsewhere
    prompt = sum over m of g_m P_m            L rows of the block, as in VPT-deep (`methods/vpt/pool.py`)
    loss = CE(logits / T) + c * mean over blocks of cv2(sum over images of g) + cv2(images that use an expert)

cv2 is the unbiased variance over the experts divided by the squared mean; the second one has no gradient. From the second
task on an optimizer's step u becomes u B1 for W, B2 u for the experts (`shared/null_space.py`), with the second moments of
q for B1 and of g for B2. With `gate_noise`, W q is noisy in training (`noise.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.interfaces import AttentionSeen, BackboneShape, LossPart, PoolInput, PrefixKV, Prompts
from cl_prompts.methods.cpg.noise import GateNoise, normal_draws, soft_load
from cl_prompts.methods.shared.initialization import initial
from cl_prompts.methods.shared.null_space import ProjectedPool
from cl_prompts.methods.shared.selection import top_k
from cl_prompts.runtime.distributed import process_number, sum_over_processes, sum_with_gradient


EPSILON = torch.finfo(torch.float32).eps


def gates_of(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The experts that an image uses and their gate values, largest first, for scores W q [..., M]: two of [..., k].

    Of equal probabilities the lower number is first.
    """
    p = scores.softmax(-1)
    ids = top_k(p.detach().flatten(0, -2), k).view(*p.shape[:-1], k)
    return ids, p.gather(-1, ids).softmax(-1)


def gate_values(scores: Tensor, valid: Tensor, k: int) -> Tensor:
    """Gate values g of all experts for scores W q [B, ..., M]; zero for images that are not `valid` [B]."""
    real = valid.view(-1, *[1] * (scores.dim() - 1))
    ids, weights = gates_of(torch.where(real, scores, 0.0), k)
    return torch.zeros_like(scores).scatter(-1, ids, weights) * real


def balance(values: Tensor) -> Tensor:
    """Squared coefficient of variation over the last axis of `values` [..., M]."""
    return values.var(-1) / (values.mean(-1).square() + EPSILON)


def query_of(block_input: Tensor, has_cls: bool) -> Tensor:
    """The query of a block for its input [B, N, D]: CLS or, without one, the mean of the tokens, float32 [B, D]."""
    tokens = block_input.float()
    return tokens[:, 0] if has_cls else tokens.mean(1)


@dataclass
class PromptGenerator:
    """Generates one block's prompts from the block's input; called inside the attention.

    Args:
        experts: [M, L, D].
        gate: [M, D].
        top_k: experts per image.
        has_cls: whether token 0 is a CLS token.
        noise: of this training step; None: none.
    """

    experts: Tensor
    gate: Tensor
    top_k: int
    has_cls: bool
    noise: GateNoise | None = None

    def __call__(self, block_input: Tensor, queries: Tensor) -> PrefixKV:
        """The prefix of each image for a block input [B, N, D], computed in float32."""
        with torch.autocast(block_input.device.type, enabled=False):
            query = query_of(block_input, self.has_cls)
            scores = query @ self.gate.T
            losses: dict[str, LossPart] = {}
            if self.noise is not None:
                scores, losses = self._with_noise(scores, self.noise, self.noise.spread(query))
            ids, weights = gates_of(scores, self.top_k)
            mixed = F.embedding_bag(ids, self.experts.flatten(1), per_sample_weights=weights, mode="sum")
            rows = mixed.view(-1, *self.experts.shape[1:])
        return PrefixKV(rows, rows, normed=True, ids=ids, weights=weights.detach(), scores=scores, losses=losses)

    def _with_noise(self, scores: Tensor, noise: GateNoise, spread: Tensor) -> tuple[Tensor, dict[str, LossPart]]:
        """The noisy scores [B, M], and the balance losses of the global batch."""
        noisy = scores + noise.draws * spread
        if not noise.weight:
            return noisy, {}
        real = noise.valid[:, None]
        known = [torch.where(real, values, 1.0) for values in (scores, noisy, spread)]  # whatever padding holds
        load = soft_load(known[0], known[1], known[2], self.top_k) * real
        sums = sum_with_gradient(torch.stack([gate_values(noisy, noise.valid, self.top_k), load]).sum(1))
        return noisy, {"balance": LossPart(noise.weight * balance(sums).sum(), "batch")}


class CPGPool(ProjectedPool):
    """The pool.

    Tensors: `experts` [layers, M, L, D], `gate` and, with `gate_noise`, `noise_gate` [layers, M, D], trained by every task;
    the matrices of `ProjectedPool`, with n = M.
    """

    roles: ClassVar[dict[str, str]] = {"experts": "prompts", "gate": "routers", "noise_gate": "routers"}

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        layers = range(shape.num_layers) if config.layers is None else config.layers
        super().__init__(config, shape, layers, config.pool_size)
        self.experts = initial(config.prompt_init, len(self.layers), config.pool_size, config.prompt_length, shape.width)
        self.gate = initial(config.router_init, len(self.layers), config.pool_size, shape.width)
        if config.gate_noise:
            self.noise_gate = nn.Parameter(torch.zeros_like(self.gate))

    def forward(self, batch: PoolInput) -> Prompts:
        """One generator per block."""
        k, has_cls = self.config.top_k, self.shape.has_cls
        blocks = zip(self.layers, self.experts, self.gate, self._noise(batch), strict=True)
        return Prompts(prefixes={n: PromptGenerator(e, gate, k, has_cls, noise) for n, e, gate, noise in blocks})

    def _noise(self, batch: PoolInput) -> list[GateNoise | None]:
        """The noise of each block, in training."""
        count, config = len(self.layers), self.config
        if batch.task is None or not config.gate_noise:
            return [None] * count
        valid = torch.ones(batch.batch_size, dtype=torch.bool) if batch.valid is None else batch.valid
        size, device = (count, batch.batch_size, config.pool_size), self.gate.device
        draws = normal_draws(*size, rank=process_number(), device=device)
        weight = config.balance_weight / count
        return [GateNoise(*own, valid.to(device), weight) for own in zip(self.noise_gate, draws, strict=True)]

    def regularizers(self, scores: Tensor | None, valid: Tensor) -> dict[str, LossPart]:
        """As in `PromptPool`, and the balance losses of the global batch. `scores` are W q [B, layers, M].

        With noise they are losses of the blocks, which know it.
        """
        parts = super().regularizers(scores, valid)
        if self.config.balance_weight and scores is not None and not self.config.gate_noise:
            gates = gate_values(scores, valid, self.config.top_k)
            load = sum_over_processes((gates.detach() > 0).float().sum(0))
            value = balance(sum_with_gradient(gates.sum(0))) + balance(load)
            parts["balance"] = LossPart(self.config.balance_weight * value.mean(), "batch")
        return parts

    def moments(self, seen: AttentionSeen, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `ProjectedPool`."""
        ids, weights = seen.prefix.ids, seen.prefix.weights
        assert ids is not None
        assert weights is not None
        query = query_of(seen.block_input, self.shape.has_cls)[valid]
        gates = torch.zeros(len(ids), self.config.pool_size, device=ids.device).scatter(1, ids, weights)[valid]
        return query.T @ query, gates.T @ gates, valid.sum()

    def update_projections(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """A step [layers, M, D] of the gates becomes u B1, one of the experts [layers, M, L, D] B2 u."""
        found = self.projections()
        if found is None:
            return {}
        first, second = found
        return {
            "gate": lambda step: step @ first,
            "experts": lambda step: (second @ step.flatten(2)).view_as(step),
        }

    def prompt_table(self) -> Tensor:
        """[layers, M, L, D]."""
        return self.experts
