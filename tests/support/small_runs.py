"""Runs of the trainer on tiny models, fast enough for every method."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor

from cl_prompts import get_prompt_pool_model
from cl_prompts.continual import ClassIncrementalStream, ContinualArguments, ContinualTrainer, TrainerCallback, TrainerState
from support.families import build
from support.methods import METHODS, WITH_CLASSIFIER


CLASSES = [[4, 1], [0, 3], [2, 5]]
PER_CLASS, TESTS = 5, 2


def pictures(labels: Sequence[int], seed: int) -> Tensor:
    """Images that tell their class: a pattern of the class and noise."""
    patterns = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return patterns[list(labels)] + 0.5 * noise


def small_stream(tasks: int = 3, **options: Any) -> ClassIncrementalStream:
    """Two classes a task, five training and two test images a class."""
    train, test = [c for c in range(6) for _ in range(PER_CLASS)], [c for c in range(6) for _ in range(TESTS)]
    images = torch.cat([pictures(train, 1), pictures(test, 2)])
    rows = [
        Dataset.from_dict({"image": list(range(start, start + len(labels))), "label": labels})
        for start, labels in ((0, train), (len(train), test))
    ]
    return ClassIncrementalStream(*rows, CLASSES[:tasks], images.__getitem__, **options)


def small_model(method: str, **config: Any) -> Any:
    """A new model of a method, the same every time."""
    base = build("vit")
    set_seed(3)
    return get_prompt_pool_model(base, {**METHODS, **WITH_CLASSIFIER}[method](**config))


def small_trainer(
    method: str, folder: Path | None = None, *, tasks: int = 3, callbacks: Sequence[TrainerCallback] = (), **settings: Any
) -> ContinualTrainer:
    """A trainer over the small stream, two epochs of three steps a task."""
    AcceleratorState._reset_state(reset_partial_state=True)  # a process is made for one precision
    config, classifiers = settings.pop("config", {}), settings.pop("classifiers", None)
    args = ContinualArguments(
        **{
            "output_dir": str(folder) if folder else None,
            "num_train_epochs": 2,
            "batch_size": 4,
            "save_steps": 1,
            **settings,
        }
    )
    model = small_model(method, **config)
    return ContinualTrainer(model, small_stream(tasks), args, callbacks=callbacks, classifiers=classifiers)


class Stop(Exception):
    """What a run dies of."""


class StopAt(TrainerCallback):
    """Ends a run after so many optimizer steps, before their checkpoint is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, state: TrainerState, task: Any) -> None:
        if state.progress.global_step == self.step:
            raise Stop


def tensors(trainer: ContinualTrainer) -> dict[str, Tensor]:
    """All that a run has learnt."""
    return {name: tensor.detach().clone() for name, tensor in trainer.model.training_state_dict()["tensors"].items()}
