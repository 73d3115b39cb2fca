"""Checks of training that prompt learners and baselines share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.runtime.text import short_repr
from cl_prompts.storage.integrity import not_finite


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_labels(labels: Any, images: int, num_items: Any, *, learning: bool) -> None:
    """Check the labels of a forward over so many `images`.

    Args:
        labels: class ids, or None.
        images: their number B.
        num_items: the argument `num_items_in_batch`, which `transformers.Trainer` passes with labels.
        learning: whether it is a training forward, which warns without labels.

    Raises:
        TypeError: the labels are not an integer tensor.
        ValueError: their shape is not [images], or the Trainer has taken them out of the batch.
    """
    if labels is None:
        if num_items is not None:
            raise ValueError(
                "transformers.Trainer took the labels out of the batch (label_smoothing_factor or compute_loss_func) and "
                "would take class ids for columns of the logits: use cl_prompts.hf_trainer.PromptPoolTrainer, which "
                "supports both"
            )
        if learning and not torch.compiler.is_compiling():
            warnings.warn(
                "a training forward without labels has no loss, and the method's own loss terms are missing: pass labels=, "
                "or call model.eval() before predicting",
                stacklevel=2,
            )
        return
    if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
        what = f"a tensor of {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an integer tensor [{images}] of class ids, got {what}")
    if labels.shape != (images,):
        raise ValueError(f"labels has shape {list(labels.shape)}, expected [{images}]: one class id per image")


def check_wrapper(model: nn.Module) -> None:
    """Check that the DistributedDataParallel forward in progress, if any, averages the gradients of all of `model`.

    Raises:
        ValueError: a trainable parameter was added after the model was wrapped.
    """
    wrapper = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    if wrapper is not None:
        wrapped = {id(p) for p in wrapper._module_parameters}
        if any(p.requires_grad and id(p) not in wrapped for p in model.parameters()):
            raise ValueError(
                "the model grew after it was wrapped: unwrap it, begin_task, new optimizer, then prepare it again"
            )


def check_finite(tensors: Mapping[str, Tensor], tasks: Sequence[Sequence[int]]) -> None:
    """Check what training has changed. A prompt that no image has chosen does not show in a loss.

    Args:
        tensors: by name.
        tasks: class ids of every task begun so far.

    Raises:
        FloatingPointError: a tensor holds NaN or Inf.
    """
    wrong = not_finite(tensors)
    if wrong:
        where = f"task {len(tasks) - 1}, of classes {short_repr(tasks[-1])}" if tasks else "training"
        names = f"{wrong[0]} and {len(wrong) - 1} more tensors hold" if len(wrong) > 1 else f"{wrong[0]} holds"
        raise FloatingPointError(f"{names} NaN or Inf in {where}: lower the learning rate, or clip the gradient")
