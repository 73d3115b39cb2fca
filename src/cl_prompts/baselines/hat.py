"""HAT: hard attention to the task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.backbones.feature_extractor import FeatureExtractor
from cl_prompts.baselines.batch import Batch
from cl_prompts.baselines.task_networks import TaskNetworks
from cl_prompts.interfaces import LossPart


# Masks of the hidden units and of the outputs of each MLP in the pass in progress, by its second layer.
MASKS: ContextVar[Mapping[nn.Module, tuple[Tensor, Tensor]] | None] = ContextVar("hat_masks", default=None)
LARGEST_EXPONENT, LARGEST_EMBEDDING = 50.0, 6.0  # as in the published code


class HAT(TaskNetworks):
    """Each task learns which units of the blocks' MLPs it uses; what earlier tasks use is not changed.

    Serra et al., "Overcoming Catastrophic Forgetting with Hard Attention to the Task", ICML 2018. A unit's output is
    multiplied by a = sigmoid(s e) (equation 1), e being the task's embedding of the unit. In training s rises from
    1 / s_max to s_max over `annealing_steps` steps, again and again (equation 3); at test s = s_max. With A the largest
    mask of all earlier tasks for a unit,

        step on the weight from unit j to unit i: times 1 - min(A_i, A_j)   (equation 2)
        gradient of e: times s_max / s * (cosh(s e) + 1) / (cosh(e) + 1)   (equation 4)
        loss + c * sum of a (1 - A) / sum of (1 - A)   (equation 5)

    Units here are the hidden units and the outputs of each block's MLP. The rest of the backbone is frozen, for attention
    and norms have no units of one task. Where it differs: (2) scales the step in place of the gradient, which is the same
    for SGD, since Adam cancels a constant factor of a gradient; embeddings start uniformly in [0, 2), so that a task begins
    with the pre-trained MLPs.

    Args:
        backbone: see `Baseline`.
        s_max: largest s, 400 in the paper.
        sparsity: c, 0.75 in the paper.
        annealing_steps: optimizer steps in which s rises; an epoch in the paper.
        options: see `Baseline`.

    Attributes:
        embeddings: e of the current task, of the hidden units and of the outputs of each block's MLP in turn.
        masks: of the ended tasks, in the same order, [tasks, units].
        steps: number of optimizer steps in the current task.
    """

    name = "hat"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        s_max: float = 400.0,
        sparsity: float = 0.75,
        annealing_steps: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(backbone, **options)
        self.s_max, self.sparsity = self.number("s_max", s_max), self.number("sparsity", sparsity)
        self.annealing_steps = int(self.number("annealing_steps", annealing_steps))
        if s_max < 1 or annealing_steps < 2:
            raise ValueError(f"s_max={s_max} must be at least 1 and annealing_steps={annealing_steps} at least 2")
        self.mlps = find_mlps(self.features)
        trained = {id(p) for name in self.mlps for layer in self._layers(name) for p in layer.parameters()}
        for parameter in self.features.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)
        for name in self.mlps:
            second = self._layers(name)[1]
            if mask_hidden not in second._forward_pre_hooks.values():  # else those of another learner on this backbone
                second.register_forward_pre_hook(mask_hidden)
                second.register_forward_hook(mask_outputs)
        sizes = [size for name in self.mlps for size in self._sizes(name)]
        self.embeddings = nn.ParameterList([torch.empty(size) for size in sizes])
        self._start_embeddings()
        self.masks = [torch.zeros(0, size) for size in sizes]
        self.steps = 0

    def _layers(self, name: str) -> tuple[nn.Linear, nn.Linear]:
        first, second = (self.features.base.get_submodule(part) for part in (name, self.mlps[name]))
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        return first, second

    def _sizes(self, name: str) -> tuple[int, int]:
        second = self._layers(name)[1]
        return second.in_features, second.out_features

    def _start_embeddings(self) -> None:
        for embedding in self.embeddings:
            nn.init.uniform_(embedding, 0, 2)

    def groups(self) -> dict[str, list[nn.Module]]:
        """Backbone, head and embeddings."""
        return super().groups() | {"embeddings": [self.embeddings]}

    @property
    def scale(self) -> float:
        """s in training."""
        way = (self.steps % self.annealing_steps) / (self.annealing_steps - 1)
        return 1 / self.s_max + (self.s_max - 1 / self.s_max) * way

    def network(self, task: int) -> AbstractContextManager[None]:
        """The units that `task` uses."""
        if task < len(self.masks[0]):
            masks = [mask[task] for mask in self.masks]
        else:
            scale = self.scale if self.training else self.s_max
            masks = [torch.sigmoid(scale * embedding) for embedding in self.embeddings]
        seconds = [self._layers(name)[1] for name in self.mlps]
        return masked_units({layer: (masks[2 * i], masks[2 * i + 1]) for i, layer in enumerate(seconds)})

    def used(self) -> list[Tensor]:
        """A: the largest mask of the ended tasks for each unit, in the order of the embeddings [units]; 0 without one."""
        masks = [mask.to(e.device) for mask, e in zip(self.masks, self.embeddings, strict=True)]
        return [mask.amax(0) if len(mask) else mask.new_zeros(mask.shape[1]) for mask in masks]

    def update_factors(self) -> dict[str, Tensor]:
        """Equation 2 for the layers of the MLPs, and the head's rows of earlier tasks."""
        used, factors = self.used(), self.current_rows()
        for i, (first, second) in enumerate(self.mlps.items()):
            hidden, outputs = used[2 * i], used[2 * i + 1]
            factors |= {
                f"features.base.{first}.weight": 1 - hidden[:, None],
                f"features.base.{first}.bias": 1 - hidden,
                f"features.base.{second}.weight": 1 - torch.minimum(outputs[:, None], hidden[None]),
                f"features.base.{second}.bias": 1 - outputs,
            }
        trained = self.trained()
        return {name: factor for name, factor in factors.items() if name in trained}

    def before_step(self) -> None:
        """Compensate the gradients of the embeddings, equation 4."""
        scale = self.scale
        for e in self.embeddings:
            if e.grad is not None:
                grown = (scale * e).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).cosh() + 1
                e.grad *= self.s_max / scale * grown / (e.cosh() + 1)

    def after_step(self) -> None:
        """Bound the embeddings, and go on with s."""
        for e in self.embeddings:
            e.clamp_(-LARGEST_EMBEDDING, LARGEST_EMBEDDING)
        self.steps += 1

    def loss_parts(self, batch: Batch) -> dict[str, LossPart]:
        """Cross entropy, and the share of unused units that the task takes."""
        masks = [torch.sigmoid(self.scale * e) for e in self.embeddings]
        free = [1 - used for used in self.used()]
        taken = torch.stack([(a * left).sum() for a, left in zip(masks, free, strict=True)]).sum()
        total = torch.stack([left.sum() for left in free]).sum().clamp_min(1e-6)
        return super().loss_parts(batch) | {"sparsity": LossPart(self.sparsity * taken / total, "batch")}

    def begin_task(self, *args: Any, **kwargs: Any) -> None:
        """Open the next task; `args` and `kwargs` as in `Baseline`. Its embeddings start anew."""
        super().begin_task(*args, **kwargs)
        self._start_embeddings()
        self.steps = 0

    @torch.no_grad()
    def end_task(self) -> None:
        """Close the task; its masks at s_max are kept."""
        super().end_task()
        for i, e in enumerate(self.embeddings):
            self.masks[i] = torch.cat([self.masks[i].to(e.device), torch.sigmoid(self.s_max * e)[None]])

    def extra_tensors(self) -> dict[str, Tensor]:
        """The masks, and the number of steps."""
        own = {f"masks.{i}": mask for i, mask in enumerate(self.masks)} | {"steps": torch.tensor(self.steps)}
        return super().extra_tensors() | own

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore them."""
        super().load_extra_tensors(tensors)
        self.masks = [tensors[f"masks.{i}"] for i in range(len(self.masks))]
        self.steps = int(tensors["steps"])


def mask_hidden(layer: nn.Module, args: tuple[Tensor, ...]) -> Any:
    """Pre-hook of an MLP's second layer: its input times the mask of the hidden units."""
    masks = MASKS.get()
    return (args[0] * masks[layer][0], *args[1:]) if masks is not None and layer in masks else None


def mask_outputs(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """Hook behind it: its output times the mask of the outputs."""
    masks = MASKS.get()
    return output * masks[layer][1] if masks is not None and layer in masks else None


@contextmanager
def masked_units(masks: Mapping[nn.Module, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within this context MLPs have `masks` of their hidden units and outputs, by their second layer."""
    token = MASKS.set(masks)
    try:
        yield
    finally:
        MASKS.reset(token)


def find_mlps(features: FeatureExtractor) -> dict[str, str]:
    """Names of the first and the second layer of each block's MLP.

    Raises:
        TypeError: a block has no MLP of two plain linear layers.
    """
    found = {}
    for block, attention in zip(features.structure.blocks, features.structure.attentions, strict=True):
        layers = [
            (name, module)
            for name, module in features.base.named_modules()
            if name.startswith(f"{block}.") and not name.startswith(f"{attention}.") and type(module) is nn.Linear
        ]
        firsts = [name for name, module in layers[:-1] if module.out_features == layers[-1][1].in_features]
        if not firsts:
            raise TypeError(
                f"{block} of {type(features.base).__name__} has no MLP of two linear layers, whose units to mask"
            )
        found[firsts[-1]] = layers[-1][0]
    return found
