"""Which images of the current task a method's statistics have counted, so that several epochs count none twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cl_prompts.runtime.distributed import gather_over_processes, process_number


class SampleCounter:
    """Numbers of the images seen in training since the current task began, the same on every process."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def clear(self) -> None:
        """Forget all images: a new task begins."""
        self._seen = set()

    def first_seen(self, sample_ids: Sequence[int] | Tensor | None, valid: Tensor) -> Tensor:
        """Which images of a batch are real and not seen before in this task, and note them as seen.

        Args:
            sample_ids: a number per image [B], the same in every epoch; negative for padding. None: no image is known
                again, so every valid one is new.
            valid: True for real images, False for padding [B].

        Returns:
            bool [B].

        Raises:
            TypeError, ValueError: as `checked_ids`.
        """
        own = checked_ids(sample_ids, valid)
        if own is None:
            return valid
        own = own.masked_fill(~valid.cpu(), -1)
        rank = process_number()
        mine: list[bool] = []
        for process, ids in enumerate(gather_over_processes(own)):
            for i in ids.tolist():
                new = i >= 0 and i not in self._seen
                if new:
                    self._seen.add(i)
                if process == rank:
                    mine.append(new)
        return torch.tensor(mine, device=valid.device)

    def state_dict(self) -> dict[str, Tensor]:
        """`seen`: the numbers of the images seen, ascending int64 [n]."""
        return {"seen": torch.tensor(sorted(self._seen), dtype=torch.int64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state` that `state_dict` returned."""
        self._seen = set(state["seen"].tolist())


def checked_ids(sample_ids: Sequence[int] | Tensor | None, valid: Tensor) -> Tensor | None:
    """`sample_ids` as int64 [B] on the CPU, for images `valid` [B]; None stays None.

    Raises:
        TypeError: they are not integers.
        ValueError: there is not one per image.
    """
    if sample_ids is None:
        return None
    if len(sample_ids) != len(valid):
        raise ValueError(f"{len(sample_ids)} sample_ids for {len(valid)} images: give one per image")
    try:
        ids = torch.as_tensor(sample_ids, device="cpu")
    except (ValueError, TypeError, RuntimeError) as error:
        raise TypeError(f"sample_ids must be integers, one per image ({error})") from error
    if ids.dim() != 1 or ids.is_floating_point():
        raise TypeError(f"sample_ids must be integers, one per image, got {ids.dtype} of shape {list(ids.shape)}")
    return ids.long()
