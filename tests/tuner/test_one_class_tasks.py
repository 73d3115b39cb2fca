"""One new class at a time: every method and head tells the classes apart, or refuses before anything is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import set_seed
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from support.families import build
from support.methods import METHODS, WITH_CLASSIFIER
from torch import Tensor

from cl_prompts import L2PConfig, PromptPoolModel, get_prompt_pool_model


pytestmark = pytest.mark.by_turns(5)


FOUR = [[2], [0], [3], [1]]
IMAGES = 8  # a class


def pictures(labels: Sequence[int], seed: int) -> Tensor:
    """Images that tell their class: a pattern of the class and a little noise."""
    patterns = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    return patterns[list(labels)] + 0.3 * torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def new_model(method: str, **config: Any) -> Any:
    base = build("vit")
    set_seed(3)
    return get_prompt_pool_model(base, {**METHODS, **WITH_CLASSIFIER}[method](**config))


def train(model: Any, labels: Tensor, batches: Sequence[Tensor], first_id: int = 0) -> list[dict[str, float]]:
    """Train on images of `labels` by `batches` of their numbers; the losses of every step."""
    optimizer = torch.optim.Adam(model.parameter_groups(5e-3, head=2e-2))
    model.attach_optimizer(optimizer)
    images, steps = pictures(labels.tolist(), first_id), []
    model.train()
    for rows in batches:
        ids = [first_id + int(row) for row in rows]
        output = model(pixel_values=images[rows], labels=labels[rows], sample_ids=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append({name: value.item() for name, value in output.losses.items()})
    return steps


def learn(model: Any, classes: Sequence[int], number: int, epochs: int = 6) -> None:
    """One task, as the trainer does it."""
    labels = torch.tensor(list(classes)).repeat_interleave(IMAGES)
    first_id = 1000 * (number + 1)
    seen = [{"pixel_values": pictures(labels.tolist(), first_id), "labels": labels, "sample_ids": range(len(labels))}]
    model.eval()
    if number and model.needs_features_before:
        model.record_features(seen)
    model.begin_task(classes)
    if model.trains_task(number):
        train(model, labels, [rows for _ in range(epochs) for rows in torch.randperm(len(labels)).split(8)], first_id)
    model.eval()
    if model.needs_consolidation:
        model.consolidate(seen)
    model.end_task()


@torch.no_grad()
def check_answers(model: Any) -> None:
    """New images of all classes are answered rightly, at least half of each class."""
    labels = torch.tensor(model.classes).repeat_interleave(10)
    logits = model.eval()(pixel_values=pictures(labels.tolist(), 99)).logits
    right = (torch.tensor(model.classes)[logits.argmax(1)] == labels).float().view(-1, 10).mean(1)
    assert right.min() >= 0.5, right
    assert right.mean() >= 0.8, right


@pytest.mark.by_turns(9, always=("l2p",))
@pytest.mark.parametrize("method", [*METHODS, *WITH_CLASSIFIER])
def test_every_method_learns_one_class_at_a_time(method: str) -> None:
    model = new_model(method)
    for number, classes in enumerate(FOUR):
        learn(model, classes, number)
    check_answers(model)


@pytest.mark.parametrize(
    "config",
    [{"head": "cosine"}, {"class_mask": "none"}, {"class_mask": "batch"}, {"trained_tasks": "first"}],
    ids=str,
)
def test_settings_of_the_trained_head(config: dict[str, Any]) -> None:
    model = new_model("coda", **config)
    for number, classes in enumerate(FOUR):
        learn(model, classes, number)
    check_answers(model)


@pytest.mark.parametrize("tasks", [[[0], [1, 2], [3]], [[0, 1], [2], [3]]])
def test_tasks_of_several_sizes(tasks: list[list[int]]) -> None:
    """A first class that was alone is compared with those of the next task."""
    model = new_model("l2p_prefix")
    for number, classes in enumerate(tasks):
        learn(model, classes, number)
    check_answers(model)


@pytest.mark.parametrize("tasks", [True, False])
@pytest.mark.parametrize("size", [1, 4])
def test_batches_of_one_class(tasks: bool, size: int) -> None:
    """Under class_mask="batch" images sorted by class teach what mixed ones do, also without tasks."""
    model = new_model("none", class_mask="batch", **({} if tasks else {"num_labels": 4}))
    if tasks:
        model.begin_task(range(4))
    train(model, torch.arange(4).repeat_interleave(IMAGES), torch.arange(4 * IMAGES).repeat(2 * size).split(size))
    check_answers(model)


def test_several_classes_are_learned_as_before() -> None:
    """The further term is for steps that show one class; it is 0 where a batch has several."""
    model = new_model("l2p")
    model.begin_task([0, 1])
    labels = torch.tensor([0, 1, 0, 0])
    assert "class_gaussians" not in train(model, labels, [torch.arange(4), torch.tensor([0, 2])])[1]
    model = new_model("l2p", class_mask="batch")
    model.begin_task([0, 1])
    mixed, alone = train(model, labels, [torch.arange(4), torch.tensor([0, 2])])
    assert mixed["class_gaussians"] == 0 < alone["class_gaussians"]


def test_a_loaded_adapter_learns_one_more_class_if_it_has_statistics(tmp_path: Path) -> None:
    for saved in (False, True):
        model = new_model("l2p_prefix", save_statistics=saved)
        learn(model, [0, 1, 2], 0)
        model.save_pretrained(tmp_path)
        loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path, is_trainable=True)
        if not saved:
            with pytest.raises(ValueError, match=r"of earlier classes, \[0, 1, 2\].*save_statistics=True.*discrim"):
                loaded.begin_task([3])
            assert loaded.classes == [0, 1, 2]
            loaded.begin_task([3, 4])
        else:
            learn(loaded, [3], 1)
            check_answers(loaded)


@pytest.mark.parametrize("tasks", [[[0, 1, 2], [3]], [[0], [1, 2]]], ids=str)
@pytest.mark.parametrize("way", ["file", "state_dict", "peft"])
@pytest.mark.parametrize("saved", [True, False])
def test_an_open_task_goes_on_if_it_has_statistics(saved: bool, way: str, tasks: list[list[int]], tmp_path: Path) -> None:
    """A checkpoint within a task of one class, or after a first one: refused before a step that would teach nothing."""
    model = new_model("l2p_prefix", save_statistics=saved)
    learn(model, tasks[0], 0)
    model.begin_task(tasks[1])
    if way == "file":
        model.save_pretrained(tmp_path)
        loaded: Any = PromptPoolModel.from_pretrained(build("vit"), tmp_path, is_trainable=True)
    else:
        loaded = new_model("l2p_prefix", save_statistics=saved)
        loaded.begin_task(tasks[0])
        loaded.end_task()
        loaded.begin_task(tasks[1])
        if way == "peft":
            set_peft_model_state_dict(loaded, get_peft_model_state_dict(model))
        else:
            loaded.load_state_dict(model.state_dict())
    labels = torch.tensor(tasks[1]).repeat_interleave(IMAGES)
    batches = [rows for _ in range(6) for rows in torch.randperm(len(labels)).split(8)]
    if saved:
        train(loaded, labels, batches, 2000)
        loaded.end_task()
        check_answers(loaded)
    else:
        before = loaded.head.weight.clone()
        for _ in range(2):
            with pytest.raises(ValueError, match=r"of earlier classes.*save_statistics=True"):
                train(loaded, labels, batches, 2000)
        assert torch.equal(loaded.head.weight, before)
        loaded.eval()(pixel_values=pictures([0], 1))


def test_a_state_of_this_model_changes_nothing() -> None:
    """As when transformers.Trainer loads its best checkpoint: the features of its classes are known."""
    model = new_model("l2p_prefix")
    learn(model, [0, 1, 2], 0)
    model.load_state_dict(model.state_dict())
    learn(model, [3], 1)
    check_answers(model)


def test_one_label_is_refused() -> None:
    with pytest.raises(ValueError, match="num_labels=1 leaves nothing to tell apart"):
        L2PConfig(num_labels=1, class_mask="none")


def test_files_without_running_gaussians_load(tmp_path: Path) -> None:
    """Files of before 2026-11 with `save_statistics` have none for a trained head."""
    from safetensors.torch import load_file, save_file

    model = get_prompt_pool_model(build("vit"), L2PConfig(save_statistics=True))
    model.begin_task([0, 1])
    model.end_task()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if "running_gaussians" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, path)
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path, is_trainable=True, verify=False)
    with pytest.raises(ValueError, match="saved without"):
        loaded.begin_task([2])
    loaded.save_pretrained(tmp_path / "again")
    PromptPoolModel.from_pretrained(build("vit"), tmp_path / "again")
