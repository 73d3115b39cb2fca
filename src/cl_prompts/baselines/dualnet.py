"""DualNet: a slow, self-supervised learner and a fast, supervised one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.baselines.batch import Batch
from cl_prompts.baselines.co2l import make_projector
from cl_prompts.baselines.replay import DERPlusPlus
from cl_prompts.baselines.views import second_view
from cl_prompts.interfaces import LossPart
from cl_prompts.runtime.distributed import gather_with_gradient


# The fast learner's modulators in the pass in progress; None: the slow learner alone.
FAST: ContextVar[nn.ModuleList | None] = ContextVar("dualnet_fast", default=None)
OFF_DIAGONAL = 5e-3  # weight of the off-diagonal terms of Barlow Twins, as in its paper


class DualNet(DERPlusPlus):
    """The backbone also learns from two views of the images; small layers adapt its tokens for classification.

    Pham, Liu & Hoi, "DualNet: Continual Learning, Fast and Slow", NeurIPS 2021. The slow learner is trained by Barlow
    Twins on two views (equation 2), the fast one modulates its feature maps, h' = h * m with m from a small network of h
    (equations 5 to 7), and both are trained by

        cross entropy of new and of remembered images + alpha * KL(stored soft labels || own, temperature)   (equation 8)

    In a vision transformer the feature maps are the tokens between blocks and the feature that the head reads:
    m = 1 + up(relu(down(h))), per token, with `up` starting at zero. Where it differs: both losses are in one step, on all
    images of the batch, in place of several slow steps with a look-ahead optimizer on remembered images; logits are stored
    at the end of a task, as in `DERPlusPlus`.

    Args:
        backbone: see `Baseline`.
        temperature: of the soft labels.
        self_supervision: weight of Barlow Twins, which is divided by the size of a projection. Ours.
        bottleneck: hidden size of a modulator. Ours.
        alpha: weight of the soft labels. Ours.
        beta: weight of the cross entropy of remembered images.
        options: see `Baseline`.
    """

    name = "dualnet"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: float = 2.0,
        self_supervision: float = 0.1,
        bottleneck: int = 16,
        alpha: float = 1.0,
        beta: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(backbone, alpha=alpha, beta=beta, **options)
        if self.features.frozen:
            raise ValueError('freeze_backbone=True: the slow learner of "dualnet" is the backbone, leave it out')
        self.temperature = self.number("temperature", temperature)
        self.self_supervision = self.number("self_supervision", self_supervision)
        if temperature == 0:
            raise ValueError("temperature=0 would divide by zero: choose a positive number")
        hidden = int(self.number("bottleneck", bottleneck))
        structure = self.features.structure
        between = [structure.shape.width] * (len(structure.blocks) - 1)
        self.modulators = nn.ModuleList([Modulator(width, hidden) for width in [*between, self.features.width]])
        for number, block in enumerate(structure.blocks[1:]):
            module = self.features.base.get_submodule(block)
            if not any(getattr(hook, "func", None) is modulate for hook in module._forward_pre_hooks.values()):
                # else those of another learner on this backbone
                module.register_forward_pre_hook(partial(modulate, number), with_kwargs=True)
        self.projector = make_projector(self.features.width, 128)
        self.steps = 0

    def groups(self) -> dict[str, list[nn.Module]]:
        """The backbone; and projector, modulators and head, which are new."""
        return {"base": [self.features], "head": [self.head, self.modulators, self.projector]}

    def after_step(self) -> None:
        """Count the step."""
        self.steps += 1

    def compute_features(self, pixel_values: Tensor, query: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Features [B, D] of the slow learner, modulated by the fast one; arguments and errors as in `Baseline`.

        Raises:
            ValueError: as there, or gradient checkpointing is on in training.
        """
        self.refuse_checkpointing()
        with fast(self.modulators):
            features = super().compute_features(pixel_values, query, **kwargs)
        return features * self.modulators[-1](features)

    def loss_parts(self, batch: Batch) -> dict[str, LossPart]:
        """Cross entropy, distance to the stored soft labels, and Barlow Twins of the slow learner."""
        other = second_view(batch.pixel_values, batch.numbers, self.steps)
        views = [self.projector(self.features(images, **batch.inputs)) for images in (batch.pixel_values, other)]
        rows = gather_with_gradient(torch.cat(views, 1))
        valid = gather_with_gradient(batch.valid.float()[:, None])[:, 0] > 0
        twins = barlow_twins(*rows[valid].chunk(2, 1)) / views[0].shape[1]
        return super().loss_parts(batch) | {"self_supervised": LossPart(self.self_supervision * twins, "batch")}

    def distance(self, logits: Tensor, stored: Tensor, bound: Tensor) -> Tensor:
        """KL divergence [B] of softened answers from the stored ones; arguments as in `DERPlusPlus`."""
        known = [values.masked_fill(~bound, float("-inf")) / self.temperature for values in (stored, logits)]
        taught, own = (values.log_softmax(1).masked_fill(~bound, 0.0) for values in known)
        return (taught.exp() * bound * (taught - own)).sum(1)

    def extra_tensors(self) -> dict[str, Tensor]:
        """The stored logits, and the number of steps."""
        return super().extra_tensors() | {"steps": torch.tensor(self.steps)}

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore them."""
        super().load_extra_tensors(tensors)
        self.steps = int(tensors["steps"])


class Modulator(nn.Module):
    """m = 1 + up(relu(down(h))) for tokens or features h [..., width]; 1 at the start.

    Args:
        width: size of a token.
        hidden: size of the hidden layer.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, values: Tensor) -> Tensor:
        """The factors of `values` [..., width]."""
        return 1 + self.up(F.relu(self.down(values)))


def modulate(number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook of a block: its input times the factors of modulator `number`, in a pass of the fast learner."""
    modulators = FAST.get()
    if modulators is None:
        return None
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    hidden = hidden * modulators[number](hidden)
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


@contextmanager
def fast(modulators: nn.ModuleList) -> Iterator[None]:
    """Within this context the pass in this thread has `modulators`."""
    token = FAST.set(modulators)
    try:
        yield
    finally:
        FAST.reset(token)


def barlow_twins(first: Tensor, second: Tensor) -> Tensor:
    """Zbontar et al., "Barlow Twins", ICML 2021, equation 1, of two views' projections [n, P]: a scalar."""
    a, b = ((views - views.mean(0)) / (views.var(0, unbiased=False) + 1e-5).sqrt() for views in (first, second))
    correlation = a.T @ b / len(a)
    diagonal = correlation.diagonal()
    return (1 - diagonal).square().sum() + OFF_DIAGONAL * (correlation.square().sum() - diagonal.square().sum())
