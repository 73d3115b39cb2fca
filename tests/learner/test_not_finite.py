"""NaN and Inf in what training has changed: no task ends with them, no file and no checkpoint gets them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.comparison import batch_of, small_learner
from support.families import build
from support.small_runs import small_trainer

from cl_prompts import L2PConfig, get_prompt_pool_model
from cl_prompts.continual import TrainerCallback, TrainerState


def spoiled(value: float, wrap: Any = get_prompt_pool_model, **config: Any) -> Any:
    """A model in its second task, with one number spoiled in the last prompt."""
    model = wrap(build("vit"), L2PConfig(top_k=3, **config))
    model.begin_task([0, 1])
    model.end_task()
    model.begin_task([2, 3])
    with torch.no_grad():
        model.base_model.adapter.pool.prompts[-1, 0, 0] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("wrap", [get_prompt_pool_model, PeftModel], ids=["ours", "plain"])
def test_tensor_and_task_are_named(value: float, wrap: Any, tmp_path: Path) -> None:
    model = spoiled(value, wrap)
    message = r"pool\.prompts holds NaN or Inf in task 1, of classes \[2, 3\]: lower the learning rate"
    (tmp_path / "notes.txt").write_text("mine")
    for call in (model.base_model.end_task, model.base_model.training_state_dict, model.base_model.check_finite):
        with pytest.raises(FloatingPointError, match=message):
            call()
    with pytest.raises(FloatingPointError, match=message):
        model.save_pretrained(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["notes.txt"]
    assert not (tmp_path / "new" / "adapter_model.safetensors").exists()


def test_a_good_file_stays(tmp_path: Path) -> None:
    model = spoiled(0.5, modules_to_save=["layernorm"])
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "modules_to_save" in n)[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"layernorm\S* holds NaN or Inf in task 1"):
        model.save_pretrained(tmp_path)
    with pytest.raises(FloatingPointError, match=r"layernorm\S* holds NaN or Inf in task 1"):
        model.end_task()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class Spoil(TrainerCallback):
    """Spoils a prompt that no image has chosen, early in the second task."""

    @torch.no_grad()
    def on_step_end(self, state: TrainerState, task: Any) -> None:
        if task.number == 1 and state.progress.step == 1:
            pool = state.model.adapter.pool
            unused = pool.history.counts.sum(0).argmin()
            assert pool.history.counts[:, unused].sum() == 0
            pool.prompts[unused] = float("nan")


@pytest.mark.parametrize("saves", [True, False], ids=["checkpoints", "no folder"])
def test_a_run_stops(saves: bool, tmp_path: Path) -> None:
    """At the next checkpoint, or at the end of the task. A prompt that no image chooses shows in no loss."""
    folder = tmp_path if saves else None
    trainer = small_trainer("l2p", folder, callbacks=[Spoil()], config={"pool_size": 60})
    with pytest.raises(FloatingPointError, match=r"pool\.prompts holds NaN or Inf in task 1, of classes \[0, 3\]"):
        trainer.train()
    assert len(trainer.evaluations) == 1  # of the first task


def test_a_run_without_tasks_stops() -> None:
    model = get_prompt_pool_model(build("vit"), L2PConfig(num_labels=4, class_mask="batch"))
    model.check_finite()
    with torch.no_grad():
        model.adapter.pool.keys[0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"pool\.keys holds NaN or Inf in training: lower"):
        model.check_finite()


@pytest.mark.parametrize("name", ["finetune", "ewc", "ncm"])
def test_baselines(name: str, tmp_path: Path) -> None:
    learner = small_learner(name)
    learner.begin_task([0, 1])
    learner.consolidate([batch_of([0, 1, 0])])
    tensor = next(iter((learner.extra_tensors() or learner.trained()).values()))
    with torch.no_grad():
        tensor.flatten()[0] = float("nan")
    for call in (learner.end_task, lambda: learner.save_pretrained(tmp_path / "saved")):
        with pytest.raises(FloatingPointError, match=r"holds NaN or Inf in task 0, of classes \[0, 1\]"):
            call()
    assert list(tmp_path.iterdir()) == []
