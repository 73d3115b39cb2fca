"""A trainer leaves alone what is not its own: another run's folder, the processes, and streams it cannot look at twice."""

import json
from pathlib import Path

import pytest
import torch
from support.families import build
from support.processes import in_two_processes
from support.small_runs import small_model, small_stream, small_trainer
from support.stream_data import birds, to_tensor

from cl_prompts.baselines import get_baseline
from cl_prompts.continual import ContinualArguments, ContinualTrainer, IterableClassIncrementalStream
from cl_prompts.heads import DiscriminantClassifier
from cl_prompts.storage.staging import ALIVE, PREFIX, STAGING


# ---- folders


def test_another_runs_folder_is_left_as_it_is(tmp_path: Path) -> None:
    small_trainer("l2p", tmp_path, tasks=1).train()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other = small_trainer("l2p", tmp_path, tasks=1, learning_rate=0.1)
    with pytest.raises(ValueError, match="are of another run, whose settings differ"):
        other.train()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_the_same_run_starts_over_and_removes_its_checkpoints_alone(tmp_path: Path) -> None:
    small_trainer("l2p", tmp_path, tasks=1).train()
    mine = tmp_path / "checkpoints" / "mine.txt"
    mine.write_text("kept")
    (tmp_path / "checkpoints" / f"{PREFIX}0{STAGING}").mkdir()  # of a run that was killed
    (tmp_path / "checkpoints" / f"{PREFIX}0{ALIVE}").touch()
    small_trainer("l2p", tmp_path, tasks=1).train()
    assert mine.read_text() == "kept"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3  # the last two and that file
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_trainer_trains_once(tmp_path: Path) -> None:
    trainer = small_trainer("l2p", tmp_path, tasks=1)
    trainer.train()
    before = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(ValueError, match="has trained already: make a new one"):
        trainer.train()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == before


def test_trackers_that_write_files_get_the_results_folder(tmp_path: Path) -> None:
    args = ContinualArguments(output_dir=str(tmp_path))
    trainer = ContinualTrainer(small_model("l2p"), small_stream(), args)
    assert str(trainer.accelerator.logging_dir) == str(tmp_path)


# ---- processes


def one_after_the_other(rank: int, folder: str) -> None:
    """Two trainings in the same processes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for _ in range(2):
        small_trainer("l2p", tasks=1).train()
        assert torch.distributed.is_initialized()
        assert torch.distributed.get_world_size() == 2
    Path(folder, f"{rank}.done").touch()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
def test_the_processes_stay_together(tmp_path: Path) -> None:
    in_two_processes(one_after_the_other, str(tmp_path))
    assert len(list(tmp_path.glob("*.done"))) == 2


# ---- streams that are read in order


@pytest.mark.parametrize("who", ["ewc", "discriminant", "alignment", "further classifier"])
def test_what_looks_twice_at_a_task_is_refused_before_it_learns(who: str) -> None:
    source = birds([0, 1, 2, 3]).to_iterable_dataset()
    stream = IterableClassIncrementalStream(source, source, [[0, 1], [2, 3]], to_tensor, train_images=[2, 2])
    config = {"discriminant": {"head": "discriminant"}, "alignment": {"alignment": "covariance"}}.get(who, {})
    model = get_baseline("ewc", build("vit")) if who == "ewc" else small_model("l2p", **config)
    extra = {"beside": DiscriminantClassifier(model.head.weight.shape[1])} if who == "further classifier" else {}
    with pytest.raises(ValueError, match="which this stream cannot read again: load the data set whole"):
        ContinualTrainer(model, stream, ContinualArguments(), classifiers=extra)
