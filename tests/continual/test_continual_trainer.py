"""ContinualTrainer on tiny models: what it trains, what it tells, what it refuses, and that two processes equal one."""

import gc
import platform
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel
from support.families import build
from support.small_runs import small_model, small_stream, small_trainer, tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from transformers import HfArgumentParser

from cl_prompts import L2PConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.baselines import get_baseline
from cl_prompts.continual import ContinualArguments, ContinualTrainer, GaussianStream, TrainerCallback, TrainerState
from cl_prompts.continual.batches import micro_batches
from cl_prompts.continual.optimization import OPTIMIZERS, build_optimizer, keep_state, rate_factor
from cl_prompts.continual.training_step import Throughput
from cl_prompts.heads import DiscriminantClassifier


pytestmark = pytest.mark.by_turns(3, always=())


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_one_kernel_updates_all_parameters_on_cuda() -> None:
    with FakeTensorMode():
        on_cuda = torch.empty(2, device="cuda")
    groups = [{"params": [on_cuda], "lr": 0.1}]
    for name in OPTIMIZERS:
        assert build_optimizer(name, groups).defaults["fused"]
        assert not build_optimizer(name, groups, foreach=True).defaults["fused"]
        assert not build_optimizer(name, [{"params": [torch.zeros(2)], "lr": 0.1}]).defaults["fused"]


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


@pytest.mark.parametrize("learner", ["l2p", "finetune"])
def test_classes_without_tasks_keep_their_names(learner: str, tmp_path: Path) -> None:
    known, names = small_stream(), [f"bird {n}" for n in range(6)]
    train, test = (part.cast_column("label", ClassLabel(names=names)) for part in (known.train, known.test))
    stream = GaussianStream(train, test, known.transform, seed=0)
    base = build("vit")
    model: Any = get_baseline("finetune", base, num_labels=6, class_mask="none")
    if learner == "l2p":
        model = get_prompt_pool_model(base, L2PConfig(top_k=3, num_labels=6, class_mask="none"))
    ContinualTrainer(model, stream, ContinualArguments(num_train_epochs=1, batch_size=4)).train()
    tasks = model.adapter.tasks if learner == "l2p" else model.tasks
    assert list(tasks.id2label.values()) == names
    if learner == "l2p":
        model.save_pretrained(tmp_path)
        loaded: Any = PromptPoolModel.from_pretrained(build("vit"), tmp_path)
        assert list(loaded.adapter.tasks.id2label.values()) == names


@pytest.mark.parametrize("learner", ["l2p", "finetune"])
def test_a_known_class_keeps_its_name(learner: str) -> None:
    base = build("vit")
    model: Any = (
        get_baseline("finetune", base) if learner == "finetune" else get_prompt_pool_model(base, L2PConfig(top_k=3))
    )
    model.begin_task([0, 1], class_names={0: "owl", 1: "jay"})
    model.end_task()
    with pytest.raises(ValueError, match=r"class 1 is called 'jay', and would be called 'wren' now: .* rename_class"):
        model.begin_task([1, 2], revisit=True, class_names={1: "wren", 2: "crow"})
    assert model.classes == [0, 1]
    with pytest.warns(UserWarning, match="classes 0 and 2 are both called 'owl': answers by name cannot tell them apart"):
        model.begin_task([1, 2], revisit=True, class_names={1: "jay", 2: "owl"})
    model.end_task()


def test_padding_is_no_image() -> None:
    throughput = Throughput()
    throughput.add(torch.tensor([3, -100, 1]))
    assert throughput.read()[0] == 2
