"""Full precision for what is no pass over images: changes of tasks, fits of classifiers, and changes of steps; float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


DEVICES = ("cpu", "cuda", "mps", "xpu")


def device_of_float64(device: torch.device) -> torch.device:
    """The `device` if it has float64; else, for Apple's, the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


@contextmanager
def without_autocast() -> Iterator[None]:
    """Autocast is disabled within, on every kind of device. As a decorator: `@without_autocast()`."""
    with ExitStack() as disabled:
        for kind in DEVICES:
            if torch.is_autocast_enabled(kind):
                disabled.enter_context(torch.autocast(kind, enabled=False))
        yield
