"""transformers.Trainer with its default arguments, and what cl_prompts.hf_trainer adds."""

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from support.families import CLASSIFIERS, build
from support.methods import METHODS
from support.processes import become, free_port, in_two_processes
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainingArguments

from cl_prompts import PromptPoolModel, get_prompt_pool_model
from cl_prompts.evaluation.evaluate import accuracy
from cl_prompts.hf_trainer import AttachOptimizer, PromptPoolTrainer, accuracy_of


pytestmark = pytest.mark.by_turns(3, always=())


CLASSES = [2, 0, 3, 1]
methods = pytest.mark.parametrize("method", ["l2p", "hash", "coda"])
wraps = pytest.mark.parametrize("wrap", [get_prompt_pool_model, get_peft_model])
patterns = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(9))


def images(count: int, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    pixels = patterns[labels] + 0.5 * torch.randn(count, 3, 32, 32, generator=generator)
    columns = {"pixel_values": pixels.numpy(), "labels": labels.numpy(), "sample_ids": np.arange(count)}
    return Dataset.from_dict({**columns, "file": ["a.png"] * count}).with_format("torch")


def bird_model(method: str, wrap: Any = get_prompt_pool_model) -> Any:
    torch.manual_seed(0)
    model = wrap(build("vit"), METHODS[method]())
    model.begin_task(CLASSES)
    return model


def trainer(kind: type[Trainer], model: Any, folder: Path, more: dict[str, Any] | None = None, **settings: Any) -> Trainer:
    quiet = {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "report_to": "none"}
    arguments = TrainingArguments(str(folder), **quiet, **{"learning_rate": 2e-2, "num_train_epochs": 2, **settings})
    return kind(model, arguments, **{"train_dataset": images(32), "eval_dataset": images(16, seed=1)} | (more or {}))


def own_accuracy(model: Any) -> float:
    """Share of right answers over all classes, by the library's own evaluation."""
    return accuracy(model.eval(), [images(16, seed=1)[:]], model.classes, "cpu")[0] / 100


@wraps
@methods
def test_default_arguments(method: str, wrap: Any, tmp_path: Path) -> None:
    """A plain Trainer trains and evaluates on a bare base, keeps `sample_ids`, and comes back to its best model."""
    model = bird_model(method, wrap)
    before = own_accuracy(model)
    run = trainer(
        Trainer,
        model,
        tmp_path,
        {"compute_metrics": accuracy_of(model), "callbacks": [AttachOptimizer()]},
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    run.train()
    accuracies = [entry["eval_accuracy"] for entry in run.state.log_history if "eval_accuracy" in entry]
    assert len(accuracies) == 2
    assert max(accuracies) > before
    assert own_accuracy(model) == pytest.approx(max(accuracies))
    assert run.evaluate()["eval_accuracy"] == pytest.approx(max(accuracies))
    best = PromptPoolModel.from_pretrained(build("vit"), str(run.state.best_model_checkpoint))
    assert own_accuracy(best) == pytest.approx(max(accuracies))
    if method == "l2p":
        assert model.adapter.pool.history.counts.sum() == 32 * 3, "an image counts once a task"
    if method == "hash":
        assert model.adapter.update_scaler.attached


@methods
def test_early_stopping_and_resume(method: str, tmp_path: Path) -> None:
    often = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "accuracy"}
    model = bird_model(method)
    # An image of one epoch is as good as one of the next: no epoch is better by 2.0.
    early = {"callbacks": [EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=2.0)]}
    run = trainer(PromptPoolTrainer, model, tmp_path, early, num_train_epochs=5, load_best_model_at_end=True, **often)
    run.train()
    assert run.state.epoch == 2
    first = run.state.log_history[0]["eval_accuracy"]
    again = bird_model(method)
    resumed = trainer(PromptPoolTrainer, again, tmp_path / "more", num_train_epochs=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 8
    assert resumed.evaluate()["eval_accuracy"] == pytest.approx(own_accuracy(again))
    assert own_accuracy(PromptPoolModel.from_pretrained(build("vit"), str(tmp_path / "checkpoint-4"))) == pytest.approx(
        first
    )


def loss_of_user(output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The cross entropy, as a user would write it for `compute_loss_func`."""
    return F.cross_entropy(output.logits, labels, reduction="sum") / num_items_in_batch


@methods
def test_a_loss_of_the_trainer_replaces_the_cross_entropy(method: str, tmp_path: Path) -> None:
    """Smoothed labels, or the user's function; the method's terms stay, and steps of parts equal those of the whole."""
    steps = []
    for smoothing, function, parts in ((0.0, None, 1), (0.0, loss_of_user, 1), (0.1, None, 1), (0.1, None, 2)):
        model = bird_model(method)
        settings = {"max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "label_smoothing_factor": smoothing}
        run = trainer(
            PromptPoolTrainer,
            model,
            tmp_path,
            {"compute_loss_func": function},
            **settings,
            per_device_train_batch_size=8 // parts,
            gradient_accumulation_steps=parts,
        )
        run.train()
        steps.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        measured = run.evaluate()
        assert measured["eval_accuracy"] == pytest.approx(own_accuracy(model))
    own, users, smoothed, accumulated = steps
    assert_close(users, own, atol=1e-6, rtol=0)
    assert_close(accumulated, smoothed, atol=1e-5, rtol=0)
    assert any(not torch.equal(smoothed[name], own[name]) for name in own)
    with torch.no_grad():
        batch = images(16, seed=1)[:]
        logits = model.eval()(batch["pixel_values"]).logits
    columns = torch.tensor([model.classes.index(label) for label in batch["labels"].tolist()])
    expected = F.cross_entropy(logits, columns, label_smoothing=0.1).item()
    assert measured["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_smoothing_leaves_masked_classes_out(tmp_path: Path) -> None:
    """In the second task the logits of the first are -inf, and the other terms of the loss are added."""
    model = bird_model("coda")
    model.end_task()
    model.begin_task([8, 5])
    run = trainer(PromptPoolTrainer, model, tmp_path, label_smoothing_factor=0.2)
    batch = {"pixel_values": images(4)[:]["pixel_values"], "labels": torch.tensor([8, 5, 5, -100])}
    plain = model.train()(**batch)
    loss, output = run.compute_loss(model, dict(batch), return_outputs=True, num_items_in_batch=torch.tensor(3))
    expected = F.cross_entropy(plain.logits[:3, 4:], torch.tensor([0, 1, 1]), label_smoothing=0.2)
    assert_close(loss, expected + plain.losses["orthogonality"])
    assert_close(output.losses["cross_entropy"], expected)


@pytest.mark.parametrize(
    "more", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": loss_of_user}], ids=lambda given: next(iter(given))
)
def test_a_plain_trainer_with_a_loss_of_its_own_is_refused(more: dict[str, Any], tmp_path: Path) -> None:
    """It takes the labels out of the batch, and would take class ids for columns: in training and in an evaluation."""
    given = {"compute_loss_func": more.get("compute_loss_func")}
    settings = {name: value for name, value in more.items() if name not in given}
    run = trainer(Trainer, bird_model("l2p"), tmp_path, given, **settings)
    for call in (run.train, run.evaluate):
        with pytest.raises(ValueError, match=r"use cl_prompts\.hf_trainer\.PromptPoolTrainer"):
            call()


def test_hash_says_how_to_attach_the_optimizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hf_trainer\.AttachOptimizer"):
        trainer(Trainer, bird_model("hash"), tmp_path).train()


def test_a_training_forward_without_labels_warns() -> None:
    model, pixels = bird_model("coda"), images(2)[:]["pixel_values"]
    with pytest.warns(UserWarning, match=r"without labels has no loss.*model\.eval\(\)"):
        model.train()(pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(pixels)
        with torch.no_grad():
            model.train()(pixels)


def test_the_metric_counts_no_padding() -> None:
    model = bird_model("l2p")
    logits = np.eye(4)[[0, 1, 2, 3, 0]]
    given = EvalPrediction(logits, np.array([2, 0, 3, 0, -100]))
    assert accuracy_of(model)(given) == {"accuracy": 0.75}


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_the_base_names_our_arguments_while_it_has_prompts(family: str) -> None:
    """Which Trainer asks the base's class for; its other arguments and its class are as they were after `unload`."""
    base = build(family, classifier=True)
    kind, other = type(base), build(family, classifier=True)
    model = get_prompt_pool_model(base, METHODS["l2p"](num_labels=2, class_mask="none"))
    names = list(inspect.signature(type(base).forward).parameters)
    assert {"labels", "query", "sample_ids", "num_items_in_batch"} <= set(names)
    assert [n for n in names if n in inspect.signature(kind.forward).parameters] == list(
        inspect.signature(kind.forward).parameters
    )
    assert isinstance(base, kind)
    assert type(other) is kind
    copied = copy.deepcopy(model)
    assert type(copied.get_base_model()) is type(base)
    model.unload()
    assert type(base) is kind
    assert type(copied.unload()) is kind


def test_a_compiled_backbone_keeps_its_signature() -> None:
    model = bird_model("l2p")
    names = list(inspect.signature(model.get_base_model().forward).parameters)
    model.compile_backbone(backend="eager")
    assert list(inspect.signature(model.get_base_model().forward).parameters) == names


@pytest.mark.parametrize("settings", [{}, {"batch_eval_metrics": True}, {"eval_do_concat_batches": False}], ids=str)
def test_the_metric_of_batches(settings: dict[str, Any], tmp_path: Path) -> None:
    """Trainer hands over the whole evaluation, tensors of a batch at a time, or a list of batches; twice the same."""
    model = bird_model("coda")
    run = trainer(PromptPoolTrainer, model, tmp_path, per_device_eval_batch_size=6, **settings)
    for _ in range(2):
        assert run.evaluate()["eval_accuracy"] == pytest.approx(own_accuracy(model))


def train_in_one_of_two(rank: int, port: int, folder: Path, when: str) -> None:
    become(rank, port)
    learn_two_tasks(folder, 2, when)


def learn_two_tasks(folder: Path, processes: int, when: str) -> None:
    """Smoothed labels and accumulated micro-batches, in a task of four classes and in one of one class.

    The model is evaluated and saved `when` an "epoch" ends, or at "steps", here the third, within an epoch.
    """
    model = bird_model("hash")
    for number, classes in enumerate((CLASSES, [5])):
        if number:
            model.end_task()
            model.begin_task(classes)
        often = {"eval_strategy": when, "save_strategy": when, "load_best_model_at_end": True}
        run = trainer(
            PromptPoolTrainer,
            model,
            folder / str(number),
            {} if not number else {"train_dataset": images(16).map(lambda row: {"labels": torch.tensor(5)})},
            optim="sgd",
            metric_for_best_model="accuracy",
            label_smoothing_factor=0.1,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=4 // processes,
            per_device_eval_batch_size=4 // processes,
            eval_steps=3,
            save_steps=3,
            **often,
        )
        run.train()
        accuracy_of_run = run.evaluate()["eval_accuracy"]
        assert accuracy_of_run == pytest.approx(own_accuracy(model))
        run.accelerator.free_memory()
    if run.is_world_process_zero():
        model.save_pretrained(folder / "last")


@pytest.mark.parametrize("tasks", [[[0, 1]], [[0, 1], [2, 3]]], ids=["first task", "second task"])
def test_a_head_that_answers_after_the_task_only(tasks: list[list[int]], tmp_path: Path) -> None:
    """Evaluations within a task are refused before its first step, by Trainer with the callback, too."""
    model = get_prompt_pool_model(build("vit"))
    for classes in tasks:
        rows = images(32).filter(lambda row, of=classes: int(row["labels"]) in of)
        model.eval().record_features([rows[:]])
        model.begin_task(classes)
        if classes != tasks[-1]:
            model.consolidate([rows[:]])
            model.end_task()
    seen = {"train_dataset": rows, "eval_dataset": rows}
    before = copy.deepcopy(model.state_dict())
    message = r'eval_strategy=.epoch.: the discriminant head answers .* Set eval_strategy="no", and call trainer.evaluate'
    for kind, callbacks in ((PromptPoolTrainer, []), (Trainer, [AttachOptimizer()])):
        refused = trainer(kind, model, tmp_path, seen | {"callbacks": callbacks}, eval_strategy="epoch")
        with pytest.raises(ValueError, match=message):
            refused.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    run = trainer(PromptPoolTrainer, model, tmp_path, seen)
    run.train()
    with pytest.raises(ValueError, match=r"answers for only after model.consolidate\(images\): evaluate after it"):
        run.evaluate()
    model.eval().consolidate([rows[:]])
    assert run.evaluate()["eval_accuracy"] > 0.5
    model.end_task()


def test_a_resumed_task_keeps_the_features_of_before_it(tmp_path: Path) -> None:
    """As docs/hf_trainer.md has it: the adapter of before the task, record, begin, then the checkpoint."""
    rows = images(32)
    first, second = (rows.filter(lambda row, of=of: int(row["labels"]) in of) for of in ([0, 1], [2, 3]))
    model = get_prompt_pool_model(build("vit"))
    model.begin_task([0, 1])
    model.eval().consolidate([first[:]])
    model.end_task()
    model.save_pretrained(tmp_path / "before")
    answers = []
    for checkpoint in (None, str(tmp_path / "run" / "checkpoint-4")):
        model = PromptPoolModel.from_pretrained(build("vit"), tmp_path / "before", is_trainable=True)
        model.eval().record_features([second[:]])
        model.begin_task([2, 3])
        often = {"save_strategy": "epoch", "per_device_train_batch_size": 4, "save_total_limit": None}
        run = trainer(PromptPoolTrainer, model, tmp_path / "run", {"train_dataset": second}, **often)
        run.train(resume_from_checkpoint=checkpoint)
        model.eval().consolidate([second[:]])
        model.end_task()
        answers.append(model.eval()(pixel_values=rows[:]["pixel_values"]).logits)
    assert_close(answers[1], answers[0])


@pytest.mark.slow
@pytest.mark.parametrize("when", ["epoch", "steps"])
def test_two_processes_learn_what_one_learns(when: str, tmp_path: Path) -> None:
    """The callback gathers the images' counts before an evaluation and a checkpoint, which hold those of all processes."""
    learn_two_tasks(tmp_path / "one", 1, when)
    in_two_processes(train_in_one_of_two, free_port(), tmp_path / "two", when)
    name = "adapter_model.safetensors"
    saved = [str(file.relative_to(tmp_path / "one")) for file in sorted((tmp_path / "one").rglob(name))]
    within = {"epoch": 4, "steps": 3}[when]
    assert {f"0/checkpoint-{within}/{name}", f"1/checkpoint-{within}/{name}", f"last/{name}"} <= set(saved)
    for file in saved:
        one, two = (load_file(tmp_path / side / file) for side in ("one", "two"))
        assert_close(two, one, atol=1e-6, rtol=0, msg=lambda found, at=file: f"{at}: {found}")
