"""Cache key of un-prompted features: images, transform, backbone, libraries and hardware. Equal keys mean equal features.

If one of them has no key (a transform without `settings()`, a backbone with code from outside transformers), features are
kept in memory only.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

import cl_prompts
from cl_prompts.continual.streams.indexed import IndexedStream
from cl_prompts.continual.streams.loading import Rows, rank_and_processes
from cl_prompts.interfaces import NotCacheableError
from cl_prompts.learner.protocol import Learner
from cl_prompts.runtime.cpu import processor
from cl_prompts.runtime.distributed import gather_over_processes, world_size
from cl_prompts.runtime.images import UnreadableImage


LIBRARIES = ("cl-prompts", "torch", "torchvision", "transformers", "datasets", "pillow", "numpy", "flash-attn")
OWN_CODE = (
    "tuner/forward.py",
    "evaluation/evaluate.py",
    "continual/streams/*.py",
    "backbones/*.py",
    "runtime/images.py",
)
BACKENDS = (
    *("fp32_precision", "cuda.matmul.fp32_precision", "cudnn.conv.fp32_precision", "cudnn.enabled", "cudnn.benchmark"),
    *("cudnn.deterministic", "mkldnn.enabled", "mkldnn.matmul.fp32_precision", "mkldnn.conv.fp32_precision"),
    *("cuda.matmul.allow_bf16_reduced_precision_reduction", "cuda.matmul.allow_fp16_reduced_precision_reduction"),
)
SWITCHES = ("ONEDNN_", "DNNL_", "MKL_", "CUBLAS_", "NVIDIA_TF32_OVERRIDE")  # environment variables that kernels read
READ_AT_ONCE = 64  # rows


def query_digest(
    model: Learner,
    stream: IndexedStream,
    rows: Rows,
    *,
    train: bool,
    together: int,
    device: torch.device,
    augmented_by: tuple[int, int] | None = None,
) -> bytes:
    """Sha256 of everything that features of rows of a stream depend on, with this process's share of the images.

    It does not depend on tasks, labels or prompts, nor on the seed unless images are augmented. So other methods and task
    orders get the same digest.

    Args:
        model: the learner, not wrapped, in the mode and under the precision of the pass.
        stream: the stream.
        rows: row numbers of the images.
        train: True for the training set, False for the test set.
        together: batch size of the pass.
        device: the backbone's device.
        augmented_by: (seed, epoch) of the augmentation; None: not augmented.

    Raises:
        NotCacheableError: one of these has no key.
    """
    base = _as_json("the backbone", model.cache_key())
    transform = _as_json("the transform", _transform(stream.transform))
    settings = [_numerics(device), base, transform, stream.on_bad_image, stream.max_pixels, together, world_size()]
    if augmented_by is not None and stream.augmentation is not None:
        seed, epoch = augmented_by
        settings.append([asdict(stream.augmentation), seed, stream.augmentation.view(epoch)])
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for part in _images(stream, rows, train=train):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def agreed_key(digest: bytes | None, device: torch.device) -> str | None:
    """One key, 64 hexadecimal digits, from the digests of all processes; None if one has no digest. All must call it."""
    parts = gather_over_processes(torch.tensor([list(digest or bytes(32))], dtype=torch.uint8, device=device))
    if not all(part.any() for part in parts):
        return None
    return hashlib.sha256(torch.cat(parts).cpu().numpy().tobytes()).hexdigest()


# ---- software and hardware -----------------------------------------------------------------------------------------------


def _numerics(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and precision. If they differ, the last bits of features may differ."""
    backends = torch.backends
    return {
        "versions": {name: _version(name) for name in LIBRARIES},
        "code": _own_code(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": [processor(), backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        "autocast": str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else None,
        "backends": [attrgetter(name)(backends) for name in BACKENDS],
        "kernels": [kernel() for kernel in (backends.cuda.flash_sdp_enabled, backends.cuda.mem_efficient_sdp_enabled)],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(SWITCHES)},
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


@cache
def _own_code() -> str:
    """Sha256 of this library's files that a pass uses. A change in them may change features.

    Raises:
        FileNotFoundError: a pattern in `OWN_CODE` matches no file. Changes of the file it was for would not be detected.
    """
    home = Path(cl_prompts.__file__).parent
    files: list[Path] = []
    for pattern in OWN_CODE:
        matches = sorted(home.glob(pattern))
        if not matches:
            raise FileNotFoundError(f"no file of cl_prompts matches {pattern!r}: update OWN_CODE")
        files += matches
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


# ---- the images ----------------------------------------------------------------------------------------------------------


def _transform(transform: Any) -> list[Any]:
    """Class, source code and settings of the image transform."""
    kind, settings = type(transform), getattr(transform, "settings", None)
    if not callable(settings):
        name = getattr(transform, "__qualname__", kind.__qualname__)
        raise NotCacheableError(f"the transform {name} has no settings(): give it one that returns all of them, as JSON")
    try:
        sources = [inspect.getsource(part) for part in kind.__mro__ if part is not object]
    except (OSError, TypeError) as error:
        raise NotCacheableError(f"the source code of the transform {kind.__qualname__} cannot be read") from error
    return [kind.__module__, kind.__qualname__, sources, settings()]


def _images(stream: IndexedStream, rows: Rows, *, train: bool) -> Iterator[bytes]:
    """Row numbers and contents of this process's share of the images, as bytes."""
    column = stream.column_of("train" if train else "test", stream.train if train else stream.test)
    own = np.array_split(rows, world_size())[rank_and_processes()[0]]
    yield np.ascontiguousarray(own, dtype="<i8").tobytes()
    yield str(len(stream.train_labels if train else stream.test_labels)).encode()
    if column.files is not None:
        yield repr([column.mode, column.format]).encode()
        for start in range(0, len(own), READ_AT_ONCE):
            for cell in column.files[own[start : start + READ_AT_ONCE].tolist()][column.name]:
                yield _file(cell)
        return
    for row in own.tolist():
        try:
            yield _content(column.read(row, stream.max_pixels))
        except UnreadableImage as error:
            raise NotCacheableError(f"row {row} cannot be read ({error})") from error


def _file(cell: Any) -> bytes:
    """An encoded image: its bytes in the data set or, if it has none, those of its file."""
    if cell is None:
        return b""
    try:
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
    except (OSError, TypeError) as error:
        raise NotCacheableError(f"the file of an image cannot be read ({error})") from error


def _content(image: Any) -> bytes:
    """Contents of a decoded image. Paths and numbers are refused: the image that they refer to may change."""
    if isinstance(image, PIL.Image.Image):
        metadata = [image.mode, image.size, image.getpalette(), image.info, dict(image.getexif())]
        return json.dumps(metadata, default=repr).encode() + image.tobytes()
    if isinstance(image, Tensor):
        kind = [str(image.dtype), list(image.shape)]
        image = image.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    elif isinstance(image, np.ndarray) and not image.dtype.hasobject:
        kind = [image.dtype.str, list(image.shape)]
    else:
        raise NotCacheableError(f"the contents of an image of type {type(image).__name__} cannot be read")
    return json.dumps(kind).encode() + image.tobytes()


def _as_json(whose: str, settings: Any) -> str:
    try:
        return json.dumps(settings, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise NotCacheableError(f"settings of {whose} cannot be written as JSON ({error})") from error
