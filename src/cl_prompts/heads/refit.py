"""Scores of a trained head on images that its weights have not seen, for the temperature of its scores."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.heads.calibration import fit_temperature, folds
from cl_prompts.heads.incremental import IncrementalHead


STEPS = 300
LEARNING_RATE = 0.01


def held_out_logits(
    head: IncrementalHead,
    features: Tensor,
    targets: Tensor,
    only_current: bool,
    untrained: Tensor | None = None,
    *,
    loss_temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Logits of a task's images by heads that were trained without them.

    For each fold the rows of the task's classes are trained again on the other images, as far as the head was
    (`trained_as_far`; ours), whatever its optimizer. On these images the logits of the task's classes then get the mean and
    the spread that the head's have: energies depend on both. The features are of the model that was trained on all of the
    task's images but the `untrained` ones.

    Args:
        head: the trained head; it is not changed.
        features: of the task's images [n, D].
        targets: class index of each image [n].
        only_current: whether the loss compares classes of the current task only (`class_mask="task"`).
        untrained: True for the images that neither prompts nor `head` were trained on [n], as for `folds`.
        loss_temperature: divides the logits in the training loss.

    Returns:
        logits [held, C] and their targets [held].
    """
    logits, held_targets = [features.new_zeros(0, len(head.weight))], [targets[:0]]
    for held in folds(targets, untrained):
        again = trained_as_far(head, features[~held], targets[~held], only_current, loss_temperature)
        logits.append(_of_same_moments(again, head, features[~held], features[held]))
        held_targets.append(targets[held])
    return torch.cat(logits), torch.cat(held_targets)


def trained_as_far(
    head: IncrementalHead, features: Tensor, targets: Tensor, only_current: bool, loss_temperature: float = 1.0
) -> IncrementalHead:
    """A copy of `head` with the current task's rows trained again until they fit these images as well as `head` does.

    Rows start from zero, those of a cosine head, whose direction would not be defined, from their mean, which does not tell
    the task's classes apart (of a single class: from the mean feature). Their loss is then that of the head's logits with
    the best temperature for these images. After that these rows are multiplied by one number, so that their logits differ
    from class to class as much as those of `head`; rows of a cosine head get the lengths of the head's. With a large
    learning rate, or while prompts still change, weights grow larger than the loss needs, so that it tells neither.

    Args:
        head: the trained head; it is not changed.
        features: of some of the task's images [n, D].
        targets: class index of each image [n].
        only_current: as for `held_out_logits`.
        loss_temperature: as for `held_out_logits`.
    """
    others = ~head.current if only_current else torch.zeros_like(head.current)

    def loss_of(one: IncrementalHead) -> Tensor:
        logits = one(features) / loss_temperature
        return F.cross_entropy(logits.masked_fill(others, float("-inf")), targets)

    again = copy.deepcopy(head).requires_grad_(True)
    parameters = list(again.parameters())
    with torch.no_grad():
        logits = head(features).masked_fill(others, float("-inf"))
        wanted = float(F.cross_entropy(logits / (fit_temperature(logits, targets) or 1.0), targets))
        for parameter in parameters:
            if head.cosine_scale is None:
                parameter[head.current] = 0.0
            else:  # of one class, the mean would be its row
                parameter[head.current] = features.mean(0) if head.current.sum() == 1 else parameter[head.current].mean(0)
    # Logits that the loss divides grow as much larger. A cosine head's are bounded, and its rows' directions count.
    larger = loss_temperature if head.cosine_scale is None else 1.0
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE * larger)
    with torch.enable_grad():
        loss = loss_of(again)
        reached = float(loss.detach())
        if reached <= wanted:  # the head has learned nothing from them
            return head
        for _ in range(STEPS):
            if reached <= wanted:
                break
            before, old = reached, [parameter.detach().clone() for parameter in parameters]
            optimizer.zero_grad()
            loss.backward()
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad[~head.current] = 0.0
            optimizer.step()
            loss = loss_of(again)
            reached = float(loss.detach())
            if reached <= wanted:  # between the last two steps, so that the result has no jumps
                share = (before - wanted) / (before - reached)
                for parameter, start in zip(parameters, old, strict=True):
                    parameter.data.lerp_(start, 1 - share)
    again.requires_grad_(False)
    if head.cosine_scale is not None:  # lengths of rows change no logit, but how far later steps turn them
        lengths = [one.weight[head.current].norm(dim=1, keepdim=True) for one in (head, again)]
        again.weight[head.current] *= lengths[0] / lengths[1].clamp_min(1e-12)
    else:
        wanted, reached = (_spread(one, features) for one in (head, again))
        if wanted and reached:
            for parameter in parameters:
                parameter[head.current] *= wanted / reached
    return again


@torch.no_grad()
def _of_same_moments(again: IncrementalHead, head: IncrementalHead, seen: Tensor, features: Tensor) -> Tensor:
    """Logits of `again` for `features`, those of current classes with the mean and spread of `head` on `seen` images."""
    logits, spread, wanted = again(features), _spread(again, seen), _spread(head, seen)
    reached, mean = (one(seen)[:, head.current].mean() for one in (again, head))
    scale = wanted / spread if wanted and spread else 1.0
    return torch.where(head.current, (logits - reached) * scale + mean, logits)


@torch.no_grad()
def _spread(head: IncrementalHead, features: Tensor) -> float:
    """Root of the sum of squares of the current classes' logits without their mean over these classes."""
    logits = head(features)[:, head.current]
    return float((logits - logits.mean(1, keepdim=True)).norm())
