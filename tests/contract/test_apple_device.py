"""Apple's devices have no float64: two tasks of every method and baseline, with fits and evaluations, need none there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.apple_device import OnApple, apple_device
from support.comparison import batch_of, small_learner, train_steps
from support.families import build
from support.methods import METHODS, WITH_CLASSIFIER

from cl_prompts import PromptPoolConfig, get_prompt_pool_model
from cl_prompts.baselines import BASELINES
from cl_prompts.continual import evaluate


TASKS = ([4, 1], [0, 3])
MODELS: dict[str, Callable[..., PromptPoolConfig]] = {
    **METHODS,
    **WITH_CLASSIFIER,
    "ovor": lambda: METHODS["one_prompt"](outlier_epochs=1, outliers_per_class=2, outlier_draws=20, outlier_neighbors=2),
}


@pytest.fixture
def apple() -> Any:
    with apple_device() as device:
        yield device


def there(labels: list[int], device: torch.device) -> dict[str, Any]:
    """A batch of images and their labels on the device."""
    batch = batch_of(labels)
    return batch | {name: batch[name].to(device) for name in ("pixel_values", "labels")}


def learn(learner: Any, device: torch.device) -> None:
    """Two tasks with everything between them."""
    assert all(isinstance(tensor, OnApple) for tensor in learner.parameters())
    for number, classes in enumerate(TASKS):
        batch = there(classes * 4, device)
        memory = [there(TASKS[0] * 4 + classes, device) | {"sample_ids": list(range(50, 60))}]
        if number and learner.needs_features_before:
            learner.record_features([batch])
        learner.begin_task(classes)
        if any(p.requires_grad for p in learner.parameters()):
            train_steps(learner, batch, steps=1)
        learner.rank_images(list(range(8)), [batch])
        learner.consolidate([batch], memory if learner.needs_memory else None)
        learner.end_task()
        assert evaluate(learner.eval(), [batch], learner.classes, device, task=number, tasks=TASKS).images == 8


@pytest.mark.by_turns(9, always=())
@pytest.mark.parametrize("name", MODELS)
def test_prompts(name: str, apple: torch.device) -> None:
    torch.manual_seed(0)
    model = get_prompt_pool_model(build("vit"), MODELS[name]()).to(apple)
    learn(model, apple)
    model.novelty(model(there([4, 1], apple)["pixel_values"]))


@pytest.mark.by_turns(9, always=())
@pytest.mark.parametrize("name", sorted(BASELINES.keys() - {"joint"}))  # which trains on a stream of its own
def test_baselines(name: str, apple: torch.device) -> None:
    learn(small_learner(name).to(apple), apple)


def test_the_device_refuses_what_apples_does(apple: torch.device) -> None:
    moved = torch.ones(3, dtype=torch.float64).float().to(apple)
    assert moved.sum().device == torch.device("mps")
    for call in (moved.double, moved.numpy, lambda: torch.zeros(2, dtype=torch.float64).to(apple)):
        with pytest.raises(TypeError):
            call()
    assert moved.cpu().double().device == torch.device("cpu")
