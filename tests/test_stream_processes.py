"""Two gloo processes see the batches of one, and count what they could not read together."""

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stream_data import birds, to_tensor

from cl_prompts.continual import ClassIncrementalStream, CropAndFlip, GaussianStream, IterableClassIncrementalStream


pytestmark = pytest.mark.xdist_group("distributed")

LABELS = [0, 1, 2, 3] * 6 + [0, 1]
BAD = (2, 5, 24)
PROCESSES = 2


def batches() -> dict[str, list[dict[str, Any]]]:
    """This process's share of everything."""
    data = birds(LABELS, bad=BAD)
    more: dict[str, Any] = dict(augmentation=CropAndFlip(), on_bad_image="skip")
    stream = ClassIncrementalStream(data, data, [[0, 1], [2, 3]], to_tensor, **more)
    gaussian = GaussianStream(data, data, to_tensor, **more)
    source = data.to_iterable_dataset(num_shards=3)
    in_order = IterableClassIncrementalStream(source, source, [[0, 1], [2, 3]], to_tensor, **more)
    rehearsal: dict[str, Any] = dict(memory_rows=[0, 4, 8, 12, 24], memory_batch_size=3)
    found: dict[str, Any] = {
        "rows": list(stream.train_batches(stream.tasks[0], 4, seed=1, epoch=1)),
        "rehearsal": list(stream.train_batches(stream.tasks[1], 4, seed=1, epoch=1, **rehearsal, start=1)),
        "test": list(stream.test_batches(stream.tasks[0], 4)),
        "gaussian": list(gaussian.train_batches(gaussian.tasks[0], 4, seed=1, epoch=0)),
        "in order": list(in_order.train_batches(in_order.tasks[0], 4, seed=1, epoch=1)),
    }
    found["skipped"] = [stream.count_skipped(), gaussian.count_skipped(), in_order.count_skipped()]
    found["fingerprint"] = [stream.fingerprint(), gaussian.fingerprint(), in_order.fingerprint()]
    return found


def process(rank: int, folder: str, path: list[str]) -> None:
    sys.path[:] = path
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(batches()))
    torch.distributed.destroy_process_group()


def test_two_processes_see_the_batches_of_one(tmp_path: Path) -> None:
    one = batches()
    torch.multiprocessing.spawn(process, (str(tmp_path), sys.path), nprocs=PROCESSES)
    parts = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(PROCESSES)]
    for name in ("skipped", "fingerprint"):
        assert parts[0][name] == parts[1][name] == one[name]
    assert one["skipped"] == [5, 3, 2]
    for name in ("rows", "rehearsal", "test", "gaussian", "in order"):
        for whole, *shares in zip(one[name], *(part[name] for part in parts), strict=True):
            assert len({len(share["labels"]) for share in shares}) == 1
            expected = images_of([whole])
            found = images_of(shares)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[i][0], x) and found[i][1] == label for i, (x, label) in expected.items())
            assert sum(sum(i >= 0 for i in share["sample_ids"]) for share in shares) == len(expected), "each once"


def images_of(batches: list[dict[str, Any]]) -> dict[int, tuple[Any, int]]:
    """Image and label of each real image by its number."""
    return {
        i: (x, label)
        for batch in batches
        for i, x, label in zip(batch["sample_ids"], batch["pixel_values"], batch["labels"].tolist(), strict=True)
        if i >= 0
    }
