"""SupSup: supermasks in superposition."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.baselines.masked_linear import Compute, MaskedLinear, computing, masked_linear_layers, with_masks
from cl_prompts.baselines.task_networks import TaskNetworks


UNLIKELY = -20.0  # log probability of a task that was not inferred


class SupSup(TaskNetworks):
    """Fixed weights, and for each task a binary mask on them; the task is inferred from the entropy of the answer.

    Wortsman et al., "Supermasks in Superposition", NeurIPS 2020. Within a task a score for each weight of the blocks'
    linear layers is trained; the mask has the `keep` largest of a layer, and gradients pass through it to the scores
    (edge-popup, equation 2). At test all T masks are superposed with weights alpha_i = 1 / T,

        p(alpha) = softmax(f(x, W * sum_i alpha_i M_i))   (equation 3)
        task = argmax over i of -dH(p(alpha)) / dalpha_i   (equation 4, "one-shot"; H: entropy)

    for each image by itself, so no task is needed at test. A class's logit is its log probability within its task; classes
    of tasks that were not inferred are 20 lower, so that the task-incremental accuracy is that of the right masks. An
    answer takes a forward and a backward pass, and a pass for each task. With domains, a class has the logit of the
    inferred one.

    Where it differs: the weights are those of the pre-trained backbone in place of random ones, and scores start at the
    weights' sizes, so that a task begins with the largest weights; the head has rows for each task.

    Args:
        backbone: see `Baseline`; its weights stay fixed.
        keep: share of the weights in a mask. Ours: pre-trained weights are of more use than random ones.
        options: see `Baseline`.

    Attributes:
        scores: of the current task, in the order of the layers [out, in].
        masks: of the ended tasks, by name of a layer, [tasks, out, in] bool. They are saved
            with one bit for each weight.
    """

    name = "supsup"
    needs_task = False
    default_rates: ClassVar[Mapping[str, float]] = {}  # there is no group "base"
    fixed_weights = True

    def __init__(self, backbone: nn.Module, *, keep: float = 0.9, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.keep = self.number("keep", keep)
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep} must be a share of the weights, above 0 and at most 1")
        self.layers = masked_linear_layers(self.features)
        self.scores = nn.ParameterList([torch.empty_like(layer.weight) for layer in self.layers.values()])
        self._start_scores()
        self.masks = {name: torch.zeros(0, *layer.weight.shape, dtype=torch.bool) for name, layer in self.layers.items()}

    @torch.no_grad()
    def _start_scores(self) -> None:
        for score, layer in zip(self.scores, self.layers.values(), strict=True):
            score.copy_(layer.weight.abs() / layer.weight.std().clamp_min(1e-12))

    def groups(self) -> dict[str, list[nn.Module]]:
        """Scores and head."""
        return {"scores": [self.scores], "head": [self.head]}

    def update_factors(self) -> dict[str, Tensor]:
        """The head's rows of earlier tasks stay."""
        return self.current_rows()

    def begin_task(self, *args: Any, **kwargs: Any) -> None:
        """Open the next task; `args` and `kwargs` as in `Baseline`. Its scores start anew."""
        super().begin_task(*args, **kwargs)
        self._start_scores()

    def end_task(self) -> None:
        """Close the task; its masks are kept."""
        super().end_task()
        self.masks = {name: self._masks_of(layer) for name, layer in self.layers.items()}

    def _masks_of(self, layer: MaskedLinear) -> Tensor:
        """The masks of all tasks so far, [tasks, out, in]."""
        name, score = next((n, s) for (n, own), s in zip(self.layers.items(), self.scores, strict=True) if own is layer)
        ended = self.masks[name].to(score.device)
        return ended if len(ended) == self.num_tasks else torch.cat([ended, largest(score.detach(), self.keep)[None]])

    def network(self, task: int) -> AbstractContextManager[None]:
        """The weights under the mask of `task`."""
        if self.training:  # with the gradient of the scores
            pairs = zip(self.layers.values(), self.scores, strict=True)
            return computing(with_masks({layer: straight_through(score, self.keep) for layer, score in pairs}))
        return computing(with_masks({layer: self._masks_of(layer)[task] for layer in self.layers.values()}))

    def answer(
        self, pixel_values: Tensor, features: Tensor, logits: Tensor, *, task: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Log probabilities [B, C] within each task, lower for tasks that were not inferred.

        A class of several tasks has its largest. `pixel_values`, `features`, `logits` and `kwargs` are as in `Baseline`;
        `task` is not used.
        """
        inferred = self.infer_tasks(pixel_values, **kwargs)
        scored = torch.full_like(logits, float("-inf"))
        for number in range(self.num_tasks):
            columns, newest = self.columns(number), number == self.num_tasks - 1
            own = logits[:, columns] if newest else self.network_logits(pixel_values, number, **kwargs)
            unlikely = torch.where(inferred == number, 0.0, UNLIKELY)
            scored[:, columns] = scored[:, columns].maximum(own.log_softmax(1) + unlikely[:, None])
        return scored

    @torch.enable_grad()
    def infer_tasks(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Numbers of the inferred tasks [B] of images `pixel_values` [B, 3, H, W]; `kwargs` go to the backbone."""
        tasks, device = self.num_tasks, pixel_values.device
        alpha = torch.full((len(pixel_values), tasks), 1 / tasks, device=device, requires_grad=True)
        masks = {layer: self._masks_of(layer) for layer in self.layers.values()}
        with torch.autocast(device.type, enabled=False), computing(superposed(masks, alpha)):
            logits = self.logits_of(self.features(pixel_values, **kwargs))
        entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum()
        slopes = torch.autograd.grad(entropy, alpha)[0]
        # Tasks with the same mask have the same slope but for rounding, which depends on the batch: the first of them.
        least = slopes.amin(1, keepdim=True) + 1e-4 * slopes.abs().amax(1, keepdim=True)
        return (slopes <= least).int().argmax(1)

    def extra_tensors(self) -> dict[str, Tensor]:
        """The masks, eight weights in a byte."""
        return super().extra_tensors() | {f"masks.{name}": packed(mask) for name, mask in self.masks.items()}

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore them."""
        super().load_extra_tensors(tensors)
        for name, layer in self.layers.items():
            self.masks[name] = unpacked(tensors[f"masks.{name}"], layer.weight.shape)


def largest(scores: Tensor, share: float) -> Tensor:
    """True at the `share` of the entries with the largest `scores`."""
    order = scores.flatten().argsort(stable=True, descending=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[: max(1, round(share * len(order)))]] = True
    return mask.view_as(scores)


def straight_through(scores: Tensor, share: float) -> Tensor:
    """The mask of the largest `scores` as numbers, with the gradient of the scores."""
    mask = largest(scores.detach(), share).to(scores)
    return mask + (scores - scores.detach())  # exactly the mask


def superposed(masks: dict[MaskedLinear, Tensor], alpha: Tensor) -> Compute:
    """Layers with the weight W * sum_i alpha_i M_i, for `masks` [T, out, in] and `alpha` [B, T] of equal rows 1 / T."""

    def compute(layer: MaskedLinear, input: Tensor) -> Tensor:
        if layer not in masks:
            return F.linear(input, layer.weight, layer.bias)
        output: Tensor = _Superposed.apply(input, alpha, layer.weight.detach(), masks[layer].to(input.device))
        return output if layer.bias is None else output + layer.bias

    return compute


class _Superposed(torch.autograd.Function):
    """x -> (W * mean of masks) x, with the gradient of each image's alpha, without a weight for each image."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, alpha: Tensor, weight: Tensor, masks: Tensor) -> Tensor:
        """Inputs [B, N, in] or [B, in], alpha [B, T], weight [out, in], masks [T, out, in] -> outputs [B, N, out]."""
        ctx.save_for_backward(input, weight, masks)
        return F.linear(input, weight * masks.float().mean(0))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Gradients of the inputs and of alpha."""
        input, weight, masks = ctx.saved_tensors
        by_image = gradient.flatten(1, -2) if gradient.dim() > 2 else gradient[:, None]
        rows = input.flatten(1, -2) if input.dim() > 2 else input[:, None]
        slopes = (by_image.mT @ rows) * weight  # [B, out, in]: of a weight for each image, times that weight
        return gradient @ (weight * masks.float().mean(0)), slopes.flatten(1) @ masks.flatten(1).to(slopes).T, None, None


def packed(masks: Tensor) -> Tensor:
    """Masks [T, out, in] as bytes [T, ceil(out * in / 8)]."""
    bits = F.pad(masks.flatten(1).to(torch.uint8), (0, -masks[0].numel() % 8 if len(masks) else 0))
    bits = bits.view(len(masks), -1, 8) if len(masks) else bits.new_zeros(0, 1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(2, dtype=torch.uint8)


def unpacked(content: Tensor, shape: torch.Size) -> Tensor:
    """Masks [T, *shape] from their bytes [T, n]."""
    bits = (content[..., None] >> torch.arange(8, dtype=torch.uint8, device=content.device)) & 1
    return bits.flatten(1)[:, : shape.numel()].bool().view(-1, *shape)
