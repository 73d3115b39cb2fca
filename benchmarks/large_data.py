"""Start and memory with large data sets: a folder of many small files, and a million images that are read in order.

    python benchmarks/large_data.py --files 50000
    python benchmarks/large_data.py --stream 1000000 --batches 400

The files are written to a temporary folder first, as FOLDER/SPLIT/CLASS/IMAGE. Then, in seconds of the clock and of the
CPU: the first start (the stream of ten tasks, to the first batch), a second one, and the key under which un-prompted
features are kept, for which all files are read. The images of the other source are made while they are read, so that
nothing is stored; the run stops after some batches. Its table has the resident memory along the way.
"""

import argparse
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Features, IterableDataset
from datasets import Image as ImageFeature
from growth import build, resident
from PIL import Image
from torch import Tensor

from cl_prompts import L2PConfig, get_prompt_pool_model
from cl_prompts.continual import IterableClassIncrementalStream, Stream
from cl_prompts.continual.feature_cache.key import query_digest
from cl_prompts.continual.streams.indexed import IndexedStream
from cl_prompts.evaluation.report import machine
from cl_prompts.runs.images import load_stream


CLASSES, TASKS = 100, 10
FEATURES = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(n) for n in range(CLASSES)])})


class Small:
    """Transform: image -> float tensor [3, 16, 16]."""

    def __call__(self, image: Any) -> Tensor:
        """The tensor of an image."""
        return torch.from_numpy(np.asarray(image.convert("RGB")) / np.float32(255)).permute(2, 0, 1)

    def settings(self) -> dict[str, Any]:
        """For the key of features."""
        return {}


def png(number: int) -> bytes:
    """The file of an image of 16 pixels; no two numbers have the same."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[0, :3] = np.frombuffer(number.to_bytes(9, "little"), np.uint8).reshape(3, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Images that are made when they are asked for, all classes in turn."""
    for number in range(count):
        yield {"image": {"bytes": png(number), "path": None}, "label": number % CLASSES}


def measured(what: str, call: Callable[[], Any]) -> Any:
    """The result of a call; prints a row with its time."""
    clock, cpu = time.perf_counter(), time.process_time()
    result = call()
    print(f"| {what} | {time.perf_counter() - clock:.2f} | {time.process_time() - cpu:.2f} |", flush=True)
    return result


def first_batch(stream: Stream) -> Iterator[dict[str, Any]]:
    """The batches of the first task, after the first one."""
    batches = iter(stream.train_batches(stream.tasks[0], 64, seed=0, epoch=0))
    next(batches)
    return batches


def files(count: int) -> None:
    """The table of a folder of files."""
    with TemporaryDirectory() as folder:
        for number, row in enumerate(rows(count)):
            split = "test" if number % 1000 < CLASSES else "train"
            path = Path(folder, split, f"{row['label']:03d}", f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row["image"]["bytes"])
        print(f"\n| {count:,} files | seconds | CPU seconds |\n|---|---:|---:|")

        def start() -> Stream:
            stream = load_stream("class", folder, Small(), tasks=TASKS)
            first_batch(stream)
            return stream

        measured("first start", start)
        stream = measured("second start", start)
        assert isinstance(stream, IndexedStream)
        model, every = get_prompt_pool_model(build(), L2PConfig()), np.arange(len(stream.train))
        key = lambda: query_digest(model, stream, every, train=True, together=64, device=torch.device("cpu"))  # noqa: E731
        measured("key of un-prompted features", key)


def stream(count: int, batches: int) -> None:
    """The table of a source that is read in order."""
    print(f"\n| {count:,} images in order | seconds | CPU seconds |\n|---|---:|---:|")

    def start() -> Iterator[dict[str, Any]]:
        source = IterableDataset.from_generator(rows, gen_kwargs={"count": count}, features=FEATURES)
        tasks = np.arange(CLASSES).reshape(TASKS, -1).tolist()
        return first_batch(IterableClassIncrementalStream(source, source, tasks, Small(), buffer_size=1000))

    rest = measured("start", start)
    print("\n| images of the task | resident MB |\n|---:|---:|")
    for number in range(1, batches):
        next(rest)
        if (number + 1) % max(batches // 8, 1) == 0:
            print(f"| {64 * (number + 1):,} | {resident():.0f} |", flush=True)


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=0, help="number of files")
    parser.add_argument("--stream", type=int, default=0, help="number of images that are read in order")
    parser.add_argument("--batches", type=int, default=400, help="batches of 64 after which the run stops")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    if args.files:
        files(args.files)
    if args.stream:
        stream(args.stream, args.batches)


if __name__ == "__main__":
    main()
