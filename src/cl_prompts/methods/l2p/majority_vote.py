"""L2P's batch-wise selection, as in the released code. Only for comparison with published figures."""

from __future__ import annotations

from torch import Tensor

from cl_prompts.methods.shared.selection import histogram
from cl_prompts.runtime.distributed import sum_over_processes


def majority_vote(ids: Tensor, pool_size: int, valid: Tensor | None, *, over_processes: bool) -> Tensor:
    """The k prompts selected by most images of a batch; of equally many votes the lower number is first.

    Args:
        ids: prompts selected by each image [B, k].
        pool_size: number of prompts M.
        valid: images that vote [B]; None: all.
        over_processes: count the votes of all processes.

    Returns:
        ids [B, k]; all rows are equal.
    """
    votes = histogram(ids, pool_size, valid)
    if over_processes:
        votes = sum_over_processes(votes)
    elected = votes.argsort(descending=True, stable=True)[: ids.shape[1]]
    return elected.expand(ids.shape[0], -1)
