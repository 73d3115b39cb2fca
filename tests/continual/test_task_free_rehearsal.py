"""Rehearsal on a stream without tasks: the memory fills while the images pass, and joins every batch after the first."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_runs import Stop, StopAt, small_model, small_stream, tensors

from cl_prompts.continual import ContinualArguments, ContinualTrainer, GaussianStream, TrainerCallback


class Seen(TrainerCallback):
    """Notes which images each step was shown."""

    def __init__(self, trainer: ContinualTrainer) -> None:
        self.batches: list[list[int]] = []
        stream = trainer.stream
        train_batches = stream.train_batches

        def noted(*args: Any, **options: Any) -> Any:
            for batch in train_batches(*args, **options):
                self.batches.append(batch["sample_ids"])
                yield batch

        stream.train_batches = noted  # type: ignore[method-assign]


def new_trainer(folder: Path, callbacks: list[TrainerCallback] | None = None, **settings: Any) -> ContinualTrainer:
    known = small_stream()
    stream = GaussianStream(known.train, known.test, known.transform, seed=0)
    args: dict[str, Any] = dict(output_dir=str(folder), num_train_epochs=1, batch_size=4, save_steps=1, memory_size=6)
    model = small_model("l2p", class_mask="none", num_labels=6)
    return ContinualTrainer(model, stream, ContinualArguments(**args | settings), callbacks=callbacks or [])


@pytest.mark.parametrize("size", [6, 20])
def test_remembered_images_join_every_batch_after_the_first(tmp_path: Path, size: int) -> None:
    trainer = new_trainer(tmp_path, memory_batch_size=3, memory_size=size)
    seen = Seen(trainer)
    trainer.train()
    passed: set[int] = set()
    for number, ids in enumerate(seen.batches):
        new, rehearsed = ids[:-3] if number else ids, ids[-3:] if number else []
        assert not passed & set(new)
        assert set(rehearsed) <= passed
        assert len(set(rehearsed)) == len(rehearsed)
        passed |= set(new)
    assert len(seen.batches) == 8
    assert passed == set(range(30))
    assert trainer.memory is not None
    kept = trainer.memory.rows.tolist()
    assert len(set(kept)) == len(kept) == size


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_ends_with_the_numbers_of_the_whole(tmp_path: Path, step: int, workers: int) -> None:
    whole = new_trainer(tmp_path / "whole")
    seen = Seen(whole)
    whole.train()
    with pytest.raises(Stop):
        new_trainer(tmp_path / "killed", [StopAt(step)], dataloader_num_workers=workers).train()
    resumed = new_trainer(tmp_path / "killed", dataloader_num_workers=workers)
    rest = Seen(resumed)
    resumed.train(resume=True)
    assert rest.batches == seen.batches[-len(rest.batches) :]
    ours, theirs = tensors(resumed), tensors(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
