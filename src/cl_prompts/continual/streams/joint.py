"""A stream for joint training: each task brings the training images of all tasks so far."""

from __future__ import annotations

import numpy as np

from cl_prompts.continual.streams.stream import Stream, Task


class JointStream(Stream):
    """Another stream with all training images of the tasks so far in each task; its test images stay those of one task.

    For the baseline "joint", or for a prompt method with `only_last`: prompts and head are then trained on all classes at
    once.

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
