"""Learners that start afresh with every task: joint training, an upper bound, and GDumb, which trains on a memory alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cl_prompts.baselines.base import Baseline
from cl_prompts.continual.streams.stream import Stream, Task
from cl_prompts.heads.incremental import IncrementalHead


class FreshStart(Baseline):
    """Forgets at the beginning of a task all it has learnt: the backbone is the given one again, the head new.

    Args:
        backbone: see `Baseline`; a copy of what is trained of it is kept in main memory.
        options: see `Baseline`.
    """

    def __init__(self, backbone: nn.Module, **options: Any) -> None:
        super().__init__(backbone, **options)
        self._given: dict[str, Tensor] = {
            name: p.detach().cpu().clone() for name, p in self.features.named_parameters() if p.requires_grad
        }

    def before_task(self, declared: list[int]) -> None:
        """Back to the start."""
        with torch.no_grad():
            for name, tensor in self._given.items():
                self.features.get_parameter(name).copy_(tensor)
        self.head = IncrementalHead(self.features.width).to(self.head.weight.device)


class JointTraining(FreshStart):
    """Trained on the images of all tasks so far at once, which no continual learner may do: an upper bound.

    Its stream is a `JointStream`.
    """

    name = "joint"

    def before_task(self, declared: list[int]) -> None:
        """Back to the start, if the task is all there was so far.

        Raises:
            ValueError: it is not: classes of earlier tasks do not come back.
        """
        missing = sorted(set(self.classes) - set(declared))
        if missing:
            raise ValueError(f"classes {missing} do not come back in this task: train jointly on JointStream(stream)")
        super().before_task(declared)


class GDumb(FreshStart):
    """Trained on the memory alone, after each task anew ("greedy sampler and dumb learner").

    Prabhu, Torr & Dokania, "GDumb: A Simple Approach that Questions Our Progress in Continual Learning", ECCV 2020. Their
    learner starts from random weights and trains for 256 epochs with CutMix; here it starts from the given backbone and is
    trained as all learners are.
    """

    name = "gdumb"
    replay = "memory_only"
    needs_memory = True


class JointStream(Stream):
    """Another stream with all training images of the tasks so far in each task; its test images stay those of one task.

    For joint training of a comparison learner ("joint"), or of a prompt method with `only_last`: prompts and head are then
    trained on all classes at once.

    Args:
        stream: whose images; with or without tasks, but readable by row number.
        only_last: one task with all training and all test images. Saves the other tasks' training; the one accuracy is that
            over all images, which is the final average accuracy where all tasks have as many test images.

    Raises:
        ValueError: the stream can only be read in order.
    """

    scenario = "joint"

    def __init__(self, stream: Stream, *, only_last: bool = False) -> None:
        if not stream.random_access:
            raise ValueError(
                f"a {stream.scenario} stream that is read in order cannot be trained on jointly: load it whole"
            )
        tasks, classes, rows = [], list[int](), np.empty(0, dtype=np.int64)
        for task in stream.tasks:
            revisit = bool(classes)
            classes = list(dict.fromkeys(classes + task.classes))
            rows = np.concatenate([rows, task.train_rows])
            tasks.append(Task(task.number, classes, rows, task.test_rows, task.name, revisit))
        if only_last:
            test_rows = np.unique(np.concatenate([task.test_rows for task in tasks]))
            tasks = [Task(0, classes, rows, test_rows)]
        super().__init__(
            stream.train,
            stream.test,
            tasks,
            stream.transform,
            train_labels=stream.train_labels,
            test_labels=stream.test_labels,
            names=stream.names,
            image_column=stream.image_column,
            augmentation=stream.augmentation,
            on_bad_image=stream.on_bad_image,
        )
