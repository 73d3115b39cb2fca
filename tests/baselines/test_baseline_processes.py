"""Baselines on two processes learn what they learn on one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.comparison import OPTIONS, small_learner
from support.processes import in_two_processes
from support.small_runs import small_stream
from support.turns import in_this_run
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from cl_prompts.baselines import BASELINES
from cl_prompts.continual import JointStream, RehearsalMemory


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("baselines")]

PROCESSES, BATCH = 2, 4


def learn(name: str) -> dict[str, Tensor]:
    """Two tasks as the trainer takes them; all that was learnt. Nine images a task: one process's last share is padding."""
    stream: Any = small_stream(2)
    stream = JointStream(stream) if name == "joint" else stream
    learner = small_learner(name)
    memory = RehearsalMemory(9, seed=1) if learner.needs_memory else None

    def keep(rows: Any) -> None:
        if memory is not None:
            rank = learner.eval().rank_images(rows, images(rows)) if name == "icarl" else None
            memory.add(rows, stream.train_labels[rows], rank)

    def images(rows: Any) -> Any:
        return stream.images(rows, BATCH)

    for task in stream:
        learner.begin_task(task.classes, revisit=task.revisit)
        rows = task.train_rows[1:]
        if learner.replay == "memory_only":
            keep(rows)
        if learner.trains_task(task.number):
            # Plain SGD: Adam would turn the rounding of a gradient near zero into a step.
            optimizer = torch.optim.SGD(learner.parameter_groups(0.02))
            learner.attach_optimizer(optimizer)
            wrapped: Any = DistributedDataParallel(learner) if dist.is_initialized() else learner
            wrapped.train()
            beside = memory.rows if memory is not None and learner.replay == "mixed" else None
            for batch in stream.train_batches(
                task,
                BATCH,
                seed=3,
                epoch=0,
                rows=memory.rows if memory is not None and learner.replay == "memory_only" else rows,
                memory_rows=beside,
                memory_batch_size=3,
            ):
                wrapped(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        if learner.replay != "memory_only":
            keep(rows)
        learner.eval().consolidate(images(rows), images(memory.rows) if memory is not None else None)
        learner.end_task()
    kept = {} if memory is None else {"memory": torch.tensor(memory.rows)}
    return {name: tensor.detach().clone() for name, tensor in learner.training_state_dict()["tensors"].items()} | kept


def process(rank: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    try:
        torch.save({name: learn(name) for name in names}, Path(folder, f"{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("baselines")
    in_two_processes(process, str(folder), in_this_run(request, "name"))
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", BASELINES)
def test_two_processes_equal_one(name: str, two_processes: list[dict[str, dict[str, Tensor]]]) -> None:
    one = learn(name)
    for found in two_processes:
        assert found[name].keys() == one.keys()
        for key, values in one.items():
            two = found[name][key]
            if values.is_floating_point() and not key.endswith("counts"):
                assert_close(two, values, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
            else:
                assert torch.equal(two, values), key
    assert OPTIONS.keys() <= BASELINES.keys()
