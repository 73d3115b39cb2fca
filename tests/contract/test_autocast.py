"""Only passes over images run in half precision under autocast; changes of tasks, fits and steps do not."""

from collections.abc import Callable

import pytest
import torch
from support.families import build
from support.methods import METHODS
from support.tensors import draw

from cl_prompts import PromptPoolConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.baselines.steps import StepHooks
from cl_prompts.learner.features import record


EVERY: dict[str, Callable[..., PromptPoolConfig]] = {
    **METHODS,
    "coda aligned": lambda: METHODS["coda"](alignment="covariance"),
    "ovor": lambda: METHODS["one_prompt"](outlier_epochs=1, outliers_per_class=2, outlier_draws=20, outlier_neighbors=2),
    "hash discriminant": lambda: METHODS["hash"](head="discriminant"),
    "none ridge": lambda: METHODS["none"](head="ridge", projection_size=20),
    "l2p cosine": lambda: METHODS["l2p"](head="cosine"),
}


def trained(method: str, *, autocast: bool) -> PromptPoolModel:
    """Two tasks of one step, classes merged; `autocast` is on for everything but the passes over images."""
    base = build("vit")
    torch.manual_seed(0)
    model = get_prompt_pool_model(base, EVERY[method]())
    for task, classes in enumerate(([4, 1], [0, 7])):
        labels = torch.tensor(classes * 4)
        batch = {"pixel_values": draw(8, 3, 32, 32, seed=task), "labels": labels, "sample_ids": torch.arange(8)}
        if model.needs_consolidation:
            model.record_features([batch])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.begin_task(classes)
            optimizer = torch.optim.AdamW(model.parameter_groups(learning_rate=0.02))
            model.attach_optimizer(optimizer)
        model.train()
        model(**batch).loss.backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            optimizer.step()
        seen = record(model.eval().features_of, [batch])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.adapter.consolidate(seen)
            model.end_task()
    return model


@pytest.mark.by_turns(5, always=["one_prompt", "ovor"])
@pytest.mark.parametrize("method", EVERY)
def test_a_task_of_every_method(method: str) -> None:
    plain, under = trained(method, autocast=False), trained(method, autocast=True)
    found = under.state_dict()
    assert not [name for name, value in plain.state_dict().items() if not torch.equal(value, found[name])]
    assert under.adapter.config.state == plain.adapter.config.state


def test_merged_classes() -> None:
    models = []
    for autocast in (False, True):
        models.append(trained("coda aligned", autocast=False))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            models[-1].merge_classes([4, 0], into=4)
    plain, under = (model.state_dict() for model in models)
    assert not [name for name, value in plain.items() if not torch.equal(value, under[name])]


def test_functions_around_a_step_of_a_baseline() -> None:
    parameter, seen = torch.nn.Parameter(torch.ones(1)), list[bool]()
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    look = lambda: seen.append(torch.is_autocast_enabled("cpu"))  # noqa: E731
    StepHooks().attach(optimizer, look, look)
    parameter.grad = torch.ones(1)
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step()
    assert seen == [False, False]
