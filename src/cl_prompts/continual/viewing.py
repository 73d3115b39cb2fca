"""Looks at images outside training: frozen features computed once, a task's images as they are, test images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from cl_prompts.continual.arguments import ContinualArguments
from cl_prompts.continual.batches import LookedAt
from cl_prompts.continual.evaluation import stream_features
from cl_prompts.continual.streams import Stream, Task


class Viewer:
    """Shows a stream's images to a learner that does not learn from them.

    Args:
        model: the learner, not wrapped.
        stream, args, accelerator: the trainer's.
    """

    def __init__(self, model: Any, stream: Stream, args: ContinualArguments, accelerator: Accelerator) -> None:
        self.model, self.stream, self.args, self.accelerator = model, stream, args, accelerator
        self._features: dict[bool, Tensor] = {}

    @contextmanager
    def still(self) -> Iterator[None]:
        """The learner in eval mode under the run's precision, and afterwards in the mode it was in."""
        training = self.model.training
        self.model.eval()
        try:
            with self.accelerator.autocast():
                yield
        finally:
            self.model.train(training)

    def frozen_features(self, *, train: bool) -> Tensor:
        """Un-prompted features of all images of the stream's tasks by row number [rows, D], computed once."""
        if train not in self._features:
            with self.still():
                batches = self.stream.all_images(train=train, batch_size=self.args.batch_size, workers=self.args.workers)
                rows = len(self.stream.train_labels if train else self.stream.test_labels)
                self._features[train] = stream_features(self.model, batches, rows, self.accelerator.device)
        return self._features[train]

    def queries(self, *, train: bool) -> Tensor | None:
        """Queries of the images by row number, where the method asks for them and the base does not change."""
        if not self.args.cache_queries or not self.model.needs_query or not self.stream.random_access:
            return None
        if any(p.requires_grad for p in self.model.get_base_model().parameters()):
            return None
        return self.frozen_features(train=train)

    def training_queries(self) -> Tensor | None:
        """Queries of the images as training shows them; none where each epoch shows them otherwise."""
        return None if self.stream.augments else self.queries(train=True)

    def images(self, rows: Any) -> LookedAt:
        """Training images of these rows, not augmented, batch by batch on the device."""

        def batches() -> Any:
            queries = self.queries(train=True)
            return self.stream.images(rows, self.args.batch_size, queries=queries, workers=self.args.workers)

        return LookedAt(batches, self.accelerator.device)

    def test_batches(self, task: Task) -> Any:
        """A task's test images."""
        queries = self.queries(train=False)
        return self.stream.test_batches(task, self.args.batch_size, queries=queries, workers=self.args.workers)
