"""What of a trainer goes into a checkpoint, and how it is put back."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cl_prompts.continual.checkpointing.checkpoint import (
    optimizer_state,
    random_state,
    set_optimizer_state,
    set_random_state,
)
from cl_prompts.continual.optimization import build_optimizer
from cl_prompts.continual.progress import Progress
from cl_prompts.evaluation.metrics import AccuracyMatrix
from cl_prompts.learner.nested_tensors import below, prefixed
from cl_prompts.runtime.distributed import gather_over_processes, world_size


if TYPE_CHECKING:
    from cl_prompts.continual.trainer import ContinualTrainer

Saved = tuple[dict[str, Tensor], dict[str, Any]]

FORMAT = 3  # of a checkpoint's values; another number is another version's

# Settings that change nothing about the result.
NOT_OF_THE_RUN = ("output_dir", "workers", "log_every", "checkpoint_every", "query_cache", "query_cache_bytes")


def identity(trainer: ContinualTrainer) -> dict[str, str]:
    """What makes a run this run and no other."""
    settings = {k: v for k, v in trainer.args.to_dict().items() if k not in NOT_OF_THE_RUN}
    return {
        "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "stream": trainer.stream.fingerprint(),
        "transform": _transform(trainer.stream.transform),
        "learner": trainer.model.fingerprint(),
        "processes": str(world_size()),
        **{f"classifier {name!r}": told for name, told in trainer.side.told.items()},
    }


def _transform(transform: Any) -> str:
    """Class and settings of what makes tensors of images, if it tells them; no word of one that does not."""
    settings = getattr(transform, "settings", None)
    if not callable(settings):
        return ""
    kind = type(transform)
    try:
        return json.dumps([kind.__module__, kind.__qualname__, settings()], sort_keys=True)
    except (TypeError, ValueError):  # cannot be written down
        return ""


def _skipped(trainer: ContinualTrainer) -> dict[str, list[int]]:
    """Numbers of the images that any process could not read; all processes must call it."""
    found = {}
    for split, numbers in trainer.stream.skipped.items():
        own = torch.tensor(numbers, dtype=torch.int64, device=trainer.accelerator.device)
        found[split] = torch.cat(gather_over_processes(own)).unique().tolist()
    return found


def taken(trainer: ContinualTrainer) -> Saved:
    """Tensors and JSON-able values of a run as it stands; all processes must call it."""
    learner = trainer.model.training_state_dict()
    tensors = prefixed("model.", learner["tensors"])
    values: dict[str, Any] = {
        "format": FORMAT,
        "identity": identity(trainer),
        "learner": learner["values"],
        "progress": asdict(trainer.progress),
        "matrix": trainer.matrix.to_dict(),
        "skipped": _skipped(trainer),
    }
    if trainer.optimizer is not None and (trainer.progress.begun or trainer.args.keep_optimizer):
        own, values["optimizer"] = optimizer_state(trainer.optimizer)
        tensors |= prefixed("optimizer.", own)
    if trainer.accelerator.scaler is not None:
        values["scaler"] = trainer.accelerator.scaler.state_dict()
    own, values["side"] = trainer.side.state()
    tensors |= prefixed("side.", own)
    if trainer.memory is not None:
        values["memory"] = trainer.memory.state()
    random_tensors, values["random"] = random_state()
    for name, tensor in random_tensors.items():
        for rank, state in enumerate(gather_over_processes(tensor.to(trainer.accelerator.device))):
            tensors[f"random.{rank}.{name}"] = state
    return tensors, values


def checked(saved: Saved | None, trainer: ContinualTrainer) -> Saved | None:
    """A checkpoint, if it is of this run.

    Raises:
        ValueError: it is of another one, or of another version of this library.
    """
    if saved is None:
        return None
    values = saved[1]
    if values.get("format") != FORMAT:
        raise ValueError(
            f"the checkpoints in {trainer.folder} are of another version of cl_prompts (format {values.get('format', 1)}, "
            f"this one has {FORMAT}), which cannot be resumed: remove them, or choose another folder"
        )
    own, other = identity(trainer), values["identity"]
    differing = [name for name in {**own, **other} if own.get(name) != other.get(name)]
    if differing:
        raise ValueError(
            f"the checkpoints in {trainer.folder} are of another run, whose {' and '.join(differing)} differ: resume "
            "with the same settings, data, classifiers and processes, or choose another folder"
        )
    return saved


def put_back(trainer: ContinualTrainer, saved: Saved) -> None:
    """Model, position, accuracies, memory, and an optimizer that is kept from task to task."""
    tensors, values = saved
    trainer.model.load_training_state_dict({"tensors": below("model.", tensors), "values": values["learner"]})
    trainer.progress = Progress(**values["progress"])
    trainer.matrix = AccuracyMatrix.from_dict(values["matrix"])
    trainer.stream.skipped = values["skipped"]
    trainer.side.load_state(below("side.", tensors), values["side"])
    if trainer.memory is not None:
        trainer.memory.load_state(values["memory"])
    args = trainer.args
    if "optimizer" in values and not trainer.progress.begun:
        groups = trainer.model.parameter_groups(args.lr, **args.lrs)
        trainer.optimizer = build_optimizer(args.optimizer, groups, **args.optimizer_options)
        put_back_optimizer(trainer, trainer.optimizer, saved)


def put_back_optimizer(trainer: ContinualTrainer, optimizer: torch.optim.Optimizer, saved: Saved) -> None:
    """The state of an optimizer over the same parameters, and of fp16's gradient scaler."""
    tensors, values = saved
    if "optimizer" in values and trainer.progress.begun == values["progress"]["begun"]:
        set_optimizer_state(optimizer, below("optimizer.", tensors), values["optimizer"])
    if "scaler" in values and trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(values["scaler"])


def put_back_random_state(trainer: ContinualTrainer, saved: Saved) -> None:
    """This process's random number generators."""
    set_random_state(below(f"random.{trainer.accelerator.process_index}.", saved[0]), saved[1]["random"])
