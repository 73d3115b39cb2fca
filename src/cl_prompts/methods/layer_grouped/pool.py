"""Layer-grouped prompts (Jiang et al., "Teaching Prompts to Coordinate: Hierarchical Layer-Grouped Prompt Tuning", 2025).

arXiv 2511.12090. Our reading: no code is public, and we do not have the paper's equations. Each task t has a root prompt
R_t [2 (keys, values), L, D], a generator for each group of consecutive layers, a position embedding for each layer, and a
key K_t [D]:

    generator of group g:   G_g(x) = x + gelu(x A_g + a_g) B_g                    for each row
    prompt of layer l:      P_tl = G_g(l)(R_t) + E_l
    training:               P_t of the current task, loss = CE - lambda * cosine(q, K_t), mean over images
    test:                   sum over tasks of softmax(cosine(q, K) / tau)_t P_t

with the un-prompted feature q. A task's root, generators and embeddings start as copies of the previous task's; its key is
newly initialized. Those of earlier tasks are frozen, so that their prompts do not change. The generators have no bias after
B, because the position embeddings are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.interfaces import BackboneShape, LossPart, PoolInput, Prompts
from cl_prompts.methods.pool import PromptPool
from cl_prompts.methods.shared.initialization import initial
from cl_prompts.methods.shared.per_task import PerTask
from cl_prompts.methods.shared.prefixes import prefix_of
from cl_prompts.methods.shared.selection import cosine_scores


class LayerGroupedPool(PromptPool):
    """The pool of layer-grouped prompts.

    Tensors, each as `.current` (trained) and `.earlier` [tasks - 1, ...] (frozen), for G groups and bottleneck r: `root`
    [2, L, D], `down` [G, D, r], `bias` [G, r], `up` [G, r, D], `positions` [layers, 2, 1, D], `keys` [D].

    Attributes:
        groups: number of each layer's group.

    Raises:
        ValueError: there are more groups than layers.
    """

    roles: ClassVar[dict[str, str]] = {
        "root.current": "prompts",
        "down.current": "prompts",
        "bias.current": "prompts",
        "up.current": "prompts",
        "positions.current": "prompts",
        "keys.current": "keys",
    }
    no_rows: ClassVar[tuple[str, ...]] = ("down.current", "bias.current", "up.current", "positions.current")

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        self._layers = tuple(range(shape.num_layers) if config.layers is None else config.layers)
        depth, groups, width = len(self._layers), config.num_groups, shape.width
        if groups > depth:
            raise ValueError(f"num_groups={groups}: there are only {depth} layers to group; choose at most {depth}")
        self.groups = [g for g in range(groups) for _ in range(depth // groups + (g < depth % groups))]
        self.root = PerTask(initial(config.prompt_init, 2, config.prompt_length, width))
        self.down = PerTask(initial("normal", groups, width, config.bottleneck))
        self.bias = PerTask(initial("zeros", groups, config.bottleneck))
        self.up = PerTask(initial(config.generator_init, groups, config.bottleneck, width))
        self.positions = PerTask(initial(config.position_init, depth, 2, 1, width))
        self.keys = PerTask(initial(config.key_init, width))

    @property
    def layers(self) -> Sequence[int]:
        """The config's `layers`; all by default."""
        return self._layers

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """Freeze the tensors of the current task; the next task starts from copies of them, with a new key."""
        if self.num_tasks:
            for tensor in self._makers():
                tensor.next()
            self.keys.next(lambda earlier: initial(self.config.key_init, self.shape.width).detach())
        super().begin_task(class_indices)

    def _makers(self) -> tuple[PerTask, ...]:
        """The tensors that a task's prompts are made from."""
        return self.root, self.down, self.bias, self.up, self.positions

    def current_prompts(self) -> Tensor:
        """The current task's prompts [layers, 2, L, D], with gradient."""
        return self._made(*(tensor.current[None] for tensor in self._makers()))[0]

    def all_prompts(self) -> Tensor:
        """All tasks' prompts [tasks, layers, 2, L, D]."""
        # These are made from buffers, without gradient.
        earlier = self._made(*(tensor.earlier for tensor in self._makers()))
        return torch.cat([earlier, self.current_prompts()[None]])

    def _made(self, root: Tensor, down: Tensor, bias: Tensor, up: Tensor, positions: Tensor) -> Tensor:
        """Prompts [tasks, layers, 2, L, D] from tensors with a leading axis of tasks."""
        grouped = self._of_groups(root, down, bias, up)
        return torch.stack([grouped[:, group] for group in self.groups], 1) + positions

    def _of_groups(self, root: Tensor, down: Tensor, bias: Tensor, up: Tensor) -> Tensor:
        """Prompts of the groups of layers, without positions [tasks, groups, 2, L, D]."""
        hidden = F.gelu(torch.einsum("tpld,tgdr->tgplr", root, down) + bias[:, :, None, None])
        return root[:, None] + torch.einsum("tgplr,tgrd->tgpld", hidden, up)

    def _mixed(self, weights: Tensor) -> Tensor:
        """Prompts of all tasks, weighted by [B, tasks]: [B, layers, 2, L, D]. Groups are mixed before layers part."""
        *makers, positions = (tensor.all() for tensor in self._makers())
        grouped = torch.einsum("bt,tgpld->bgpld", weights, self._of_groups(*makers))
        places = torch.einsum("bt,tspld->bspld", weights, positions)
        return torch.stack([grouped[:, group] for group in self.groups], 1) + places

    def prompt_table(self) -> Tensor:
        """All tasks' prompts, keys and values as rows: [layers, tasks, 2 * L, D]."""
        return self.all_prompts().transpose(0, 1).flatten(2, 3)

    def key_table(self) -> Tensor | None:
        """[1, tasks, D]."""
        return self.keys.all()[None]

    def chosen_tasks(self, ids: Tensor, weights: Tensor | None, query: Tensor | None) -> Tensor | None:
        """The task with the largest weight."""
        return weights.argmax(1) if self.num_tasks and weights is not None else None

    def forward(self, batch: PoolInput) -> Prompts:
        """The current task's prompts in training, the mix of all tasks' prompts at test."""
        assert batch.query is not None
        if batch.task is None:
            scores = cosine_scores(batch.query, self.keys.all())
            weights = (scores / self.config.temperature).softmax(1)
            ids = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape[0], -1)
            rows = self._mixed(weights)
            answer = Prompts(ids=ids, weights=weights.detach(), scores=scores)
        else:
            rows = self.current_prompts().expand(batch.batch_size, -1, -1, -1, -1)
            cosine = cosine_scores(batch.query, self.keys.current[None])
            answer = Prompts(ids=torch.full_like(cosine, self.keys.earlier.shape[0], dtype=torch.int64))
            answer.weights = torch.ones_like(cosine)
            answer.losses["pull"] = LossPart(-self.config.pull_coefficient * cosine[:, 0], "mean")
        for place, layer in enumerate(self.layers):
            keys, values = rows[:, place].unbind(1)
            answer.prefixes[layer] = prefix_of(keys, values, self.heads)
        return answer
