"""Two gloo processes see the batches of one, and count what they could not read together, also after a resume."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from support.processes import become, free_port, in_two_processes
from support.query_images import Scaled
from support.small_runs import Stop, StopAt, small_model
from support.stream_data import birds, to_tensor

from cl_prompts.continual import (
    ClassIncrementalStream,
    ContinualArguments,
    ContinualTrainer,
    CropAndFlip,
    GaussianStream,
    IterableClassIncrementalStream,
    TrainerCallback,
    TrainerState,
)


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("distributed")]

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


def process(rank: int, port: int, folder: str) -> None:
    become(rank, port)
    torch.distributed.init_process_group("gloo")
    found = {"batches": batches(), "killed": killed_twice(folder)}
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of them found."""
    folder = tmp_path_factory.mktemp("processes")
    in_two_processes(process, free_port(), str(folder))
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(PROCESSES)]


def test_two_processes_see_the_batches_of_one(two_processes: list[dict[str, Any]]) -> None:
    one = batches()
    parts = [found["batches"] for found in two_processes]
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


# ---- a run that is killed ------------------------------------------------------------------------------------------------


UNREADABLE = (0, 4, 9, 13)  # of the first task


class Counts(TrainerCallback):
    """What has been skipped when a run begins or goes on, and when it ends."""

    def __init__(self) -> None:
        self.found: list[tuple[dict[str, list[int]], int]] = []

    def on_train_begin(self, state: TrainerState) -> None:
        self.found.append(
            ({split: list(rows) for split, rows in state.stream.skipped.items()}, state.stream.count_skipped())
        )

    on_train_end = on_train_begin


def skipping_trainer(folder: str, *callbacks: TrainerCallback) -> ContinualTrainer:
    """24 training images in two tasks of three steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    stream = ClassIncrementalStream(
        birds(LABELS[:24], bad=UNREADABLE), birds([0, 1, 2, 3] * 2), [[0, 1], [2, 3]], Scaled(), on_bad_image="skip"
    )
    args = ContinualArguments(folder, num_train_epochs=1, batch_size=4, save_steps=1, cache_queries=False)
    return ContinualTrainer(small_model("l2p"), stream, args, callbacks=callbacks)


def killed_twice(folder: str) -> tuple[list[int], list[tuple[dict[str, list[int]], int]]]:
    """A run that is killed in the second task, whose images can all be read, resumed, killed again, and resumed.

    Returns:
        What this process has skipped at the first kill, and what `Counts` found.
    """
    counts, own = Counts(), []
    for number, step in enumerate((4, 5)):
        trainer = skipping_trainer(folder, counts, StopAt(step))
        with pytest.raises(Stop):
            trainer.train(resume=number > 0)
        own.append(trainer.stream.skipped["train"])
    skipping_trainer(folder, counts).train(resume=True)
    return own[0], counts.found


def test_a_resumed_run_counts_what_every_process_has_skipped(two_processes: list[dict[str, Any]]) -> None:
    first, counts = zip(*(found["killed"] for found in two_processes), strict=True)
    assert all(first), "each process met some"
    assert sorted({*first[0], *first[1]}) == list(UNREADABLE)
    everything = ({"train": list(UNREADABLE), "test": []}, len(UNREADABLE))
    for start, *later in counts:
        assert start == ({"train": [], "test": []}, 0)
        assert later == [everything] * 3, "at the first resume, at the second, at the end"
