"""Streams of tasks, evaluation that peeks at nothing, and the baselines."""

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.families import build
from support.stream_data import birds, to_tensor
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from cl_prompts import HashPromptConfig, L2PConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.continual import (
    ClassIncrementalStream,
    FrozenFeatures,
    accuracy,
    joint_linear_probe,
    nearest_class_mean,
    sequential_probe,
    split_classes,
    stream_features,
)
from cl_prompts.continual.streams.loading import PADDING_ID
from cl_prompts.evaluation.probes import _fit
from cl_prompts.heads.incremental import IncrementalHead


TRAIN = [5, 9, 5, 2, 7, 9, 9, 2, 5, 7, 7, 2, 4, 5, 9, 2, 7]
TEST = [9, 2, 7, 5, 5, 7, 2, 9, 4, 7, 5]
TASKS = [[9, 5], [2, 7]]  # class 4 is in no task
IMAGES = torch.randn(len(TRAIN) + len(TEST), 3, 32, 32, generator=torch.Generator().manual_seed(0))


def stream_of(train: list[int] = TRAIN, test: list[int] = TEST, tasks: list[list[int]] = TASKS) -> ClassIncrementalStream:
    """The image column holds numbers of `IMAGES`; test images come behind training images."""
    numbers = list(range(len(train) + len(test)))
    return ClassIncrementalStream(
        Dataset.from_dict({"picture": numbers[: len(train)], "kind": train}),
        Dataset.from_dict({"picture": numbers[len(train) :], "kind": test}),
        tasks,
        IMAGES.__getitem__,
        image_column="picture",
        label_column="kind",
    )


def order(stream: ClassIncrementalStream, task: int = 0, seed: int = 0, epoch: int = 0) -> list[int]:
    batches = stream.train_batches(stream.tasks[task], 3, seed=seed, epoch=epoch)
    return [i for batch in batches for i in batch["sample_ids"]]


def test_tasks_are_a_partition() -> None:
    stream = stream_of()
    assert len(stream) == 2
    for labels, which in ((TRAIN, "train_rows"), (TEST, "test_rows")):
        rows = [getattr(task, which).tolist() for task in stream]
        assert [sorted({labels[i] for i in part}) for part in rows] == [[5, 9], [2, 7]]
        assert sorted(rows[0] + rows[1]) == [i for i, label in enumerate(labels) if label != 4]
    assert [task.classes for task in stream] == TASKS
    assert [task.number for task in stream] == [0, 1]


def test_batches_hold_the_rows_they_name() -> None:
    stream, queries = stream_of(), torch.randn(len(TRAIN), 8)
    task = stream.tasks[1]
    batches = list(stream.train_batches(task, 3, seed=0, epoch=0, queries=queries))
    assert [len(b["labels"]) for b in batches] == [3, 3, 2]
    for batch in batches:
        assert batch.keys() == {"pixel_values", "labels", "sample_ids", "query"}
        assert batch["labels"].tolist() == [TRAIN[i] for i in batch["sample_ids"]]
        assert torch.equal(batch["pixel_values"], IMAGES[batch["sample_ids"]])
        assert torch.equal(batch["query"], queries[batch["sample_ids"]])
    tests = list(stream.test_batches(task, 4))
    rows = task.test_rows.tolist()
    assert torch.cat([b["pixel_values"] for b in tests]).equal(IMAGES[[len(TRAIN) + i for i in rows]])
    assert [i for b in tests for i in b["sample_ids"]] == rows
    assert "query" not in tests[0]
    everything = [i for b in stream.all_images(train=True, batch_size=4) for i in b["sample_ids"]]
    assert everything == sorted([*stream.tasks[0].train_rows, *stream.tasks[1].train_rows])


def test_order_follows_from_seed_task_and_epoch_alone() -> None:
    first = order(stream_of())
    torch.manual_seed(123)
    np.random.seed(123)
    stream = stream_of()
    order(stream, task=1)
    assert order(stream) == first
    assert sorted(first) == stream.tasks[0].train_rows.tolist()
    others = [order(stream, epoch=1), order(stream, seed=1)]
    assert all(sorted(other) == sorted(first) and other != first for other in others)
    assert others[0] != others[1]
    ranks = [np.argsort(order(stream, task=t)).tolist() for t in (0, 1)]
    assert len(ranks[0]) == len(ranks[1])
    assert ranks[0] != ranks[1], "tasks of equal size are shuffled alike"


