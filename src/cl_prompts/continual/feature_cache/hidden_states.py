"""Hidden states behind the lower blocks, kept in 16 bits, so that steps and evaluations begin above these blocks.

They lie in private files without a name (`cl_prompts.continual.streams.kept_rows`): no other run sees them. A resumed run
computes them again, in the same batches and so with the same bits.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cl_prompts.continual.streams.kept_rows import KeptRows, PrivateFile, record_size


class HiddenStates:
    """Hidden states [N, D] of images by row number, in tables by key.

    Args:
        max_bytes: limit on the size of all tables.
        folder: folder on the disk to use; None: that of temporary files.
    """

    def __init__(self, max_bytes: int, folder: Path | None) -> None:
        self.max_bytes, self.folder = max_bytes, folder
        self._tables: dict[Hashable, KeptRows] = {}
        self._dtype = torch.float32

    def __contains__(self, key: Hashable) -> bool:
        """Whether there is a table with this key."""
        return key in self._tables

    def begin(self, key: Hashable, hidden: Tensor, rows: int) -> bool:
        """Begin a table of the size of `hidden` [B, N, D].

        Args:
            key: key of the table.
            hidden: a first batch.
            rows: number of rows that count against the limit.

        Returns:
            Whether the rows fit into the limit.

        Raises:
            OSError: no file can be made.
        """
        shape = tuple(hidden.shape[1:])
        if rows * record_size(shape, np.float16) > self.max_bytes:
            return False
        self._dtype = hidden.dtype
        self._tables[key] = KeptRows(PrivateFile(self.folder), shape, np.float16)
        return True

    def add(self, key: Hashable, rows: Sequence[int], hidden: Tensor) -> None:
        """Keep the hidden states [B, N, D] of images; negative `rows` are padding.

        Raises:
            OSError: the disk is full.
        """
        values = hidden.to(torch.float16).cpu()
        if not values.isfinite().all():  # some of the largest networks have numbers above 65,504
            self.drop(key)
            return
        for row, states in zip(rows, values.numpy(), strict=True):
            if row >= 0:
                self._tables[key].write(row, states)

    def drop(self, key: Hashable) -> None:
        """Remove a table."""
        self._tables.pop(key, None)

    def of(self, key: Hashable, rows: Sequence[int]) -> Tensor:
        """Hidden states of rows, [B, N, D] on the CPU in the type that they were computed in; zeros for padding.

        Raises:
            OSError: a row cannot be read back.
        """
        table = self._tables[key]
        states = np.zeros((len(rows), *table.shape), np.float16)
        for place, row in enumerate(rows):
            if row < 0:
                continue
            found = table.read(row)
            if found is None:
                raise OSError(f"the kept hidden states of row {row} cannot be read back: resume the run")
            states[place] = found
        return torch.from_numpy(states).to(self._dtype)
