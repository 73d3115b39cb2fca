"""ContinualTrainer on tiny models: what it trains, what it tells, what it refuses, and that two processes equal one."""

import gc
import platform
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build
from support.matrices import assert_same_matrix
from support.processes import become, free_port, in_two_processes
from support.query_images import provider_of, shared_by_two
from support.small_runs import small_model, small_stream, small_trainer, tensors
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from transformers import HfArgumentParser

from cl_prompts import L2PConfig, get_prompt_pool_model
from cl_prompts.continual import ContinualArguments, ContinualTrainer, GaussianStream, TrainerCallback, TrainerState
from cl_prompts.continual.batches import micro_batches
from cl_prompts.continual.optimization import build_optimizer, keep_state, rate_factor
from cl_prompts.continual.training_step import Throughput
from cl_prompts.heads import DiscriminantClassifier


# ---- the loop ------------------------------------------------------------------------------------------------------------


def test_it_does_what_a_plain_loop_does() -> None:
    trainer = small_trainer("hash", optim="adamw", optim_args={"weight_decay": 0.1}, max_grad_norm=0.5)
    trainer.train()
    assert trainer.result().seconds > 0, "measured without a results folder, too"
    model, stream = small_model("hash"), small_stream()
    for task in stream:
        model.begin_task(task.classes)
        optimizer = torch.optim.AdamW(model.parameter_groups(5e-3), weight_decay=0.1)
        model.attach_optimizer(optimizer)
        model.train()
        for epoch in range(2):
            for batch in stream.train_batches(task, 4, seed=0, epoch=epoch):
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        model.end_task()
    for name, tensor in model.training_state_dict()["tensors"].items():
        assert torch.equal(tensor, tensors(trainer)[name]), name
    model.eval()
    for number, task in enumerate(stream):
        (batch,) = stream.test_batches(task, 99)
        answers = torch.tensor(model.classes)[model(batch["pixel_values"]).logits.argmax(1)]
        assert trainer.matrix.columns[-1][number] == 100 * (answers == batch["labels"]).double().mean()


def test_callbacks_come_in_order(tmp_path: Path) -> None:
    class Diary(TrainerCallback):
        def __init__(self) -> None:
            self.events: list[str] = []

    events = [name for name in vars(TrainerCallback) if name.startswith("on_")]
    for event in events:
        setattr(Diary, event, lambda self, state, *_, event=event: self.events.append(event.removeprefix("on_")))
    diary = Diary()
    small_trainer("l2p", tmp_path, tasks=2, num_train_epochs=1, callbacks=[diary], logging_steps=2, save_steps=3).train()
    step, end = ["step_begin", "step_end"], ["epoch_end", "save", "evaluate", "task_end", "save"]
    one = ["task_begin", "epoch_begin", *step, *step, "log", *step, "save", *end]
    two = ["task_begin", "epoch_begin", *step, "log", *step, *step, "log", "save", *end]
    assert diary.events == ["train_begin", *one, *two, "train_end"]


@pytest.mark.parametrize(("most", "steps"), [(2, 2), (4, 4), (99, 6), (0, 6)])
def test_a_dry_run_ends_each_task_after_its_steps(most: int, steps: int) -> None:
    """Of two epochs of three steps."""
    trainer = small_trainer("none", tasks=2, num_train_epochs=2, max_steps=most)
    trainer.train()
    assert trainer.progress.global_step == 2 * steps


