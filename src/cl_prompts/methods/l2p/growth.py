"""L2P's pool that grows with the tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cl_prompts.methods.shared.initialization import initial


def grow(pool: Any, tasks: int) -> None:
    """Add the prompts, keys and counts of `tasks` more tasks to an `L2PPool`, by its config's `grow_by` and `max_size`."""
    config, size = pool.config, len(pool.prompts)
    room = max(config.max_size - size, 0) if config.max_size is not None else config.grow_by * tasks
    count = min(config.grow_by * tasks, room)
    if not count:
        return
    pool.prompts = _with_rows(pool.prompts, config.prompt_init, count)
    if pool.keys is not None:
        pool.keys = _with_rows(pool.keys, config.key_init, count)
    pool.history.widen(count)


def _with_rows(table: nn.Parameter, init: str, count: int) -> nn.Parameter:
    """A table of prompts or keys with `count` new rows. The old ones stay bit-equal."""
    fresh = initial(init, count, *table.shape[1:]).detach().to(table)
    return nn.Parameter(torch.cat([table.detach(), fresh]), table.requires_grad)
