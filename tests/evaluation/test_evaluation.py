"""What evaluation measures, against plain loops over single images."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.families import build
from support.methods import METHODS
from torch import Tensor, nn
from torch.testing import assert_close

from cl_prompts import PromptPoolModel, extract_features, get_prompt_pool_model
from cl_prompts.continual import accuracy, evaluate


TASKS = [[4, 1], [0, 7], [3, 5, 9]]
IMAGES, BATCH = 14, 4
PIXELS = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([3, 5, 9, 3, -100, 5, 9, 9, 3, -100, 5, 3, 9, 5])
REAL = LABELS >= 0


def new_model(method: str, tasks: int = 3, **fields: Any) -> PromptPoolModel:
    """Untrained, with a head whose answers differ from image to image."""
    base = build("vit")
    torch.manual_seed(0)
    model = get_prompt_pool_model(base, METHODS[method](**fields))
    for classes in TASKS[:tasks]:
        model.begin_task(classes)
        model.end_task()
    with torch.no_grad():
        head = model.adapter.head
        head.weight.normal_()
        if head.bias is not None:  # features of random weights are much alike
            head.bias.copy_(-head.weight @ model.eval()(PIXELS).features.mean(0))
    return model.eval()


def batches(**more: Tensor) -> list[dict[str, Tensor]]:
    whole = {"pixel_values": PIXELS, "labels": LABELS, **more}
    return [{name: value[i : i + BATCH] for name, value in whole.items()} for i in range(0, IMAGES, BATCH)]


def measured(model: Any, **options: Any) -> Any:
    return evaluate(model, batches(), model.classes, "cpu", **options)


@torch.no_grad()
def answers(model: PromptPoolModel) -> list[Any]:
    """The answer on each real image alone, with its label."""
    return [(model(PIXELS[i : i + 1]), LABELS[i].item()) for i in range(IMAGES) if REAL[i]]


def share(hits: list[bool]) -> float:
    return 100 * sum(hits) / len(hits)


def test_what_is_measured_once_the_task_is_told() -> None:
    model = new_model("dualprompt")
    found = measured(model, task=2, tasks=TASKS)
    hits, masked, of_task = [], [], []
    for output, label in answers(model):
        logits = dict(zip(model.classes, output.logits[0].tolist(), strict=True))
        best = max(logits, key=logits.__getitem__)
        hits.append(best == label)
        of_task.append(best in TASKS[2])
        masked.append(max(TASKS[2], key=logits.__getitem__) == label)
    assert found.images == len(hits) == 12
    assert (found.accuracy, found.task_incremental, found.task_of_class) == (share(hits), share(masked), share(of_task))
    assert 0 < found.accuracy < found.task_incremental < 100
    assert found.accuracy <= found.task_of_class
    alone = measured(model)
    assert (alone.accuracy, alone.images) == accuracy(model, batches(), model.classes, "cpu") == (share(hits), 12)
    assert (alone.task_incremental, alone.task_of_class, alone.task_identity) == (None, None, None)


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("dualprompt", {}),
        ("dualprompt", {"ensemble": 2}),
        ("dualprompt", {"keys_per_layer": True}),
        ("dualprompt one-stage", {}),
        ("coda_layer_argmax", {}),
        ("layer_grouped", {}),
    ],
)
def test_whose_prompts_were_chosen(method: str, fields: dict[str, Any]) -> None:
    """The largest of the scores by which the method chooses, layer by layer."""
    model = new_model(method, **fields)
    chosen = []
    for output, _ in answers(model):
        for scores in output.scores.reshape(-1, output.scores.shape[-1]):
            per_task = model.adapter.config.components_per_task if method.startswith("coda") else 1
            assert len(scores) == 3 * per_task
            chosen.append(int(scores.argmax()) // per_task)
    assert len(chosen) == 12 * (2 if fields.get("keys_per_layer") or "one-stage" in method or "argmax" in method else 1)
    assert len(set(chosen)) > 1 or method == "layer_grouped"
    for task in range(3):
        assert measured(model, task=task, tasks=TASKS).task_identity == share([c == task for c in chosen])


@pytest.mark.parametrize(("method", "fields"), [("hide", {}), ("norga", {}), ("hash", {"router_inference": "prototype"})])
def test_whose_prompts_were_chosen_by_class_statistics(method: str, fields: dict[str, Any]) -> None:
    model = new_model(method, **fields)
    features = extract_features(model, PIXELS)
    pool, first = model.adapter.pool, {4: 0, 1: 1, 0: 2, 7: 3, 3: 4, 5: 5, 9: 6}  # an image each that stands for a class
    for row, image in first.items():
        pool.prototypes.sum[list(first).index(row)] = features[image]
    pool.prototypes.count.fill_(1)
    means, task_of = features[list(first.values())], [0, 0, 1, 1, 2, 2, 2]
    nearest = [task_of[torch.cosine_similarity(q[None], means).argmax()] for q in features[REAL]]
    assert len(set(nearest)) == 3
    for task in range(3):
        assert measured(model, task=task, tasks=TASKS).task_identity == share([n == task for n in nearest])


@pytest.mark.parametrize("method", ["l2p", "l2p_prefix", "vq_prompt", "smope", "coda", "hash", "vpt"])
def test_methods_that_choose_no_task(method: str) -> None:
    found = measured(new_model(method), task=2, tasks=TASKS)
    assert found.task_identity is None
    assert found.task_of_class is not None


def test_further_classifiers_read_the_same_pass() -> None:
    model = new_model("l2p")
    weight = torch.randn(7, 32, generator=torch.Generator().manual_seed(5))
    passes: list[Tensor] = []

    def linear(features: Tensor) -> Tensor:
        passes.append(features)
        logits = features @ weight.T
        assert logits.dtype == torch.float32  # no autocast, as for the model's own head
        return logits

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = measured(model, classifiers={"linear": linear, "own": model.adapter.head})
        ours = measured(model)
    assert {f.dtype for f in passes} == {torch.float32}
    features = torch.cat(passes)
    assert len(features) == IMAGES
    predicted = torch.tensor(model.classes)[(features.double() @ weight.double().T).argmax(1)]
    assert found.by_classifier["linear"] == share((predicted == LABELS)[REAL].tolist())
    assert found.by_classifier["own"] == found.accuracy == ours.accuracy
    assert ours.by_classifier == {}


class Watched(nn.Module):
    """A learner that is no prompt pool, and tells what it was shown."""

    needs_task = False

    def __init__(self, logits: Tensor | None = None) -> None:
        super().__init__()
        self.logits, self.shown = logits, set[str]()

    def forward(self, **values: Tensor) -> Any:
        self.shown |= set(values)
        logits = torch.zeros(len(values["pixel_values"]), 7) if self.logits is None else self.logits
        return SimpleNamespace(logits=logits, prompt_ids=None, features=None)

    def chosen_tasks(self, output: Any) -> None:
        """It has no prompts."""

    def gather_statistics(self) -> None:
        """It has no statistics."""


def test_nothing_but_images_and_queries_is_shown() -> None:
    model = Watched()
    classes = [c for task in TASKS for c in task]
    found = evaluate(model, batches(sample_ids=torch.arange(IMAGES)), classes, "cpu", task=2, tasks=TASKS)
    assert model.shown == {"pixel_values"}
    assert (found.accuracy, found.task_incremental, found.task_of_class) == (0, share((LABELS[REAL] == 3).tolist()), 0)
    assert found.task_identity is None
    evaluate(model, batches(query=torch.zeros(IMAGES, 32)), classes, "cpu")
    assert model.shown == {"pixel_values", "query"}


def test_queries_spare_a_pass_and_change_nothing() -> None:
    model = new_model("dualprompt")
    queries = extract_features(model, PIXELS)
    passes: list[int] = []
    model.get_base_model().register_forward_hook(lambda *_: passes.append(1))
    with_queries = evaluate(model, batches(query=queries), model.classes, "cpu", task=1, tasks=TASKS)
    once = len(passes)
    without = measured(model, task=1, tasks=TASKS)
    assert len(passes) - once == 2 * once
    for name, value in vars(without).items():
        same = getattr(with_queries, name)
        if isinstance(value, torch.Tensor):
            assert_close(same, value, atol=1e-6, rtol=0)
        else:
            assert same == value


# ---- bad input


def test_what_cannot_be_measured() -> None:
    model = new_model("l2p", tasks=2)
    with pytest.raises(ValueError, match="no images to evaluate on"):
        evaluate(model, [{"pixel_values": PIXELS[:2], "labels": torch.full((2,), -100)}], model.classes, "cpu")
    for tasks in (None, TASKS[:2]):
        with pytest.raises(ValueError, match="task=2 needs `tasks`"):
            measured(model, task=2, tasks=tasks)
    with pytest.raises(ValueError, match=r"knows none of the classes \[3, 5, 9\] of task 2: begin the task first"):
        measured(model, task=2, tasks=TASKS)
    with pytest.raises(ValueError, match=r"logits of the model are of shape \[4, 4\], expected \[images, 5 classes\]"):
        evaluate(model, batches(), [*model.classes, 3], "cpu")
    with pytest.raises(ValueError, match=r"logits of classifier 'wide' are of shape \[4, 32\]"):
        measured(model, classifiers={"wide": lambda features: features})
    with pytest.raises(ValueError, match="holds no `features` for classifier 'own'"):
        evaluate(Watched(), batches(), list(range(7)), "cpu", classifiers={"own": model.adapter.head})


def test_answers_that_are_no_numbers() -> None:
    """An argmax over NaN would name the first of them; padding may hold anything."""
    logits = torch.zeros(4, 2)
    logits[3] = math.nan
    batch = {"pixel_values": PIXELS[:4], "labels": torch.tensor([0, 1, 0, -100])}
    assert evaluate(Watched(logits), [batch], [0, 1], "cpu").accuracy == share([True, False, True])
    batch["labels"][3] = 1
    with pytest.raises(ValueError, match="1 answers on 4 images are NaN"):
        evaluate(Watched(logits), [batch], [0, 1], "cpu")
    with pytest.raises(ValueError, match="1 answers on 4 images are NaN"):
        evaluate(new_model("l2p", 1), [batch], TASKS[0], "cpu", classifiers={"nan": lambda features: logits})
