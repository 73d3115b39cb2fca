"""A stream whose tasks contain the training images of all tasks so far, for joint training."""

from __future__ import annotations

import numpy as np

from cl_prompts.continual.streams.indexed import IndexedStream, IndexedTask, require_indexed
from cl_prompts.continual.streams.stream import Stream


class JointStream(IndexedStream):
    """Another stream with the training images of all tasks so far in each task. Test images stay those of the task.

    Used for the baseline "joint", or with `only_last` for a prompt method that is trained on all classes at once.

    Args:
        stream: stream with images by row number, with or without tasks.
        only_last: a single task with all training and all test images. This saves training the other tasks. Its accuracy is
            over all test images, which equals the final average accuracy if all tasks have the same number of test images.

    Raises:
        ValueError: the stream is read in order.
    """

    scenario = "joint"

    def __init__(self, stream: Stream, *, only_last: bool = False) -> None:
        source = require_indexed(stream, "joint training")
        tasks, classes, rows = [], list[int](), np.empty(0, dtype=np.int64)
        for task in source.tasks:
            revisit = bool(classes)
            classes = list(dict.fromkeys(classes + task.classes))
            rows = np.concatenate([rows, task.train_rows])
            tasks.append(IndexedTask(task.number, classes, task.name, revisit, train_rows=rows, test_rows=task.test_rows))
        if only_last:
            tasks = [IndexedTask(0, classes, train_rows=rows, test_rows=source.all_rows(train=False))]
        super().__init__(
            source.train,
            source.test,
            tasks,
            source.transform,
            train_labels=source.train_labels,
            test_labels=source.test_labels,
            names=source.names,
            image_column=source.image_column,
            augmentation=source.augmentation,
            on_bad_image=source.on_bad_image,
        )
        self.max_pixels = source.max_pixels
