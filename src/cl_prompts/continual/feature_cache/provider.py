"""Looks at images outside training: frozen features computed once, a task's images as they are, test images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from cl_prompts.continual.arguments import ContinualArguments
from cl_prompts.continual.batches import LookedAt, on_device
from cl_prompts.continual.feature_cache.cache import QueryCache, folder_of_queries
from cl_prompts.continual.feature_cache.key import agreed_key, query_digest
from cl_prompts.continual.streams.stream import Stream, Task
from cl_prompts.evaluation.evaluate import stream_features
from cl_prompts.interfaces import NotCacheableError
from cl_prompts.runtime.distributed import sum_over_processes, world_size


# Images of a pass over frozen images, on each process. One number for all runs: how many go through the base together
# decides the last bits of each one's feature.
TOGETHER = 64


@dataclass(frozen=True)
class Showing:
    """How a set's images are shown.

    Args:
        train: the training or the test set.
        augmented_by: (seed, view) of the augmentation; None: as they are.
    """

    train: bool
    augmented_by: tuple[int, int] | None = None


class Viewer:
    """Shows a stream's images to a learner that does not learn from them.

    Args:
        model: the learner, not wrapped.
        stream, args, accelerator: the trainer's.

    Raises:
        ValueError: `args.query_cache` is a file.
    """

    def __init__(self, model: Any, stream: Stream, args: ContinualArguments, accelerator: Accelerator) -> None:
        self.model, self.stream, self.args, self.accelerator = model, stream, args, accelerator
        self._features: dict[Showing, Tensor] = {}
        folder = folder_of_queries(args.query_cache)
        self._cache = QueryCache(folder, args.query_cache_bytes, accelerator.print) if folder else None

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

    @property
    def base_is_frozen(self) -> bool:
        """Whether the un-prompted feature of an image stays what it is."""
        return not any(p.requires_grad for p in self.model.get_base_model().parameters())

    def frozen_features(self, *, train: bool) -> Tensor:
        """Un-prompted features of all images of the stream's tasks by row number [rows, D].

        `train` means the training images, else the test images. With a frozen base they are computed once and kept; those
        of a base that is trained are of the base as it is now, computed at every call.
        """
        return self._shown(Showing(train))

    def _shown(self, showing: Showing) -> Tensor:
        if showing in self._features:
            return self._features[showing]
        with self.still():
            if not self.base_is_frozen:
                return self._computed(showing)
            self._features[showing] = self._cached(showing)
        return self._features[showing]

    def _cached(self, showing: Showing) -> Tensor:
        """The features that an earlier run has kept, else those of a pass, kept for later ones."""
        train = showing.train
        rows, device = self.stream.all_rows(train=train), self.accelerator.device
        digest, why = None, ""
        if self._cache is not None:
            try:
                digest = query_digest(
                    self.model,
                    self.stream,
                    rows,
                    train=train,
                    together=TOGETHER,
                    device=device,
                    augmented_by=showing.augmented_by,
                )
            except NotCacheableError as reason:
                why = f" only: {reason}"
        key = agreed_key(digest, device)
        of_view = f", view {showing.augmented_by[1]}" if showing.augmented_by else ""
        images = f"query cache: {len(rows)} {'training' if train else 'test'} images{of_view}"
        if key is None or self._cache is None:
            self.accelerator.print(f"{images} computed once, in memory{why}")
            return self._computed(showing)
        table = self._cache.read(key)
        found = torch.tensor(int(table is not None), device=device)
        if int(sum_over_processes(found)) == world_size() and table is not None:
            self.accelerator.print(f"{images} read from {self._cache.path(key)}")
            return table
        table = self._computed(showing)
        if not table[rows].isfinite().all() or not table[rows].any(1).all():
            self.accelerator.print(f"{images} computed once, in memory only: some cannot be read, or give no numbers")
        elif self.accelerator.is_main_process and self._cache.write(key, table):
            self.accelerator.print(f"{images} computed once, kept in {self._cache.path(key)}")
        return table

    def _computed(self, showing: Showing) -> Tensor:
        """The features of a pass over all images."""
        size, device, augmented_by = TOGETHER * world_size(), self.accelerator.device, showing.augmented_by
        batches = self.stream.all_images(
            train=showing.train, batch_size=size, workers=self.args.workers, augmented_by=augmented_by
        )
        shown = (self.stream.cut_on_device(on_device(batch, device), augmented_by) for batch in batches)
        rows = len(self.stream.train_labels if showing.train else self.stream.test_labels)
        return stream_features(self.model, shown, rows, device)

    def queries(self, *, train: bool) -> Tensor | None:
        """Queries of the images by row number, where the method asks for them and the base does not change."""
        return self._queries(Showing(train))

    def training_queries(self, epoch: int) -> Tensor | None:
        """Queries of the images as an epoch shows them; none where each epoch shows them otherwise."""
        augmentation = self.stream.augmentation
        if augmentation is None:
            return self.queries(train=True)
        return self._queries(Showing(True, (self.args.seed, augmentation.view(epoch)))) if self.stream.repeats else None

    def _queries(self, showing: Showing) -> Tensor | None:
        if not self.args.cache_queries or not self.model.needs_query or not self.stream.random_access:
            return None
        return self._shown(showing) if self.base_is_frozen else None

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
