"""The novelty threshold follows classes that are forgotten or merged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.closed_form_models import new_model, task_images, train_steps
from support.families import build
from support.small_runs import CLASSES

from cl_prompts import PromptPoolModel
from cl_prompts.tuner.novelty_threshold import KnownFeatures, novelty_of


HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "discriminant": ("none", {"head": "discriminant"}),
    "ridge": ("hash discriminant", {"head": "ridge", "projection_size": 40, "trained_tasks": "all"}),
    "aligned": ("coda aligned", {}),
    "trained": ("l2p", {}),  # with running Gaussians
}
CHANGES: dict[str, Callable[[Any], None]] = {
    "forget": lambda model: model.forget_classes([0, 2, 5]),
    "forget a task": lambda model: model.forget_classes([4, 1]),
    "merge": lambda model: model.merge_classes([4, 0], into=0),
}
GONE = {"forget": {0, 2, 5}, "forget a task": {4, 1}, "merge": set()}


def learnt(method: str, **config: Any) -> Any:
    """A model whose scores are calibrated, also of a trained head, as by `ContinualTrainer`."""
    model = new_model(method, **config)
    for task in CLASSES:
        images = task_images(task)
        if model.needs_features_before and model.classes:
            model.eval().record_features([images])
        model.begin_task(task)
        if model.trains_task(model.num_tasks - 1):
            train_steps(model, images)
        model.eval().consolidate([images])
        model.end_task()
    return model


@pytest.mark.parametrize(
    ("head", "change"),
    [(h, c) for h in HEADS for c in CHANGES if (h, c) != ("trained", "merge")],  # refused
)
def test_as_many_known_images_exceed_it_as_before(head: str, change: str) -> None:
    method, config = HEADS[head]
    model = learnt(method, **config)
    state, old = model.adapter.config.state, list(model.classes)
    assert state.novelty_threshold is not None
    known = KnownFeatures.of(model.adapter, [c not in GONE[change] for c in old])
    assert known is not None
    # In the middle of all images, where it has to move whatever their novelty.
    state.novelty_threshold = float(known.novelty.quantile(0.7))
    model.adapter.config.false_alarm_rate = 0.3
    CHANGES[change](model)
    threshold, after = model.novelty_threshold, novelty_of(model.adapter, known.features)
    assert float((after > threshold).float().mean()) == pytest.approx(0.3, abs=0.02)
    if GONE[change]:
        assert threshold != float(known.novelty.quantile(0.7))


def test_without_statistics_it_stays_and_says_so(tmp_path: Path) -> None:
    learnt("l2p").save_pretrained(tmp_path)
    model = PromptPoolModel.from_pretrained(build("vit"), tmp_path)
    before = model.novelty_threshold
    assert before is not None
    with pytest.warns(UserWarning, match="forget_classes: no statistics of the classes' features are kept") as told:
        model.forget_classes([0])
    assert told[0].filename == __file__
    assert model.novelty_threshold == before
    model = PromptPoolModel.from_pretrained(build("vit"), tmp_path)
    model.adapter.config.state.task_temperatures[0] *= 3
    with pytest.warns(UserWarning, match="there is none, because energies have another temperature now"):
        model.forget_classes(CLASSES[0])
    assert model.novelty_threshold is None


def test_a_cast_adapter_is_refused() -> None:
    model = learnt("l2p").to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"the adapter was cast to torch.bfloat16"):
        model.forget_classes([0])
