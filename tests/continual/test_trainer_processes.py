"""ContinualTrainer on two processes: they learn and log what one does, and send no more than they must."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.matrices import assert_same_matrix
from support.processes import become, free_port, in_two_processes
from support.query_images import provider_of, shared_by_two
from support.small_runs import small_trainer, tensors
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from cl_prompts.continual import TrainerCallback, TrainerState


# Batches of 6 or 4 over 10 images, or 6 where some are left out for calibration: the last one has 4 or 2. More methods:
# test_distributed.py and others beside it.
RUNS: dict[str, dict[str, Any]] = {
    "hash": {"method": "hash", "max_grad_norm": 0.5, "batch_size": 6},
    "l2p accumulated": {"method": "l2p", "gradient_accumulation_steps": 2, "calibration_share": 0.4},
    "l2p rehearsal": {"method": "l2p", "config": {"class_mask": "none"}, "memory_size": 5, "memory_batch_size": 3},
}


class Logs(TrainerCallback):
    """What a process is given to log."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_log(self, state: TrainerState, logs: dict[str, float]) -> None:
        self.found.append(dict(logs))


def results(run: str, folder: Path) -> dict[str, Any]:
    """What a run ends with, killed and resumed on the way."""
    settings = {**RUNS[run], "tasks": 2, "learning_rate": 1e-3}
    logs = Logs()
    trainer = small_trainer(settings.pop("method"), folder, callbacks=[logs], logging_steps=1, **settings)
    broadcasts: list[bool] = []
    left_out: list[int] = []

    def look(*_: Any) -> None:
        wrapper = DistributedDataParallel._get_active_ddp_module()
        if wrapper is not None:
            broadcasts.append(wrapper.will_sync_module_buffers())
            left_out.append(len(wrapper.parameters_to_ignore))

    trainer.model.register_forward_pre_hook(look)
    trainer.train()
    return {
        "tensors": tensors(trainer),
        "matrix": trainer.matrix.to_dict(),
        "logs": logs.found,
        "broadcasts": broadcasts,
        "left out": left_out,
        "frozen": sum(not p.requires_grad for p in trainer.model.parameters()),
    }


def wrong_label_on(one: int, rank: int) -> str:
    """The error of a run in which a process saw a wrong label on its device, one step before the next log entry."""

    class Wrong(TrainerCallback):
        def on_step_end(self, state: TrainerState, task: Any) -> None:
            if rank == one and state.progress.global_step == 1:
                tasks: Any = state.model.adapter.tasks  # type: ignore[attr-defined]
                tasks.unknown_labels += 1

    try:
        small_trainer("l2p", callbacks=[Wrong()], logging_steps=2).train()
    except ValueError as error:
        return str(error)
    return ""


def one_of_two(rank: int, port: int, folder: str) -> None:
    become(rank, port)
    found = {}
    for number, run in enumerate(RUNS):
        if number:
            from accelerate.state import AcceleratorState

            assert AcceleratorState().num_processes == 2
        found[run] = results(run, Path(folder) / "two" / run)
    found["wrong label"] = wrong_label_on(1, rank)
    found["query cache"] = shared_by_two(rank, Path(folder) / "queries")
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("processes")
    in_two_processes(one_of_two, free_port(), str(folder))
    two = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return {run: results(run, folder / "one" / run) for run in RUNS}, two


@pytest.mark.xdist_group("trainer-processes")
@pytest.mark.parametrize("run", RUNS)
def test_two_processes_equal_one(run: str, runs: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    one, two = runs[0][run], [found[run] for found in runs[1]]
    assert two[0]["matrix"] == two[1]["matrix"]
    assert_same_matrix(two[0]["matrix"], one["matrix"])
    for name, tensor in one["tensors"].items():
        for found in two:
            if tensor.is_floating_point():
                # float32 sums in another order; what is made of statistics of features is as exact as they are
                assert_close(found["tensors"][name], tensor, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
            else:
                assert torch.equal(found["tensors"][name], tensor), name


@pytest.mark.xdist_group("trainer-processes")
@pytest.mark.parametrize("run", RUNS)
def test_two_processes_log_what_one_logs(run: str, runs: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    one, two = runs[0][run]["logs"], [found[run]["logs"] for found in runs[1]]
    assert two[0] == two[1], "each process logs the same"
    for ours, expected in zip(two[0], one, strict=True):
        speeds = [logs.pop("images_per_second") for logs in (ours, expected)]
        assert min(speeds) > 0
        assert ours == pytest.approx(expected, abs=1e-4)


@pytest.mark.xdist_group("trainer-processes")
def test_steps_send_gradients_and_no_buffers(runs: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    """Buffers grow with tasks and classes: earlier prompts, statistics."""
    sent = [found["hash"]["broadcasts"] for found in runs[1]]
    assert all(sent)
    assert not any(map(any, sent))


@pytest.mark.xdist_group("trainer-processes")
def test_the_frozen_backbone_is_sent_once(runs: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    for found in runs[1]:
        left_out = found["hash"]["left out"]
        assert left_out[0] == 0, "by the first task"
        assert left_out[-1] == found["hash"]["frozen"] > 0, "by later ones"


@pytest.mark.xdist_group("trainer-processes")
def test_a_wrong_label_on_one_process_stops_all(runs: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    assert ["1 labels are of no declared class" in part["wrong label"] for part in runs[1]] == [True, True]


@pytest.mark.xdist_group("trainer-processes")
def test_two_processes_share_kept_queries(runs: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    found = [part["query cache"] for part in runs[1]]
    alone = provider_of("").frozen_features(train=True)
    for name in ("cold", "warm", "half", "one without", "damaged"):
        for part in found:
            assert torch.equal(part[name], found[0]["cold"]), name
            assert part[f"{name}: passes"] == (0 if name == "warm" else 1), f"{name}: all compute together, or none"
    assert_close(found[0]["cold"], alone, atol=1e-5, rtol=0)