def test_every_task_trains_in_the_precision_that_was_asked_for() -> None:
    trainer = small_trainer("l2p", mixed_precision="bf16", num_train_epochs=1)
    seen: set[tuple[int, bool, torch.dtype]] = set()

    def look(module: Any, args: Any, output: Tensor) -> None:
        seen.add((trainer.progress.task, trainer.model.training, output.dtype))

    layer = next(m for name, m in trainer.model.get_base_model().named_modules() if name.endswith("fc1"))
    layer.register_forward_hook(look)
    trainer.train()
    assert seen == {(task, training, torch.bfloat16) for task in range(3) for training in (True, False)}


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="reads the CPU's flags")
def test_bf16_warns_on_a_processor_without_avx512() -> None:
    slow = "avx512bw" not in Path("/proc/cpuinfo").read_text()
    for precision in ("no", "bf16"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            small_trainer("l2p", mixed_precision=precision)
        told = any("mixed_precision" in str(warning.message) for warning in caught)
        assert told == (slow and precision == "bf16")


def test_pieces_of_a_batch_make_the_same_step() -> None:
    whole = small_trainer("hash", max_grad_norm=0.5, learning_rate=1e-3)
    whole.train()
    pieces = small_trainer("hash", max_grad_norm=0.5, learning_rate=1e-3, gradient_accumulation_steps=3)
    pieces.train()
    for name, tensor in tensors(whole).items():
        assert_close(tensors(pieces)[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


def test_micro_batches() -> None:
    batch = {"labels": torch.arange(7), "sample_ids": list(range(7))}
    for pieces, sizes in ((1, [7]), (2, [4, 3]), (3, [3, 3, 1]), (9, [1] * 7)):
        parts = micro_batches(batch, pieces)
        assert [len(part["labels"]) for part in parts] == sizes
        assert [i for part in parts for i in part["sample_ids"]] == batch["sample_ids"]


def test_memory_does_not_grow() -> None:
    alive: list[int] = []

    class Count(TrainerCallback):
        def on_task_end(self, state: TrainerState, task: Any) -> None:
            gc.collect()
            alive.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))

    small_trainer("dualprompt", callbacks=[Count()]).train()
    small_trainer("dualprompt", callbacks=[Count()]).train()
    # What a task adds is the same for the last two tasks, whatever went before.
    assert alive[2] - alive[1] <= alive[1] - alive[0]


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    trainer = small_trainer("l2p", learning_rate=1e30, optim="sgd", logging_steps=1)
    with pytest.raises(FloatingPointError, match=r"task 0, epoch 0, step .*lower the learning rate"):
        trainer.train()


def test_forward_transfer_is_measured_where_classes_are_known() -> None:
    stream = small_stream()
    again = [replace(stream.tasks[0], number=n, classes=[4, 1], revisit=n > 0) for n in range(len(stream))]
    stream.tasks = again
    args = ContinualArguments(num_train_epochs=1, batch_size=4, forward_transfer=True)
    trainer = ContinualTrainer(small_model("l2p"), stream, args)
    trainer.train()
    assert set(trainer.matrix.before) == set(trainer.matrix.baseline) == {1, 2}
    # The same images every time: before task i is after task i - 1.
    assert [trainer.matrix.before[i] for i in (1, 2)] == [trainer.matrix.columns[i - 1][0] for i in (1, 2)]
    assert "fwt" in trainer.matrix.summary()


def test_classifiers_beside_the_learner_change_nothing_in_it() -> None:
    alone = small_trainer("l2p")
    alone.train()
    beside = small_trainer("l2p", classifiers={"other": DiscriminantClassifier(32)})
    beside.train()
    assert alone.matrix == beside.matrix
    for name, tensor in tensors(alone).items():
        assert torch.equal(tensor, tensors(beside)[name]), name
    assert len(beside.extra_classifiers.matrices["other"].columns) == 3


# ---- optimizers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "coda"])
def test_schedules(schedule: str) -> None:
    factors = [rate_factor(schedule, step, 12, 2, step // 3, 4) for step in range(12)]
    assert factors[:2] == [1 / 3, 2 / 3]
    rest = factors[2:]
    assert rest == sorted(rest, reverse=True)
    expected = {
        "constant": [1.0] * 10,
        "cosine": [(1 + torch.tensor(k * torch.pi / 10, dtype=torch.float64).cos().item()) / 2 for k in range(10)],
        "linear": [1 - k / 10 for k in range(10)],
        "coda": [
            torch.tensor(99 * torch.pi * (step // 3) / 600, dtype=torch.float64).cos().item() for step in range(2, 12)
        ],
    }[schedule]
    assert_close(torch.tensor(rest), torch.tensor(expected), atol=1e-12, rtol=0)


def test_rates_follow_the_schedule_and_the_group() -> None:
    rates: list[list[float]] = []

    class Look(TrainerCallback):
        def on_step_end(self, state: TrainerState, task: Any) -> None:
            assert state.optimizer is not None
            rates.append([group["lr"] for group in state.optimizer.param_groups])

    small_trainer(
        "l2p", tasks=1, lr_scheduler_type="linear", learning_rate=0.1, learning_rates={"head": 0.01}, callbacks=[Look()]
    ).train()
    factors = [1 - step / 6 for step in range(6)]
    assert_close(torch.tensor(rates), torch.tensor([[0.1 * f, 0.1 * f, 0.01 * f] for f in factors]))


def test_a_kept_optimizer_keeps_what_is_still_there() -> None:
    def parameter(*size: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.randn(*size))

    same, old_head, old_prompt = parameter(3, 2), parameter(2, 4), parameter(5)
    old = build_optimizer("adam", [{"params": [same, old_head, old_prompt], "lr": 0.1}])
    for p in (same, old_head, old_prompt):
        p.grad = torch.ones_like(p)
    old.step()
    head, prompt = parameter(3, 4), parameter(5)
    new = build_optimizer("adam", [{"params": [same, head, prompt], "lr": 0.1}])
    before = {"same": same, "head": old_head, "prompt": old_prompt}
    keep_state(old, before, new, {"same": same, "head": head, "prompt": prompt})
    assert torch.equal(new.state[same]["exp_avg"], old.state[same]["exp_avg"])
    assert torch.equal(new.state[head]["exp_avg"], torch.cat([old.state[old_head]["exp_avg"], torch.zeros(1, 4)]))
    assert new.state[head]["step"] == 1
    assert prompt not in new.state


# ---- bad settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "lion"}, "optim='lion': choose one of"),
        ({"lr_scheduler_type": "step"}, "lr_scheduler_type='step': choose one of"),
        ({"num_train_epochs": 0}, "num_train_epochs=0 must be a positive integer"),
        ({"batch_size": 2.5}, "batch_size=2.5 must be"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be"),
        ({"learning_rates": {"head": -1.0}}, "head=-1.0 must be"),
        ({"memory_size": 3, "memory_per_class": 2}, "give one of them"),
        ({"memory_size": 3}, 'class_mask="none"'),
        ({"learning_rates": "head"}, "learning_rates='head': write like key=value,key=value"),
        ({"learning_rates": "{"}, "learning_rates='{' is no JSON object"),
        ({"optim_args": ["a=1"]}, r"optim_args=\['a=1'\] must be a dict, or text like"),
        ({"learning_rates": {"heads": 1.0}}, "no parameter group is called"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_trainer("l2p", **settings).train()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("momentum=0.9,nesterov=True", {"momentum": 0.9, "nesterov": True}),
        ("betas=[0.9, 0.99], eps=1e-6", {"betas": [0.9, 0.99], "eps": 1e-6}),
        ('{"amsgrad": true, "eps": 1e-6}', {"amsgrad": True, "eps": 1e-6}),
        ("fused=None,mode=max", {"fused": None, "mode": "max"}),
        ("", {}),
    ],
)
def test_options_of_the_optimizer_as_text(text: str, value: dict[str, Any]) -> None:
    line = ["--optim_args", text, "--learning_rates", "head=1e-3"]
    (args,) = HfArgumentParser(ContinualArguments).parse_args_into_dataclasses(line)
    assert args == ContinualArguments(optim_args=value, learning_rates={"head": 1e-3})
    assert ContinualArguments(**args.to_dict()) == args
    assert HfArgumentParser(ContinualArguments).parse_args_into_dataclasses([]) == (ContinualArguments(),)


def test_a_stream_without_tasks_is_passed_over_once() -> None:
    known = small_stream()
    stream = GaussianStream(known.train, known.test, known.transform, seed=0)
    base = build("vit")
    model = get_prompt_pool_model(base, L2PConfig(top_k=3, num_labels=6, class_mask="none"))
    with pytest.raises(ValueError, match=r"num_train_epochs=2: .* set it to 1"):
        ContinualTrainer(model, stream, ContinualArguments(num_train_epochs=2))
    args = ContinualArguments(num_train_epochs=1, batch_size=4, memory_size=6, memory_batch_size=2)
    trainer = ContinualTrainer(model, stream, args)
    matrix = trainer.train()
    assert len(matrix.columns) == 1
    assert trainer.progress.global_step == 8
    assert trainer.memory is not None
    assert len(trainer.memory) == 6


# ---- processes -----------------------------------------------------------------------------------------------------------

# Batches of 6 or 4 over 10 images: the last one has 4 or 2. More methods: test_distributed.py and others beside it.
RUNS: dict[str, dict[str, Any]] = {
    "hash": {"method": "hash", "max_grad_norm": 0.5, "batch_size": 6},
    "l2p accumulated": {"method": "l2p", "gradient_accumulation_steps": 2},
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

    def look(*_: Any) -> None:
        wrapper = DistributedDataParallel._get_active_ddp_module()
        if wrapper is not None:
            broadcasts.append(wrapper.will_sync_module_buffers())

    trainer.model.register_forward_pre_hook(look)
    trainer.train()
    return {"tensors": tensors(trainer), "matrix": trainer.matrix.to_dict(), "logs": logs.found, "broadcasts": broadcasts}


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
def test_a_wrong_label_on_one_process_stops_all(runs: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    assert ["1 labels are of no declared class" in part["wrong label"] for part in runs[1]] == [True, True]


def test_padding_is_no_image() -> None:
    throughput = Throughput()
    throughput.add(torch.tensor([3, -100, 1]))
    assert throughput.read()[0] == 2


@pytest.mark.xdist_group("trainer-processes")
def test_two_processes_share_kept_queries(runs: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    found = [part["query cache"] for part in runs[1]]
    alone = provider_of("").frozen_features(train=True)
    for name in ("cold", "warm", "half", "one without", "damaged"):
        for part in found:
            assert torch.equal(part[name], found[0]["cold"]), name
            assert part[f"{name}: passes"] == (0 if name == "warm" else 1), f"{name}: all compute together, or none"
    assert_close(found[0]["cold"], alone, atol=1e-5, rtol=0)
