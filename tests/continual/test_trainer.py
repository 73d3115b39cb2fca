"""One task with transformers.Trainer: what it hands over, what it keeps, and that accumulating changes nothing.

Also `gradient_accumulation_steps` of every method in our own trainer, and which settings `ContinualArguments` refuses.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from support.families import build
from support.methods import METHODS
from support.small_runs import small_model, small_trainer, tensors
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from cl_prompts import HashPromptConfig, L2PConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.continual import ContinualArguments


pytestmark = pytest.mark.by_turns(5, always=())


methods = pytest.mark.parametrize("method", ["l2p", "hash"])
wraps = pytest.mark.parametrize("wrap", [get_prompt_pool_model, get_peft_model])


def images(count: int, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_dict(
        {
            "pixel_values": torch.randn(count, 3, 32, 32, generator=generator).numpy(),
            "labels": torch.tensor([5, 1])[torch.randint(2, (count,), generator=generator)].numpy(),
            "sample_ids": np.arange(count),
        }
    ).with_format("torch")


def second_task(method: str, wrap: Callable[..., Any] = get_prompt_pool_model) -> tuple[Any, torch.optim.Optimizer]:
    """A model at the start of its second task, so that Hash has a history to protect, and its SGD.

    Adam would hide a wrong scale of the loss.
    """
    torch.manual_seed(0)
    config = L2PConfig(pool_size=7, top_k=3) if method == "l2p" else HashPromptConfig(pool_size=7, layers=[0, 2])
    model = wrap(build("vit"), config)
    model.begin_task([7, 3])
    optimizer = torch.optim.SGD(model.parameter_groups(learning_rate=0.1))
    model.attach_optimizer(optimizer)
    model.train()(torch.randn(4, 3, 32, 32), labels=torch.tensor([3, 7, 7, 3])).loss.backward()
    optimizer.step()
    model.end_task()
    model.begin_task([5, 1])
    optimizer = torch.optim.SGD(model.parameter_groups(learning_rate=0.2), momentum=0.9)
    model.attach_optimizer(optimizer)
    return model, optimizer


def trainer(model: Any, optimizer: Any, folder: Path, **more: Any) -> Trainer:
    settings: dict[str, Any] = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(str(folder), **{**settings, **more})
    return Trainer(
        model, arguments, train_dataset=images(20), eval_dataset=images(10, seed=1), optimizers=(optimizer, None)
    )


@methods
def test_accumulation_changes_nothing(method: str, tmp_path: Path) -> None:
    """Also in the last, shorter step of an epoch; 20 images make steps of 8, 8 and 4."""
    states, logs = [], []
    for batch, steps in ((8, 1), (4, 2)):
        model, optimizer = second_task(method)
        start = {n: t.clone() for n, t in model.state_dict().items() if ".prompt_pool." in n}
        run = trainer(model, optimizer, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
        run.train()
        states.append({n: model.state_dict()[n] for n in start})
        logs.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        counts = model.base_model.adapter.pool.history.counts[-1]
        per_image = 3 if method == "l2p" else 2 * 4
        assert counts.sum() == 20 * per_image, "two epochs count an image once"
    assert len(logs[0]) == 6
    assert_close(states[1], states[0], atol=1e-6, rtol=0)
    assert_close(logs[1], logs[0], atol=1e-4, rtol=0)
    moved = {n for n, t in start.items() if (states[0][n] - t).abs().max() > 1e-3}
    assert {"head.weight", "pool.prompts"} < {n.partition(".default.")[2] for n in moved}


@pytest.mark.by_turns(17, always=())
@pytest.mark.parametrize("method", METHODS)
def test_parts_of_a_batch_make_the_step_of_the_whole(method: str) -> None:
    """Batches of 8 and 2 images in 3 parts. SGD, for Adam would hide a wrong scale.

    HiDe-Prompt and NoRGa (docs/methods/hide.md): without the term that compares images and but for the class means.
    """
    comparing = "class_means" in small_model(method).adapter.pool.state_dict()
    config = {"contrastive_weight": 0.0} if comparing else {}
    settings = {"tasks": 2, "num_train_epochs": 1, "batch_size": 8, "optim": "sgd", "learning_rate": 0.05, "save_steps": 0}
    runs = []
    for parts in (1, 3):
        run = small_trainer(method, gradient_accumulation_steps=parts, config=config, **settings)
        run.train()
        runs.append({name: tensor for name, tensor in tensors(run).items() if not name.endswith("pool.class_means")})
    assert_close(runs[1], runs[0], atol=5e-5, rtol=1e-5)


@methods
def test_first_loss_is_the_models_own(method: str, tmp_path: Path) -> None:
    """Logged once per step of 2 x 4 images: the mean over the 8, as one forward says."""
    model, optimizer = second_task(method)
    run = trainer(
        model,
        optimizer,
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
    )
    batch = images(20)[:8]
    expected = model.train()(**batch).loss.item()
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)


@wraps
@methods
def test_evaluation_returns_loss_and_logits_only(method: str, wrap: Callable[..., Any], tmp_path: Path) -> None:
    model, optimizer = second_task(method, wrap)
    run = trainer(model, optimizer, tmp_path, per_device_eval_batch_size=4)
    given = run.predict(images(10, seed=1))
    batch = images(10, seed=1)[:]
    with torch.no_grad():
        expected = model.eval()(batch["pixel_values"]).logits
    assert isinstance(given.predictions, np.ndarray)
    assert_close(torch.tensor(given.predictions), expected, atol=1e-5, rtol=0)
    assert given.label_ids.tolist() == batch["labels"].tolist()
    columns = torch.tensor([model.classes.index(label) for label in batch["labels"].tolist()])
    loss = F.cross_entropy(expected, columns).item()
    assert run.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-4)
    assert "keys_to_ignore_at_inference" not in model.unload().config.to_dict()


@methods
def test_checkpoints_hold_the_adapter_only(method: str, tmp_path: Path) -> None:
    model, optimizer = second_task(method)
    run = trainer(model, optimizer, tmp_path, save_strategy="epoch")
    run.train()
    folders = sorted(tmp_path.glob("checkpoint-*"))
    assert [f.name for f in folders] == ["checkpoint-3", "checkpoint-6"]
    for folder in folders:
        assert [f.name for f in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
        assert not list(folder.glob("*.bin*")) or [f.name for f in folder.glob("*.bin")] == ["training_args.bin"]
        assert (folder / "adapter_config.json").is_file()
    last = PromptPoolModel.from_pretrained(build("vit"), folders[1])
    first = PromptPoolModel.from_pretrained(build("vit"), folders[0])
    pixels = images(10)[:]["pixel_values"]
    with torch.no_grad():
        here, there, earlier = (m.eval()(pixels).logits for m in (model, last, first))
    assert torch.equal(here, there)
    assert not torch.equal(here, earlier)


@wraps
@methods
def test_best_checkpoint_comes_back(method: str, wrap: Callable[..., Any], tmp_path: Path) -> None:
    """`load_best_model_at_end` loads an earlier checkpoint into the adapter that has been saved again since."""
    model, optimizer = second_task(method, wrap)
    run = trainer(
        model,
        optimizer,
        tmp_path,
        num_train_epochs=3,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    run.train()
    best = run.state.best_model_checkpoint
    assert best is not None
    assert not best.endswith("checkpoint-9"), "random labels: more epochs make it worse"
    loaded = PromptPoolModel.from_pretrained(build("vit"), best)
    pixels = images(10)[:]["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model.eval()(pixels).logits, loaded.eval()(pixels).logits)


@methods
def test_resumes_from_a_checkpoint(method: str, tmp_path: Path) -> None:
    straight, optimizer = second_task(method)
    trainer(straight, optimizer, tmp_path, save_strategy="epoch").train()
    resumed, optimizer = second_task(method)
    trainer(resumed, optimizer, tmp_path, save_strategy="no").train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    expected = straight.state_dict()
    for name, tensor in resumed.state_dict().items():
        # Which images were counted is not in the files, so after a resume the open task counts them once more.
        rows = slice(-1) if name.endswith("history.counts") else slice(None)
        assert_close(tensor[rows], expected[name][rows], atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"memory_batch_size": v}, f"memory_batch_size={v} must be a positive integer") for v in (-3, 0, 1.5, True)),
        *(({"seed": v}, f"seed={v!r} must be a non-negative integer") for v in (-1, 1.5, "x")),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinualArguments(**settings)


def test_the_results_folder_is_no_file(tmp_path: Path) -> None:
    """Nor below one; said before anything is trained. A folder that is there, or is still to be made, is taken."""
    file = tmp_path / "results.txt"
    file.write_text("mine")
    for folder in (file, file / "run"):
        with pytest.raises(ValueError, match=r"output_dir='.*results.txt.*' is a file, give a folder"):
            ContinualArguments(str(folder))
    for folder in (tmp_path, tmp_path / "new" / "run"):
        assert ContinualArguments(str(folder)).output_dir == str(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["results.txt"]
