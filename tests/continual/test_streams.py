"""Streams of tasks, evaluation that peeks at nothing, and the baselines."""

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.families import build
from support.stream_data import birds, images_by_id, sample_ids, to_tensor, train_batches
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from cl_prompts import HashPromptConfig, L2PConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.continual import (
    ClassIncrementalStream,
    CropAndFlip,
    DatasetSequenceStream,
    DomainIncrementalStream,
    FrozenFeatures,
    GaussianStream,
    IterableClassIncrementalStream,
    IterableDomainIncrementalStream,
    JointStream,
    Stream,
    accuracy,
    joint_linear_probe,
    nearest_class_mean,
    sequential_probe,
    stream_features,
)
from cl_prompts.evaluation.probes import _fit
from cl_prompts.heads.incremental import IncrementalHead


pytestmark = pytest.mark.by_turns(3)


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


def test_batches_hold_the_rows_they_name() -> None:
    stream, queries = stream_of(), torch.randn(len(TRAIN), 8)
    task = stream.tasks[1]
    batches = list(train_batches(stream, 1, 3, queries=queries))
    assert [len(b["labels"]) for b in batches] == [3, 3, 2]
    for batch in batches:
        assert batch.keys() == {"pixel_values", "labels", "sample_ids", "query"}
        assert batch["labels"].tolist() == [TRAIN[i] for i in batch["sample_ids"]]
        assert torch.equal(batch["pixel_values"], IMAGES[batch["sample_ids"]])
        assert torch.equal(batch["query"], queries[batch["sample_ids"]])
    tests = list(stream.test_batches(task, 4))
    rows = task.test_rows.tolist()
    assert torch.cat([b["pixel_values"] for b in tests]).equal(IMAGES[[len(TRAIN) + i for i in rows]])
    assert [i for ids in sample_ids(tests) for i in ids] == rows
    assert "query" not in tests[0]
    everything = [i for ids in sample_ids(stream.all_images(train=True, batch_size=4)) for i in ids]
    assert everything == sorted([*stream.tasks[0].train_rows, *stream.tasks[1].train_rows])


# ---- every scenario ------------------------------------------------------------------------------------------------


SCENARIOS: dict[str, Any] = {
    "classes": lambda data, **more: ClassIncrementalStream(data, data, [[0, 1], [2, 3]], to_tensor, **more),
    "domains": lambda data, **more: DomainIncrementalStream(data, data, to_tensor, **more),
    "data sets": lambda data, **more: DatasetSequenceStream(
        {"a": data, "b": data}, {"a": data, "b": data}, to_tensor, **more
    ),
    "gaussian": lambda data, **more: GaussianStream(data, data, to_tensor, **more),
    "joint": lambda data, **more: JointStream(ClassIncrementalStream(data, data, [[0, 1], [2, 3]], to_tensor, **more)),
    "classes in order": lambda data, **more: IterableClassIncrementalStream(
        data.to_iterable_dataset(1), data, [[0, 1], [2, 3]], to_tensor, **more
    ),
    "domains in order": lambda data, **more: IterableDomainIncrementalStream(
        data.to_iterable_dataset(3), data.to_iterable_dataset(), range(4), to_tensor, domains=["photo", "sketch"], **more
    ),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_batches_follow_from_seed_task_and_epoch_alone(scenario: str) -> None:
    """Not from global generators, loader processes, the batch size or the step at which an epoch continues."""

    def build() -> Stream:
        return SCENARIOS[scenario](birds([0, 1, 2, 3] * 6, domains=[0] * 12 + [1] * 12), augmentation=CropAndFlip())

    stream, epoch = build(), 0 if scenario == "gaussian" else 2
    task = len(stream) - 1
    whole = list(train_batches(stream, task, epoch=epoch))
    images = images_by_id(whole)
    assert len(images) >= 12
    torch.manual_seed(123)
    np.random.seed(123)
    state = torch.get_rng_state()
    stream = build()
    list(train_batches(stream, 0))
    for start, num_workers in ((0, 0), (1, 0), (len(whole), 0), (0, 2), (1, 1)):  # more loader processes than shards, too
        rest = list(train_batches(stream, task, epoch=epoch, start=start, num_workers=num_workers))
        assert sample_ids(rest) == sample_ids(whole[start:])
        assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(rest, whole[start:], strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    same = images_by_id(train_batches(stream, task, 5, epoch=epoch))
    assert same.keys() == images.keys()
    assert all(torch.equal(same[i], images[i]) for i in images)
    for other in [{"seed": 1, "epoch": epoch}, *([{"epoch": epoch + 1}] if scenario != "gaussian" else [])]:
        batches = list(train_batches(stream, task, **other))
        moved = images_by_id(batches)
        assert moved.keys() == images.keys()
        assert sum(torch.equal(moved[i], images[i]) for i in images) < 2
        assert (sample_ids(batches) != sample_ids(whole)) == (scenario != "gaussian")


def test_tasks_of_equal_size_are_shuffled_differently() -> None:
    ranks = [np.argsort(list(images_by_id(train_batches(stream_of(), task)))).tolist() for task in (0, 1)]
    assert len(ranks[0]) == len(ranks[1])
    assert ranks[0] != ranks[1]


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
        assert batch.valid is None or batch.valid.all()

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


SETTINGS: dict[str, Any] = {"num_train_epochs": 3, "batch_size": 16, "learning_rate": 0.05}


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
        optimizer = torch.optim.Adam([weight, bias], lr=SETTINGS["learning_rate"])
        targets = torch.tensor([data.classes[task].index(int(c)) for c in labels])
        for _ in range(SETTINGS["num_train_epochs"]):
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