def test_loader_processes_change_nothing() -> None:
    stream = stream_of()
    for plain, loaded in zip(
        stream.train_batches(stream.tasks[0], 4, seed=0, epoch=0),
        stream.train_batches(stream.tasks[0], 4, seed=0, epoch=0, workers=1),
        strict=True,
    ):
        assert torch.equal(plain["pixel_values"], loaded["pixel_values"])
        assert plain["sample_ids"] == loaded["sample_ids"]


@pytest.mark.parametrize(
    ("tasks", "why"),
    [
        ([[5, 9], [2, 9, 5]], r"task 1 repeats classes \[5, 9\]"),
        ([[5, 9], [2, 11]], r"task 1: classes \[11\] have no training images"),
    ],
)
def test_bad_tasks(tasks: list[list[int]], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        stream_of(tasks=tasks)


def test_a_class_without_test_images() -> None:
    with pytest.raises(ValueError, match=r"task 0: classes \[9\] have no test images"):
        stream_of(test=[5, 2, 7])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_task_without_a_readable_image_is_named(workers: int) -> None:
    """Not trained on padding. One readable image is enough, and it takes the places of the others."""
    labels = [0, 1, 2, 3] * 3
    for readable in ((), (7,)):
        bad = tuple(row for row, label in enumerate(labels) if label > 1 and row not in readable)
        stream = ClassIncrementalStream(
            birds(labels, bad=bad), birds(labels), [[0, 1], [2, 3]], to_tensor, on_bad_image="skip"
        )
        first, second = (stream.train_batches(t, 4, seed=0, epoch=0, workers=workers) for t in stream.tasks)
        assert sorted(i for batch in first for i in batch["sample_ids"]) == [0, 1, 4, 5, 8, 9]
        if readable:
            assert sorted(i for batch in second for i in batch["sample_ids"]) == [PADDING_ID] * 5 + [7]
            whole = to_tensor(birds(labels)[7]["image"])
            assert all(torch.equal(image, whole) for batch in second for image in batch["pixel_values"])
        else:
            with pytest.raises(ValueError, match="none of the 6 train images of task 1 can be read"):
                list(second)


def test_split_classes() -> None:
    assert split_classes([7, 1, 3, 9, 5], 2) == [[1, 3, 5], [7, 9]]
    assert split_classes(range(10), 5) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    shuffled = split_classes(range(100), 10, seed=4)
    assert shuffled == split_classes(reversed(range(100)), 10, seed=4)
    assert shuffled != split_classes(range(100), 10, seed=5)
    assert shuffled != split_classes(range(100), 10)
    assert sorted(c for task in shuffled for c in task) == list(range(100))
    assert all(len(task) == 10 and all(type(c) is int for c in task) for task in shuffled)
    for tasks in (0, 4):
        with pytest.raises(ValueError, match=f"3 classes cannot be split into {tasks} tasks"):
            split_classes([1, 2, 3], tasks)


# ---- no peeking ----------------------------------------------------------------------------------------------------

CONFIGS = {
    "l2p": lambda: L2PConfig(pool_size=6, prompt_length=2, top_k=2),
    "hash-average": lambda: HashPromptConfig(pool_size=6, prompt_length=4, top_k=2, layers=[0, 2]),
    "hash-prototype": lambda: HashPromptConfig(layers=[0, 2], router_inference="prototype"),
    "hash-confidence": lambda: HashPromptConfig(layers=[0, 2], router_inference="confidence"),
}


@pytest.fixture(scope="module", params=CONFIGS)
def trained(request: pytest.FixtureRequest) -> PromptPoolModel:
    base = build("vit")
    torch.manual_seed(0)
    model = get_prompt_pool_model(base, CONFIGS[request.param]())
    stream = stream_of()
    for task in stream:
        model.begin_task(task.classes)
        optimizer = torch.optim.Adam(model.parameter_groups(learning_rate=1e-2))
        model.attach_optimizer(optimizer)
        model.train()
        for batch in stream.train_batches(task, 3, seed=0, epoch=0):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.end_task()
    return model.eval()


def evaluate(model: PromptPoolModel, stream: ClassIncrementalStream) -> tuple[list[float], dict[int, Tensor]]:
    """Accuracies by task and the logits of each image; whatever else reaches model or pool fails the test."""
    logits: list[Tensor] = []

    def into_model(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        assert (args, set(kwargs)) == ((), {"pixel_values"})

    def into_pool(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        assert not kwargs
        (batch,) = args
        assert batch.task is None
        assert batch.counted is None or batch.counted.all()

    handles = [
        model.register_forward_pre_hook(into_model, with_kwargs=True),
        model.adapter.pool.register_forward_pre_hook(into_pool, with_kwargs=True),
        model.register_forward_hook(lambda module, args, output: logits.append(output.logits)),
    ]
    try:
        measured = [accuracy(model, stream.test_batches(task, 2), model.classes, "cpu") for task in stream]
    finally:
        for handle in handles:
            handle.remove()
    assert [n for _, n in measured] == [len(task.test_rows) for task in stream]
    rows = [int(i) for task in stream for i in task.test_rows]
    return [a for a, _ in measured], dict(zip(rows, torch.cat(logits), strict=True))


def test_evaluation_peeks_at_nothing(trained: PromptPoolModel) -> None:
    """Poisoned labels and tasks: what is measured changes, what the model answers does not."""
    measured, answers = evaluate(trained, stream_of())
    swap = {5: 9, 9: 5, 2: 7, 7: 2, 4: 4}
    poisoned, same = evaluate(trained, stream_of(test=[swap[label] for label in TEST]))
    assert all(torch.equal(same[row], logits) for row, logits in answers.items())
    ids = torch.tensor(trained.classes)
    for number, labels in ((0, TEST), (1, [swap[label] for label in TEST])):
        expected = []
        for task in stream_of().tasks:
            hits = [ids[answers[int(row)].argmax()].item() == labels[row] for row in task.test_rows]
            expected.append(100 * sum(hits) / len(hits))
        assert (measured, poisoned)[number] == expected
    # The same images under other task numbers, in other company.
    _, moved = evaluate(trained, stream_of(tasks=[[2, 5], [7, 9]]))
    for row, logits in answers.items():
        assert_close(moved[row], logits, atol=1e-5, rtol=0)


def test_labels_at_test_change_only_the_loss(trained: PromptPoolModel) -> None:
    with torch.no_grad():
        outputs = [trained(IMAGES[:4], labels=labels) for labels in (None, torch.tensor([9, 9, 2, -100]))]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.isfinite(outputs[0].logits).all()


def test_evaluation_leaves_no_trace(trained: PromptPoolModel) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    evaluate(trained, stream_of())
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_accuracy_ignores_padding_and_refuses_nothing(trained: PromptPoolModel) -> None:
    with torch.no_grad():
        right = int(torch.tensor(trained.classes)[trained(IMAGES[:1]).logits.argmax()])
    batches = [{"pixel_values": IMAGES[:1].repeat(3, 1, 1, 1), "labels": torch.tensor([right, -100, right + 1])}]
    assert accuracy(trained, batches, trained.classes, "cpu") == (50.0, 2)
    with pytest.raises(ValueError, match="no images to evaluate"):
        accuracy(trained, [], trained.classes, "cpu")


def test_stream_features_by_row(trained: PromptPoolModel) -> None:
    stream = stream_of()
    table = stream_features(trained, stream.all_images(train=False, batch_size=3), len(TEST), "cpu")
    expected = trained.base_model.extract_features(IMAGES[len(TRAIN) :])
    assert_close(table[:8], expected[:8], atol=1e-5, rtol=0)
    assert_close(table[9:], expected[9:], atol=1e-5, rtol=0)
    assert not table[8].any(), "class 4 is in no task"


# ---- baselines -------------------------------------------------------------------------------------------


def frozen_features() -> FrozenFeatures:
    """Two tasks of two and three overlapping classes."""
    generator = np.random.default_rng(0)
    centres = 0.8 * generator.normal(size=(10, 6))

    def draw(classes: list[int], each: int) -> tuple[Tensor, Tensor]:
        labels = generator.permutation(np.repeat(classes, each))
        return torch.tensor(centres[labels] + generator.normal(size=(len(labels), 6))).float(), torch.tensor(labels)

    return FrozenFeatures([draw(c, 20) for c in ([8, 3], [1, 9, 4])], [draw(c, 15) for c in ([8, 3], [1, 9, 4])])


def test_nearest_class_mean() -> None:
    data = frozen_features()
    columns = []
    for tasks in (1, 2):
        features, labels = (np.concatenate([part[i].numpy() for part in data.train[:tasks]]) for i in (0, 1))
        classes = np.unique(labels)
        means = np.stack([features[labels == c].mean(0) for c in classes])
        column = []
        for x, y in data.test[:tasks]:
            cosine = (x.numpy() @ means.T) / np.linalg.norm(means, axis=1) / np.linalg.norm(x, axis=1, keepdims=True)
            column.append(100 * float((classes[cosine.argmax(1)] == y.numpy()).mean()))
        columns.append(column)
    matrix = nearest_class_mean(data)
    assert matrix.columns == [pytest.approx(column, abs=1e-9) for column in columns]
    assert matrix.sizes == [30, 45]
    assert all(40 < a < 100 for column in columns for a in column), "the data must tell classifiers apart"


SETTINGS: dict[str, Any] = {"epochs": 3, "batch_size": 16, "lr": 0.05}


@pytest.mark.parametrize("probe", [sequential_probe, joint_linear_probe])
def test_probes_follow_from_their_seed(probe: Any) -> None:
    data = frozen_features()
    torch.manual_seed(1)
    first = probe(data, **SETTINGS, seed=0)
    torch.manual_seed(2)
    assert probe(data, **SETTINGS, seed=0).columns == first.columns
    assert probe(data, **SETTINGS, seed=1).columns != first.columns


@pytest.mark.parametrize("cosine_scale", [None, 5.0])
def test_sequential_probe_touches_only_the_rows_of_its_task(cosine_scale: float | None) -> None:
    data = frozen_features()
    seen: list[int] = []
    head = IncrementalHead(6, cosine_scale)
    for task, (features, labels) in enumerate(data.train):
        old = len(seen)
        seen += data.classes[task]
        head.expand(seen, data.classes[task])
        before = head.weight.detach().clone()
        _fit(head, features, labels, **SETTINGS)
        assert torch.equal(head.weight[:old], before[:old])
        assert (head.weight[old:] != before[old:]).all()


def test_sequential_probe_equals_a_head_per_task() -> None:
    """Under the task mask a growing head is one head per task, all compared at test."""
    data = frozen_features()
    torch.manual_seed(0)
    weights, biases, seen = [], [], []
    for task, (features, labels) in enumerate(data.train):
        seen += data.classes[task]
        weight = torch.empty(len(data.classes[task]), 6)
        torch.nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04)
        weight.requires_grad_()
        bias = torch.zeros(len(weight), requires_grad=True)
        optimizer = torch.optim.Adam([weight, bias], lr=SETTINGS["lr"])
        targets = torch.tensor([data.classes[task].index(int(c)) for c in labels])
        for _ in range(SETTINGS["epochs"]):
            for batch in torch.randperm(len(features)).split(SETTINGS["batch_size"]):
                optimizer.zero_grad()
                F.cross_entropy(features[batch] @ weight.T + bias, targets[batch]).backward()
                optimizer.step()
        weights.append(weight.detach())
        biases.append(bias.detach())
    matrix = sequential_probe(data, **SETTINGS, seed=0)
    for tasks, column in enumerate(matrix.columns, start=1):
        logits = [x @ torch.cat(weights[:tasks]).T + torch.cat(biases[:tasks]) for x, _ in data.test[:tasks]]
        hits = [torch.tensor(seen)[z.argmax(1)] == y for z, (_, y) in zip(logits, data.test, strict=False)]
        assert column == [pytest.approx(100 * h.double().mean().item(), abs=1e-9) for h in hits]


def test_joint_probe_learns_all_tasks_at_once() -> None:
    data = frozen_features()
    joint = joint_linear_probe(data, **SETTINGS, seed=0)
    assert joint.summary()["faa"] > sequential_probe(data, **SETTINGS, seed=0).summary()["faa"]
    assert joint.columns[0] == sequential_probe(data, **SETTINGS, seed=0).columns[0]
