"""Baselines on a tiny backbone, and the plain torch that they are checked against."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.testing import assert_close

from cl_prompts.baselines import BASELINES, Baseline, get_baseline
from cl_prompts.continual import ContinualArguments, ContinualTrainer, JointStream, TrainerCallback
from support.families import build
from support.small_runs import pictures, small_stream


OPTIONS: dict[str, dict[str, Any]] = {
    "ewc": {"strength": 10.0},
    "ewc_online": {"strength": 10.0, "decay": 0.7},
    "si": {"strength": 1.0},
    "bic": {"held_out": 0.5},
    "co2l": {"projection_size": 8},
    "dualnet": {"bottleneck": 4},
    "hat": {"annealing_steps": 3},
}


def small_learner(name: str, **options: Any) -> Any:
    """A new learner, the same every time."""
    base = build("vit")
    set_seed(3)
    return get_baseline(name, base, **{**OPTIONS.get(name, {}), **options})


def batch_of(labels: Sequence[int], seed: int = 5, ids: Sequence[int] | None = None) -> dict[str, Any]:
    """Images of classes 0 to 5, as a stream gives them."""
    numbers = list(range(len(labels))) if ids is None else list(ids)
    images = pictures([max(label, 0) for label in labels], seed)
    return {"pixel_values": images, "labels": torch.tensor(labels), "sample_ids": numbers}


def plain_logits(learner: Baseline, images: Tensor) -> Tensor:
    """What backbone and head answer, without the learner's own code."""
    hidden = learner.get_base_model()(pixel_values=images).last_hidden_state[:, 0]
    assert learner.head.bias is not None
    return hidden @ learner.head.weight.T + learner.head.bias


def train_steps(learner: Baseline, batch: dict[str, Any], steps: int = 2, lr: float = 0.05) -> None:
    """Some steps of SGD on one batch."""
    optimizer = torch.optim.SGD(learner.parameter_groups(lr))
    learner.attach_optimizer(optimizer)
    learner.train()
    for _ in range(steps):
        optimizer.zero_grad()
        learner(**batch).loss.backward()
        optimizer.step()
    learner.eval()


def parts_of(learner: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The parts of the loss of a batch, which are its sum."""
    learner.train()
    output = learner(**batch)
    assert_close(output.loss, torch.stack(list(output.losses.values())).sum())
    return {name: part.detach() for name, part in output.losses.items()}


def after_a_task(name: str, **options: Any) -> Any:
    """A learner that has learnt classes 4 and 1 and now learns 0, 3, a little changed since."""
    learner = small_learner(name, **options)
    learner.begin_task([4, 1])
    train_steps(learner, batch_of([4, 1, 4, 1]))
    task, memory = [batch_of([4, 1, 4])], [batch_of([4, 1, 1, 4], ids=[50, 51, 52, 53])]
    learner.consolidate(task, memory if learner.needs_memory else None)
    learner.end_task()
    learner.begin_task([0, 3])
    train_steps(learner, batch_of([0, 3, 0]), steps=1)
    return learner


def comparison_trainer(
    name: str, folder: Path | None = None, *, callbacks: Sequence[TrainerCallback] = (), **settings: Any
) -> ContinualTrainer:
    """A trainer over two tasks, one epoch of three steps each."""
    options = settings.pop("options", {})
    stream = small_stream(settings.pop("tasks", 2))
    memory = {"memory_size": 8} if BASELINES[name].needs_memory else {}
    args = ContinualArguments(
        **{
            "output_dir": str(folder) if folder else None,
            "num_train_epochs": 1,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "save_steps": 1,
            **memory,
            **settings,
        }
    )
    learner = small_learner(name, **options)
    return ContinualTrainer(learner, JointStream(stream) if name == "joint" else stream, args, callbacks=callbacks)
