"""Images, models and feature providers for the tests of the query cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch import Tensor
from transformers import ViTModel

from cl_prompts import get_prompt_pool_model
from cl_prompts.continual import ClassIncrementalStream, ContinualArguments, Stream
from cl_prompts.continual.feature_cache.provider import FeatureProvider
from support.families import build
from support.methods import METHODS
from support.stream_data import birds


LABELS = [0, 1, 2, 3] * 6 + [0, 1]
TEST_LABELS = [0, 1, 2, 3] * 2
TASKS = [[0, 1], [2, 3]]


class Scaled:
    """Image -> [3, size, size], and says so."""

    def __init__(self, size: int = 32, mean: float = 0.5) -> None:
        self.size, self.mean = size, mean

    def settings(self) -> dict[str, Any]:
        return {"size": self.size, "mean": self.mean}

    def __call__(self, image: Any) -> Tensor:
        pixels = np.asarray(image.convert("RGB").resize((self.size, self.size)), dtype=np.float32)
        return torch.from_numpy(pixels / 255 - self.mean).permute(2, 0, 1)


class Unsaid(Scaled):
    """What it says cannot be written down."""

    def settings(self) -> Any:
        return {"mean": torch.zeros(3)}


def train_images() -> Dataset:
    return birds(LABELS)


def picture_stream(train: Any = None, *, tasks: Any = TASKS, transform: Any = None, **options: Any) -> Stream:
    """26 training and 8 test images of four classes."""
    rows = train_images() if train is None else train
    return ClassIncrementalStream(rows, birds(TEST_LABELS, 1), tasks, transform or Scaled(), **options)


def picture_model(method: str = "l2p", base: Any = None, **config: Any) -> Any:
    return get_prompt_pool_model(build("vit") if base is None else base, METHODS[method](**config))


def provider_of(
    folder: Path | str | None, model: Any = None, stream: Stream | None = None, **settings: Any
) -> FeatureProvider:
    AcceleratorState._reset_state(reset_partial_state=True)
    args = ContinualArguments(query_cache=None if folder is None else str(folder), **settings)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    return FeatureProvider(model or picture_model(), stream or picture_stream(), args, accelerator)


@contextmanager
def counted_passes() -> Iterator[list[int]]:
    """Images of each pass through a base. The hook is everybody's: one on the base would have no key."""
    found: list[int] = []

    def note(module: Any, args: Any, output: Any) -> None:
        if isinstance(module, ViTModel):
            found.append(len(output.last_hidden_state) if hasattr(output, "last_hidden_state") else len(output.logits))

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def shared_by_two(rank: int, folder: Path) -> dict[str, Any]:
    """What one of two processes gets from folders that both see, and that only one of them sees."""
    folders = {
        "cold": folder / "both",
        "warm": folder / "both",
        "half": folder / ("both" if rank == 0 else "other"),
        "one without": folder / "both" if rank == 0 else "",
        "damaged": folder / "both",
    }
    found: dict[str, Any] = {}
    for name, place in folders.items():
        if name == "damaged":
            if rank == 0:
                for file in (folder / "both").iterdir():
                    file.write_bytes(file.read_bytes()[:100])
            torch.distributed.barrier()
        with counted_passes() as passes:
            found[name] = provider_of(place).frozen_features(train=True).clone()
        found[f"{name}: passes"] = len(passes)
        torch.distributed.barrier()  # the main process has written
    return found
