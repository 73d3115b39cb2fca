"""Baselines in the trainer: what they see, resume, accumulation, two processes, files, bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.comparison import batch_of, comparison_trainer, small_learner, train_steps
from support.families import build
from support.small_runs import Stop, StopAt, pictures, small_model, small_stream, tensors
from torch import Tensor
from torch.testing import assert_close

from cl_prompts.baselines import (
    BASELINES,
    get_baseline,
    load_baseline,
)
from cl_prompts.continual import (
    ClassIncrementalStream,
    ContinualArguments,
    ContinualTrainer,
    GaussianStream,
    JointStream,
    TrainerCallback,
    TrainerState,
)
from cl_prompts.heads import AlignedClassifier, RidgeClassifier


pytestmark = [pytest.mark.by_turns(5), pytest.mark.xdist_group("baselines")]


class Watch(TrainerCallback):
    """Notes the images and the memory of each task, and the parameters it begins with."""

    def __init__(self) -> None:
        self.seen: list[set[int]] = []
        self.memory: list[set[int]] = []
        self.start: list[dict[str, Tensor]] = []

    def on_train_begin(self, state: TrainerState) -> None:
        state.model.register_forward_pre_hook(self.note, with_kwargs=True)

    def on_task_begin(self, state: TrainerState, task: Any) -> None:
        self.seen.append(set())
        self.memory.append(set() if state.memory is None else set(state.memory.rows.tolist()))
        self.start.append({name: p.detach().clone() for name, p in state.model.trained().items()})

    def note(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training:
            self.seen[-1] |= set(kwargs["sample_ids"]) - {-1}


def watched(name: str, **settings: Any) -> tuple[Watch, ContinualTrainer]:
    watch = Watch()
    trainer = comparison_trainer(name, callbacks=[watch], **settings)
    trainer.train()
    return watch, trainer


def rows_of(trainer: ContinualTrainer, *tasks: int) -> set[int]:
    return {int(row) for task in tasks for row in trainer.stream.tasks[task].train_rows}


@pytest.mark.parametrize("name", ["er", "der++", "bic", "icarl", "gem", "co2l", "dualnet"])
def test_rehearsed_images_join_the_batches(name: str) -> None:
    watch, trainer = watched(name)
    own = [rows_of(trainer, 0), rows_of(trainer, 1)]
    assert watch.seen[0] == own[0]
    assert watch.seen[1] >= own[1]
    assert watch.seen[1] - own[1] <= watch.memory[1]
    assert len(watch.seen[1] - own[1]) > 4
    assert watch.memory[1] <= own[0]


def test_gdumb_trains_on_the_memory_alone_and_from_the_start() -> None:
    watch, trainer = watched("gdumb", tasks=3)
    given = dict(build("vit").named_parameters())
    for task in range(3):
        assert watch.seen[task] == watch.memory[task]
        assert len(watch.seen[task]) == 8
        assert watch.seen[task] <= rows_of(trainer, *range(task + 1))
        assert len(watch.seen[task] & rows_of(trainer, task)) > 1
        backbone = {n.removeprefix("features.base."): p for n, p in watch.start[task].items() if "head" not in n}
        assert len(backbone) > 40
        assert all(torch.equal(p, given[n]) for n, p in backbone.items())
    assert not torch.equal(watch.start[0]["head.weight"], watch.start[1]["head.weight"][:2])


def test_joint_training_sees_all_tasks_so_far() -> None:
    watch, trainer = watched("joint", tasks=3)
    assert watch.seen == [rows_of(trainer, 0), rows_of(trainer, 1), rows_of(trainer, 2)]
    assert [len(rows) for rows in watch.seen] == [10, 20, 30]
    assert torch.equal(watch.start[0]["features.base.layernorm.weight"], watch.start[2]["features.base.layernorm.weight"])
    assert [task.classes for task in trainer.stream] == [[4, 1], [4, 1, 0, 3], [4, 1, 0, 3, 2, 5]]
    assert [m.images for m in trainer.evaluations] == [4, 4, 4]


def test_joint_training_of_prompts_and_of_a_stream_without_tasks() -> None:
    stream = JointStream(small_stream(), only_last=True)
    assert len(stream) == 1
    trainer = ContinualTrainer(small_model("l2p"), stream, ContinualArguments(num_train_epochs=1, batch_size=8))
    trainer.train()
    assert trainer.model.classes == [4, 1, 0, 3, 2, 5]
    assert trainer.evaluations[0].images == 12
    joint = JointStream(gaussian())
    assert not joint.task_free
    assert sorted(joint.tasks[0].train_rows.tolist()) == list(range(30))


def test_joint_training_needs_its_stream() -> None:
    trainer = ContinualTrainer(
        small_learner("joint"), small_stream(2), ContinualArguments(num_train_epochs=1, batch_size=8)
    )
    with pytest.raises(ValueError, match=r"classes \[1, 4\] do not come back .*JointStream"):
        trainer.train()


def test_icarl_keeps_what_herding_puts_first() -> None:
    watch, trainer = watched("icarl", tasks=1)
    del watch
    learner, stream = trainer.model, trainer.stream
    assert trainer.memory is not None
    rows = stream.tasks[0].train_rows
    place = dict(zip(rows.tolist(), learner.rank_images(rows, stream.images(rows, 4)), strict=True))
    for kept in trainer.memory.by_class.values():
        assert [place[row] for row in kept] == [0, 1, 2, 3]


def gaussian() -> GaussianStream:
    stream = small_stream()
    return GaussianStream(stream.train, stream.test, stream.transform, width=0.1)


@pytest.mark.parametrize("name", ["finetune", "frozen", "ncm", "er"])
def test_streams_without_tasks(name: str) -> None:
    memory = {"memory_size": 6} if BASELINES[name].needs_memory else {}
    args = ContinualArguments(num_train_epochs=1, batch_size=5, learning_rate=1e-3, **memory)
    trainer = ContinualTrainer(small_learner(name, num_labels=6), gaussian(), args)
    matrix = trainer.train()
    assert trainer.model.classes == list(range(6))
    assert len(matrix.columns) == 1
    assert name != "ncm" or matrix.columns[0][0] > 90


def test_further_classifiers_read_the_features() -> None:
    trainer = comparison_trainer("finetune")
    trainer.train()
    more = {"ridge": RidgeClassifier(32, projection_size=64), "aligned": AlignedClassifier(32)}  # SLCA
    further = ContinualTrainer(small_learner("finetune"), trainer.stream, trainer.args, classifiers=more)
    assert further.train() == trainer.matrix
    assert further.evaluations[1].by_classifier.keys() == more.keys()
    assert further.extra_classifiers.matrices["aligned"].summary()["faa"] > 40


# ---- resume, accumulation, files -------------------------------------------------------------------------------------


@pytest.mark.by_turns(9)
@pytest.mark.parametrize("name", [name for name in BASELINES if name != "ncm"])
def test_every_learner_resumes_inside_a_task(name: str, tmp_path: Path) -> None:
    whole = comparison_trainer(name)
    whole.train()
    with pytest.raises(Stop):
        comparison_trainer(name, tmp_path, callbacks=[StopAt(whole.progress.global_step - 1)]).train()
    resumed = comparison_trainer(name, tmp_path)
    resumed.train(resume=True)
    assert resumed.matrix == whole.matrix
    mine, theirs = tensors(resumed), tensors(whole)
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
    assert resumed.model.training_state_dict()["values"] == whole.model.training_state_dict()["values"]


@pytest.mark.parametrize(
    "name", ["ewc", "si", "lwf", "er", "der++", "bic", "icarl", "gem", "a_gem", "packnet", "supsup", "hat"]
)
def test_accumulated_pieces_are_one_batch(name: str) -> None:
    runs = []
    for pieces in (1, 3):
        settings = {"optim": "sgd", "learning_rate": 0.02, "memory_batch_size": 2, "gradient_accumulation_steps": pieces}
        trainer = comparison_trainer(name, **settings)
        trainer.train()
        runs.append(tensors(trainer))
    for key, values in runs[0].items():
        assert_close(runs[1][key], values, atol=2e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", BASELINES)
def test_a_saved_learner_answers_and_goes_on_the_same(name: str, tmp_path: Path) -> None:
    learner = small_learner(name)
    batch = batch_of([4, 1, 0, 4, 1, 0, 0])
    for classes in ([4, 1], [4, 1, 0]):
        learner.begin_task(classes, class_names={4: "owl"}, revisit=True)
        own = batch if 0 in classes else batch_of([4, 1, 4, 1])
        if learner.trains_task(0):
            train_steps(learner, own)
        learner.eval().consolidate([own], [own])
        learner.end_task()
    learner.save_pretrained(tmp_path / "learner")
    assert sorted(path.name for path in (tmp_path / "learner").iterdir()) == ["learner.json", "learner.safetensors"]
    again = load_baseline(tmp_path / "learner", build("vit"))
    assert torch.equal(again(batch["pixel_values"]).logits, learner(batch["pixel_values"]).logits)
    assert again.fingerprint() == learner.fingerprint()
    if name in ("hat", "dualnet"):  # their hooks on the backbone act once, though another learner is made with it
        get_baseline(name, again.get_base_model())
        assert torch.equal(again(batch["pixel_values"]).logits, learner(batch["pixel_values"]).logits)
    assert again.tasks.state == learner.tasks.state
    after = []
    for one in (learner, again):
        torch.manual_seed(0)
        one.begin_task([4, 1, 0, 3], revisit=True)
        if one.trains_task(2):
            train_steps(one, batch_of([0, 4, 3]))
        after.append(one.training_state_dict()["tensors"])
    assert after[0].keys() == after[1].keys()
    assert all(torch.equal(values, after[1][key]) for key, values in after[0].items())


def test_damaged_or_foreign_files_are_refused(tmp_path: Path) -> None:
    learner = small_learner("lwf")
    learner.begin_task([4, 1])
    learner.end_task()
    learner.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="backbone with other weights"):
        load_baseline(tmp_path, build("vit", seed=1))
    told = json.loads((tmp_path / "learner.json").read_text())
    for changed in ({"learner": "lwg"}, {"options": {**told["options"], "freeze_backbone": True}}, {"options": None}):
        (tmp_path / "learner.json").write_text(json.dumps({**told, **changed}))
        with pytest.raises(ValueError, match=r"no baseline is called|other options|has no options"):
            load_baseline(tmp_path, build("vit"))
    (tmp_path / "learner.json").write_text(json.dumps(told))
    content = (tmp_path / "learner.safetensors").read_bytes()
    (tmp_path / "learner.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="holds no baseline, or a damaged one"):
        load_baseline(tmp_path, build("vit"))
    with pytest.raises(ValueError, match="holds no baseline"):
        load_baseline(tmp_path / "nowhere", build("vit"))


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ewd", {}, "no baseline is called 'ewd'"),
        ("ewc", {"strength": -1}, "strength=-1 must be a non-negative number"),
        ("ewc", {"strength": float("nan")}, "strength=nan must be a non-negative number"),
        ("ewc_online", {"decay": 1.5}, "decay=1.5 must be between 0 and 1"),
        ("si", {"damping": 0}, "damping=0 would divide by zero"),
        ("lwf", {"temperature": 0}, "temperature=0 would divide by zero"),
        ("co2l", {"student_temperature": 0}, "student_temperature=0 would divide by zero"),
        ("packnet", {"prune": 1.0}, "prune=1.0 must be between 0 and 1"),
        ("packnet", {"freeze_backbone": True}, "freeze_backbone=True: 'packnet' needs False"),
        ("supsup", {"keep": 0}, "keep=0 must be a share"),
        ("hat", {"annealing_steps": 1}, "annealing_steps=1 at least 2"),
        ("dualnet", {"freeze_backbone": True}, "the slow learner"),
        ("lora", {"rank": 0}, "rank=0 must be a positive integer"),
        ("lora", {"layers": ["proj"]}, r"layers=\['proj'\]: no linear layer in a block of ViTModel is called so"),
        ("lora", {"layers": "k"}, "layers='k': no linear layer in a block"),
        ("lora", {"freeze_backbone": True}, "freeze_backbone=True leaves no layer to update"),
        ("bic", {"held_out": 1}, "held_out=1 between 0 and 1"),
        ("er", {"class_mask": "task"}, "class_mask='task': choose \"none\""),
        ("finetune", {"class_mask": "batch"}, "class_mask='batch': choose"),
        ("finetune", {"num_labels": 0}, "num_labels=0 must be a positive number"),
        ("ewc", {"num_labels": 6}, "num_labels=6: 'ewc' must know when a task ends"),
        ("frozen", {"freeze_backbone": False}, "freeze_backbone=False: with a trained backbone"),
        ("ncm", {"freeze_backbone": False}, "freeze_backbone=False: nearest class mean trains nothing"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        get_baseline(name, build("vit"), **options)


def test_a_backbone_that_is_frozen_already_is_named() -> None:
    with pytest.raises(ValueError, match="frozen already: load it anew, or pass freeze_backbone=True"):
        get_baseline("finetune", build("vit").requires_grad_(False))


def test_calls_out_of_order_are_named() -> None:
    learner = small_learner("finetune")
    batch = batch_of([4, 1])
    with pytest.raises(ValueError, match="no class is known yet: call begin_task"):
        learner(**batch)
    learner.begin_task([4, 1])
    with pytest.raises(ValueError, match="task 0 is still open: call end_task"):
        learner.begin_task([0, 3])
    old = torch.optim.SGD(learner.parameter_groups(0.1))
    learner.end_task()
    with pytest.raises(ValueError, match="outside a task: call begin_task"):
        learner.train()(**batch)
    with pytest.raises(ValueError, match=r"classes \[4\] were declared in an earlier task"):
        learner.begin_task([4, 0])
    learner.begin_task([0, 3])
    with pytest.raises(ValueError, match=r"does not train \['head.weight', 'head.bias'\]"):
        learner.attach_optimizer(old)
    with pytest.raises(ValueError, match=r"labels \[1, 4\] do not belong to the current task \[0, 3\]"):
        learner(**batch)
    with pytest.raises(ValueError, match=r"labels \[9\] are of no declared class"):
        learner.eval()(batch["pixel_values"][:1], torch.tensor([9]))
    with pytest.raises(ValueError, match="query holds features of a frozen backbone"):
        learner(batch["pixel_values"], query=torch.zeros(2, 32))
    with pytest.raises(ValueError, match="no parameter group is called"):
        learner.parameter_groups(0.1, prompts=0.2)


@pytest.mark.parametrize("name", [name for name, learner in BASELINES.items() if learner.needs_memory])
def test_the_trainer_asks_for_a_memory(name: str) -> None:
    with pytest.raises(ValueError, match="set memory_size or memory_per_class"):
        comparison_trainer(name, memory_size=0)


def test_the_trainer_refuses_a_memory_that_is_not_used() -> None:
    with pytest.raises(ValueError, match="SequentialFineTuning rehearses nothing: leave out memory_size"):
        comparison_trainer("finetune", memory_size=5)


@pytest.mark.parametrize("name", ["der++", "bic"])
def test_numbers_of_images_are_asked_for(name: str) -> None:
    learner = small_learner(name)
    learner.begin_task([4, 1])
    batch = batch_of([4, 1])
    learner.eval().consolidate([batch], [batch])
    batch.pop("sample_ids")
    with pytest.raises(ValueError, match="pass sample_ids"):
        learner.train()(**batch)


def test_too_small_a_memory_for_exemplar_means() -> None:
    with pytest.raises(ValueError, match=r"holds no image of classes \[3\]: raise memory_size"):
        comparison_trainer("icarl", memory_size=3).train()


def one_class_stream() -> ClassIncrementalStream:
    rows = Dataset.from_dict({"image": [0, 1, 2], "label": [0, 1, 2]})
    return ClassIncrementalStream(rows, rows, [[0, 1], [2]], pictures([0, 1, 2], 1).__getitem__)


@pytest.mark.parametrize("name", BASELINES)
def test_a_task_of_one_class_is_learned_or_refused(name: str) -> None:
    """Refused before training where the loss would see one class only; the trainer asks before the first task."""
    learner = small_learner(name)
    refuses = learner.class_mask == "task" and name not in ("joint", "ncm")
    if not refuses:
        learner.begin_task([0])
        return
    with pytest.raises(ValueError, match=rf"'{name}' learns nothing from a task of one class.*\"er\""):
        learner.begin_task([0])
    assert learner.classes == []
    with pytest.raises(ValueError, match="learns nothing from a task of one class"):
        ContinualTrainer(learner, one_class_stream(), ContinualArguments())
    get_baseline(name, build("vit"), class_mask="none").begin_task([0])


@pytest.mark.parametrize(
    ("settings", "base", "head"),
    [
        ({"learning_rate": 0.005}, 1e-4, 0.005),
        ({"learning_rate": 1e-5}, 1e-5, 1e-5),
        ({"learning_rate": 0.005, "learning_rates": {"base": 0.01}}, 0.01, 0.005),
        ({"learning_rate": 0.005, "learning_rates": {"head": 0.1}}, 1e-4, 0.1),
    ],
    ids=str,
)
def test_the_backbone_has_a_learning_rate_of_its_own(settings: dict[str, Any], base: float, head: float) -> None:
    rates: list[dict[str, float]] = []

    class Look(TrainerCallback):
        def on_step_end(self, state: TrainerState, task: Any) -> None:
            assert state.optimizer is not None
            rates.append({group["name"]: group["lr"] for group in state.optimizer.param_groups})

    comparison_trainer("finetune", callbacks=[Look()], **settings).train()
    assert rates[0] == {"base": base, "head": head}
