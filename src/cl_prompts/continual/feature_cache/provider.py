"""Images and un-prompted features for passes outside training, computed once where possible."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from cl_prompts.continual.arguments import ContinualArguments
from cl_prompts.continual.batches import DeviceBatches, to_device
from cl_prompts.continual.feature_cache.cache import QueryCache, folder_of_queries
from cl_prompts.continual.feature_cache.hidden_states import HiddenStates
from cl_prompts.continual.feature_cache.key import agreed_key, query_digest
from cl_prompts.continual.left_out import left_out
from cl_prompts.continual.streams.indexed import IndexedStream, require_indexed
from cl_prompts.continual.streams.loading import Rows
from cl_prompts.continual.streams.stream import Stream, Task
from cl_prompts.evaluation.evaluate import stream_features
from cl_prompts.interfaces import NotCacheableError
from cl_prompts.learner.protocol import Learner
from cl_prompts.runtime.distributed import sum_over_processes, world_size


# Batch size of the pass over all images, on each process. The same for all runs, because the batch size can change the last
# bits of a feature.
TOGETHER = 64


@dataclass(frozen=True)
class ImageView:
    """One view of all images of a set. Equal views have equal pixels.

    Args:
        train: True for the training set, False for the test set.
        augmented_by: (seed, view) of the augmentation; None: not augmented.
    """

    train: bool
    augmented_by: tuple[int, int] | None = None


class FeatureProvider:
    """Un-prompted features of a stream's images, and batches of images for passes outside training.

    Args:
        model: the learner, not wrapped.
        stream: the stream.
        args: settings of the run.
        accelerator: the run's accelerator.

    Raises:
        ValueError: `args.query_cache` is a file.
    """

    def __init__(self, model: Learner, stream: Stream, args: ContinualArguments, accelerator: Accelerator) -> None:
        self.model, self.stream, self.args, self.accelerator = model, stream, args, accelerator
        self._features: dict[ImageView, Tensor] = {}
        own_folder = Path(args.output_dir) if args.output_dir else None
        self._hidden = HiddenStates(args.hidden_cache_bytes, own_folder)
        folder = folder_of_queries(args.query_cache)
        if isinstance(stream, IndexedStream):
            stream.keep_pixels(args.pixel_cache_bytes, own_folder)
        self._cache = QueryCache(folder, args.query_cache_bytes, accelerator.print) if folder else None

    @property
    def _indexed(self) -> IndexedStream:
        return require_indexed(self.stream, "computing features outside training")

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Within this context the learner is in eval mode, under the run's precision. Afterwards its mode is restored."""
        training = self.model.training
        self.model.eval()
        try:
            with self.accelerator.autocast():
                yield
        finally:
            self.model.train(training)

    @property
    def base_is_frozen(self) -> bool:
        """Whether no parameter of the backbone is trained, so that un-prompted features do not change."""
        return not any(p.requires_grad for p in self.model.get_base_model().parameters())

    def frozen_features(self, *, train: bool) -> Tensor:
        """Un-prompted features of all images of the stream's tasks, by row number [rows, D].

        `train` selects training or test images. They are computed once if the backbone is frozen, else at every call.
        """
        return self._features_of(ImageView(train))

    def _features_of(self, view: ImageView) -> Tensor:
        if view in self._features:
            return self._features[view]
        with self.eval_mode():
            if not self.base_is_frozen:
                return self._computed(view)
            self._features[view] = self._cached(view)
        return self._features[view]

    def _cached(self, view: ImageView) -> Tensor:
        """Features of the query cache; if it does not have them, they are computed and kept there."""
        train = view.train
        stream, device = self._indexed, self.accelerator.device
        rows = stream.all_rows(train=train)
        digest, why = None, ""
        if self._cache is not None:
            try:
                digest = query_digest(
                    self.model,
                    stream,
                    rows,
                    train=train,
                    together=TOGETHER,
                    device=device,
                    augmented_by=view.augmented_by,
                )
            except NotCacheableError as reason:
                why = f" only: {reason}"
        key = agreed_key(digest, device)
        of_view = f", view {view.augmented_by[1]}" if view.augmented_by else ""
        images = f"query cache: {len(rows)} {'training' if train else 'test'} images{of_view}"
        if key is None or self._cache is None:
            self.accelerator.print(f"{images} computed once, in memory{why}")
            return self._computed(view)
        table = None if self._keeps_hidden else self._cache.read(key)
        hit = torch.tensor(int(table is not None), device=device)
        if int(sum_over_processes(hit)) == world_size() and table is not None:
            self.accelerator.print(f"{images} read from {self._cache.path(key)}")
            return table
        table = self._computed(view)
        if not table[rows].isfinite().all() or not table[rows].any(1).all():
            self.accelerator.print(
                f"{images} computed once, in memory only: some cannot be read, or have features that are not finite"
            )
        elif self.accelerator.is_main_process and self._cache.write(key, table):
            self.accelerator.print(f"{images} computed once, kept in {self._cache.path(key)}")
        return table

    def _computed(self, view: ImageView) -> Tensor:
        """Features [rows, D] from a pass over all images."""
        size, device, augmented_by = TOGETHER * world_size(), self.accelerator.device, view.augmented_by
        stream = self._indexed
        batches = stream.all_images(
            train=view.train, batch_size=size, num_workers=self.args.dataloader_num_workers, augmented_by=augmented_by
        )
        batches_on_device = (stream.augment_on_device(to_device(batch, device), augmented_by) for batch in batches)
        rows = len(stream.train_labels if view.train else stream.test_labels)
        keep = self._keep_hidden(view) if self._keeps_hidden and augmented_by is None else None
        return stream_features(self.model, batches_on_device, rows, device, keep)

    # ---- hidden states -----------------------------------------------------------------------------------------------

    @property
    def _keeps_hidden(self) -> bool:
        """Whether hidden states may be kept: one process reads images by row number, and prompts begin above block 0."""
        asked = self.args.hidden_cache_bytes > 0 and world_size() == 1 and isinstance(self.stream, IndexedStream)
        return asked and self.base_is_frozen and self.model.num_lower_blocks > 0

    def _keep_hidden(self, view: ImageView) -> Callable[[Sequence[int], Tensor | None], None]:
        """What keeps the hidden states of a pass over a view: training images first, test images if there is room."""
        number = sum(len(self._indexed.all_rows(train=train)) for train in {True, view.train})
        begun = False

        def keep(rows: Sequence[int], hidden: Tensor | None) -> None:
            nonlocal begun
            if hidden is not None and not begun:
                self._hidden.begin(view, hidden, number)
            begun = True
            if hidden is not None and view in self._hidden:
                self._hidden.add(view, rows, hidden)

        return keep

    def with_hidden(self, batches: Iterable[dict[str, Any]], *, train: bool, augmented: bool = False) -> Any:
        """Batches with `lower_blocks`, where these hidden states of their images are kept; else `batches` as they are.

        Args:
            batches: of this stream, with `sample_ids`.
            train: whether they are training images.
            augmented: whether the images are augmented.
        """
        if augmented or not self._keeps_hidden:
            return batches
        view = ImageView(train)
        self._features_of(view)
        if view not in self._hidden:
            return batches
        return (batch | {"lower_blocks": self._hidden.of(view, batch["sample_ids"])} for batch in batches)

    # ---- queries and batches -----------------------------------------------------------------------------------------

    def queries(self, *, train: bool) -> Tensor | None:
        """Queries of all images by row number [rows, D]; None if the method needs none or the backbone is trained."""
        return self._queries(ImageView(train))

    def training_queries(self, epoch: int) -> Tensor | None:
        """Queries of all training images in an epoch [rows, D]; None if every epoch has new augmentations."""
        augmentation = self.stream.augmentation
        if augmentation is None:
            return self.queries(train=True)
        if augmentation.views is None:
            return None
        return self._queries(ImageView(True, (self.args.seed, augmentation.view(epoch))))

    def _queries(self, view: ImageView) -> Tensor | None:
        if not self.args.cache_queries or not self.model.needs_query or not isinstance(self.stream, IndexedStream):
            return None
        return self._features_of(view) if self.base_is_frozen else None

    def task_images(self, task: Task) -> DeviceBatches:
        """Batches of a task's training images on the device, not augmented; those of `calibration_share` as `untrained`."""
        rows = self._indexed.tasks[task.number].train_rows
        return self.images(rows, rows[self._untrained(rows)])

    def trained_rows(self, task: Task) -> Rows | None:
        """Rows of a task's images that are trained on; None: all."""
        if not self.args.calibration_share:
            return None
        rows = self._indexed.tasks[task.number].train_rows
        return rows[~self._untrained(rows)]

    def _untrained(self, rows: Rows) -> NDArray[np.bool_]:
        return left_out(self._indexed.train_labels[rows], self.args.calibration_share)

    def images(self, rows: Rows, untrained: Rows | None = None) -> DeviceBatches:
        """Batches of the training images with numbers `rows` on the device, not augmented.

        Args:
            rows: row numbers.
            untrained: those that batches mark as `untrained`; None: batches mark none.
        """

        def batches() -> Any:
            queries = self.queries(train=True)
            images = self._indexed.images(
                rows, self.args.batch_size, queries=queries, num_workers=self.args.dataloader_num_workers
            )
            read = self.with_hidden(images, train=True)
            if untrained is None or not len(untrained):
                return read
            return (batch | {"untrained": torch.from_numpy(np.isin(batch["sample_ids"], untrained))} for batch in read)

        return DeviceBatches(batches, self.accelerator.device)

    def test_batches(self, task: Task) -> Any:
        """Batches of a task's test images."""
        size, num_workers = self.args.batch_size, self.args.dataloader_num_workers
        if isinstance(self.stream, IndexedStream):
            queries = self.queries(train=False)
            batches = self.stream.test_batches(task, size, num_workers=num_workers, queries=queries)
            return self.with_hidden(batches, train=False)
        return self.stream.test_batches(task, size, num_workers=num_workers)
