"""Every head through an adapter, where a class has one image, equal ones or none: answers stay numbers."""

import math
from typing import Any

import pytest
import torch
from support.tensors import draw
from torch import Tensor
from torch.nn import functional as F

from cl_prompts import PromptPoolConfig, VPTConfig
from cl_prompts.heads import AlignedClassifier
from cl_prompts.interfaces import BackboneShape
from cl_prompts.learner.features import Recorded
from cl_prompts.tuner.adapter import PoolAdapter


pytestmark = pytest.mark.by_turns(19)  # 20 rows a head: each head gets another one

WIDTH = 10  # more than a task has images
OVOR: dict[str, Any] = {"outlier_epochs": 2, "outlier_draws": 20}
HEADS: dict[str, dict[str, Any]] = {
    "discriminant": {"head": "discriminant"},
    "discriminant, full": {"head": "discriminant", "class_covariance": "full"},
    "discriminant, shared": {"head": "discriminant", "class_covariance": "shared"},
    "discriminant, diagonal": {"head": "discriminant", "class_covariance": "diagonal"},
    "ridge": {"head": "ridge", "projection_size": 20},
    "aligned": {"alignment": "covariance"},
    "aligned cosine": {"alignment": "diagonal", "head": "cosine"},
    "linear": {},
    "cosine": {"head": "cosine"},
    "layer norm": {"head": "layer_norm"},
    "linear, outliers": OVOR,
    "cosine, outliers": {"head": "cosine", **OVOR},
}
STREAMS = {"classes": [[0], [1, 2], [3]], "one comes back": [[0, 1], [2, 3], [1]]}
IMAGES = {"one": [1], "one and five": [1, 5], "none and two": [0, 2]}


def images_of(task: list[int], counts: list[int], seed: int, equal: bool) -> tuple[Tensor, Tensor]:
    """Features and class ids of a task's images; `equal` ones are the same in each class."""
    labels = [c for place, c in enumerate(task) for _ in range(counts[place % len(counts)])] or task[:1]
    return draw(5, WIDTH, seed=9)[labels] + (0 if equal else draw(len(labels), WIDTH, seed=seed)), torch.tensor(labels)


def learn(adapter: PoolAdapter, task: list[int], features: Tensor, labels: Tensor, left_out: bool) -> None:
    """A task of an adapter whose prompts shift all features a little."""
    ids, known = torch.arange(len(labels)), set(adapter.classes)
    adapter.recorded = Recorded(features - 0.1, labels, ids) if known else None
    adapter.begin_task(task, revisit=bool(known & set(task)))
    repeated = torch.tensor([int(label) in labels[:row].tolist() for row, label in enumerate(labels)])
    untrained = repeated & left_out
    targets = adapter.head.to_targets(labels)[0][~untrained]
    optimizer = torch.optim.Adam(adapter.head.parameters(), lr=0.05)
    for _ in range(5):
        logits = adapter.head(features[~untrained]).masked_fill(~adapter.head.current, -math.inf)
        F.cross_entropy(logits, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        adapter.consolidate(Recorded(features, labels, ids, untrained))
    adapter.end_task()


@torch.no_grad()
def answers(adapter: PoolAdapter, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Logits at test and novelty."""
    logits = adapter.calibrated(adapter.classify(seen), seen)
    return logits, adapter.novelty(seen, logits)


@pytest.mark.parametrize("left_out", [False, True], ids=["", "calibration share"])
@pytest.mark.parametrize("images", [*IMAGES, "equal", "all equal"])
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("head", HEADS)
def test_answers_are_numbers(head: str, stream: str, images: str, left_out: bool) -> None:
    torch.manual_seed(0)
    config: PromptPoolConfig = VPTConfig(prompt_length=1, save_statistics=True, **HEADS[head])
    adapter = PoolAdapter(config, BackboneShape(width=WIDTH, num_layers=1, num_heads=1, head_dim=WIDTH), "cls").eval()
    if isinstance(adapter.classifier, AlignedClassifier):
        adapter.classifier.options = {"epochs": 2}
    seen = torch.cat([draw(6, WIDTH, seed=3), torch.zeros(1, WIDTH)])
    for number, task in enumerate(STREAMS[stream]):
        features, labels = images_of(task, IMAGES.get(images, [4]), number, "equal" in images)
        learn(adapter, task, torch.zeros_like(features) if images == "all equal" else features, labels, left_out)
        logits, novelty = answers(adapter, seen)
        answered = logits.isfinite().all(0)
        assert answered.all() or (images == "none and two" and not logits.isnan().any() and answered.any())
        torch.testing.assert_close(logits.softmax(1).sum(1), torch.ones(len(seen)))
        assert novelty.isfinite().all()
        state = config.state
        assert all(1e-4 <= found <= 1e4 for found in [state.temperature or 1.0, *state.task_temperatures])
        assert math.isfinite(state.novelty_threshold or 0.0)
        alone = [torch.cat(parts) for parts in zip(*(answers(adapter, row[None]) for row in seen), strict=True)]
        torch.testing.assert_close(alone[0].softmax(1), logits.softmax(1), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(alone[1], novelty, atol=1e-3, rtol=1e-3)
