"""A learner that knows tasks of an earlier run learns the tasks of another stream."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build
from support.small_runs import CLASSES, small_model, small_stream
from torch import Tensor

from cl_prompts import PromptPoolModel
from cl_prompts.continual import ClassIncrementalStream, ContinualArguments, ContinualTrainer
from cl_prompts.heads import DiscriminantClassifier


ARGUMENTS = ContinualArguments(num_train_epochs=1, batch_size=4)


def parts() -> tuple[ClassIncrementalStream, ClassIncrementalStream]:
    """The first two tasks of the small stream, and the third as a stream of its own."""
    whole = small_stream()
    third = ClassIncrementalStream(whole.train, whole.test, CLASSES[2:], whole.transform)
    return small_stream(2), third


def saved_and_loaded(model: Any, folder: Path) -> PromptPoolModel:
    model.save_pretrained(folder)
    return PromptPoolModel.from_pretrained(build("vit"), folder, is_trainable=True)


def logits(model: Any) -> Tensor:
    stream = small_stream()
    pixels = torch.cat([next(iter(stream.test_batches(task, 99)))["pixel_values"] for task in stream])
    with torch.no_grad():
        output: Tensor = model.eval()(pixels).logits
    return output


def test_statistics_are_those_of_one_run(tmp_path: Path) -> None:
    settings = {"head": "discriminant"}
    once = small_model("none", **settings)
    ContinualTrainer(once, small_stream(), ARGUMENTS).train()
    first, third = parts()
    model = small_model("none", **settings)
    ContinualTrainer(model, first, ARGUMENTS).train()
    model = saved_and_loaded(model, tmp_path)
    matrix = ContinualTrainer(model, third, ARGUMENTS).train()
    assert model.classes == once.classes
    assert torch.equal(logits(model), logits(once))
    assert len(matrix.columns) == 1, "only tasks of this run are evaluated"


@pytest.mark.by_turns(3, always=())
@pytest.mark.parametrize("method", ["coda", "hash", "layer_grouped"])
def test_drift_is_compensated_and_earlier_prompts_are_kept(method: str, tmp_path: Path) -> None:
    """A head with drift compensation needs the new images before the task, also in the first task of a second run."""
    first, third = parts()
    model = small_model(method, head="discriminant")
    ContinualTrainer(model, first, ARGUMENTS).train()
    model = saved_and_loaded(model, tmp_path)
    trainer = ContinualTrainer(model, third, ARGUMENTS)
    trainer.train()
    assert trainer.earlier_tasks == 2
    assert model.adapter.config.state.tasks == CLASSES
    assert logits(model).isfinite().all()


def test_prompts_of_the_first_task_only_are_not_trained_again(tmp_path: Path) -> None:
    first, third = parts()
    model = small_model("l2p", trained_tasks="first", head="discriminant")
    ContinualTrainer(model, first, ARGUMENTS).train()
    model = saved_and_loaded(model, tmp_path)
    before = {name: p.clone() for name, p in model.adapter.pool.named_parameters()}
    ContinualTrainer(model, third, ARGUMENTS).train()
    assert before
    assert all(torch.equal(p, before[name]) for name, p in model.adapter.pool.named_parameters())


@pytest.mark.slow
def test_choice_of_a_tasks_prompts_counts_from_the_first_run(tmp_path: Path) -> None:
    """`task_identity` compares with the number among all tasks of the learner."""
    first, third = parts()
    model = small_model("dualprompt")
    ContinualTrainer(model, first, ARGUMENTS).train()
    model = saved_and_loaded(model, tmp_path)
    trainer = ContinualTrainer(model, third, ARGUMENTS)
    trainer.train()
    (batch,) = third.test_batches(third.tasks[0], 99)
    with torch.no_grad():
        chosen = model.eval().chosen_tasks(model(batch["pixel_values"]))
    assert trainer.evaluations[0].task_identity == 100 * (chosen == 2).double().mean()


def test_classes_that_are_known_are_refused_before_training() -> None:
    model = small_model("l2p")
    ContinualTrainer(model, small_stream(2), ARGUMENTS).train()
    with pytest.raises(ValueError, match=r"the learner knows the classes \[0, 1, 3, 4\] already"):
        ContinualTrainer(model, small_stream(), ARGUMENTS)
    with pytest.raises(ValueError, match="extra classifiers cannot be fitted to the classes of earlier runs"):
        ContinualTrainer(model, parts()[1], ARGUMENTS, classifiers={"lda": DiscriminantClassifier(32)})
