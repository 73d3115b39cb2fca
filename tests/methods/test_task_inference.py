"""Whose task is this image: class statistics against independent oracles, and the methods that use them."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from support.families import build
from support.hide_models import TASKS, answer, images_of, labels_of, learn
from support.tensors import draw
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing import assert_close

from cl_prompts import (
    DualPromptConfig,
    HashPromptConfig,
    HiDePromptConfig,
    NoRGaConfig,
    PromptPoolModel,
    get_prompt_pool_model,
)
from cl_prompts.methods.shared.prototypes import ClassPrototypes, oas_shrinkage


COLUMNS = ([2, 0], [1, 4, 3], [5])  # head columns of three tasks' classes, of different sizes


def features_of(images: int = 90, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of six classes, correlated, and their classes; every class has some."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.cat([torch.arange(6), torch.randint(6, (images - 6,), generator=generator)])
    means = 0.7 * torch.randn(6, width, generator=generator)
    mixing = torch.randn(width, width, generator=generator)
    return means[classes] + torch.randn(images, width, generator=generator) @ mixing + 3, classes


def statistics_of(
    features: Tensor, classes: Tensor, order: tuple[int, ...] = (0, 1, 2), batch: int = 7, **settings: Any
) -> ClassPrototypes:
    found = ClassPrototypes(features.shape[1], **settings)
    for number, task in enumerate(order):
        found.begin_task(COLUMNS[task], number)
        rows = torch.isin(classes, torch.tensor(COLUMNS[task])).nonzero()[:, 0]
        for part in rows.split(batch):
            found.add(features[part], classes[part], torch.ones(len(part), dtype=torch.bool))
    return found


def by_class(found: ClassPrototypes, query: Tensor) -> Tensor:
    """Class scores in the order of the columns."""
    return found.class_scores(query)[:, torch.tensor([column for _, column in found.rows]).argsort()]


# ---- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shrinkage", [0.05, 0.6, 1.0])
def test_scores_are_those_of_a_linear_discriminant(shrinkage: float) -> None:
    """scikit-learn's, whose covariance is divided by n where ours is divided by n - classes, with equal priors."""
    features, classes = features_of()
    query = features_of(40, seed=1)[0]
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    oracle.fit(features.double().numpy(), classes.numpy())
    wanted = oracle.decision_function(query.double().numpy()) - np.log(oracle.priors_)
    wanted *= (90 - 6) / 90
    found = statistics_of(features, classes, statistics="covariance", shrinkage=shrinkage)
    assert_close(by_class(found, query.double()), torch.from_numpy(wanted), atol=1e-9, rtol=1e-9)
    task_of_class = torch.tensor([0, 1, 0, 1, 1, 2])
    tasks = task_of_class[torch.from_numpy(wanted).argmax(1)]
    assert len(tasks.unique()) == 3
    assert torch.equal(found.nearest_task(query), tasks)
    best = torch.stack([torch.from_numpy(wanted[:, columns]).amax(1) for columns in COLUMNS], 1)
    assert_close(found.task_scores(query.double()), best, atol=1e-9, rtol=1e-9)
    euclidean = torch.stack([features[classes == c].mean(0) for c in range(6)])
    agrees = (torch.cdist(query, euclidean).argmin(1) == by_class(found, query).argmax(1)).all()
    assert agrees == (shrinkage == 1.0), "only full shrinkage compares Euclidean distances"


def test_default_shrinkage_is_the_published_one() -> None:
    """Eq. 23 from eigenvalues; scikit-learn's differs by terms of order 1 / width."""
    features, classes = features_of(120, width=40, seed=2)
    centred = torch.cat([features[classes == c] - features[classes == c].mean(0) for c in range(6)]).double()
    freedom = 120 - 6
    covariance = centred.T @ centred / freedom
    eigenvalues = np.linalg.eigvalsh(covariance.numpy())
    square, trace2 = (eigenvalues**2).sum(), eigenvalues.sum() ** 2
    wanted = ((1 - 2 / 40) * square + trace2) / ((freedom + 1 - 2 / 40) * (square - trace2 / 40))
    assert 0.05 < wanted < 0.9
    found = statistics_of(features, classes, statistics="covariance")
    assert oas_shrinkage(covariance, torch.tensor(float(freedom))).item() == pytest.approx(wanted)
    assert_close(
        found.covariance(),
        (1 - wanted) * covariance + wanted * covariance.trace() / 40 * torch.eye(40),
        atol=1e-5,
        rtol=1e-5,
    )
    vectors = torch.randn(114, 40, generator=torch.Generator().manual_seed(5)).double() * torch.arange(1, 41)
    number = oas_shrinkage(vectors.T @ vectors / 114, torch.tensor(114.0)).item()
    assert number == pytest.approx(oas(vectors.numpy(), assume_centered=True)[1], rel=0.05)


@pytest.mark.parametrize("statistics", ["mean", "covariance"])
def test_neither_order_nor_batches_matter(statistics: str) -> None:
    """Exact sums: for every order of the tasks and other batches, the same scores of each class."""
    features, classes = features_of()
    wanted = by_class(statistics_of(features, classes, statistics=statistics), features)
    for order, batch in zip(itertools.permutations(range(3)), (1, 2, 5, 13, 50, 90), strict=True):
        found = statistics_of(features, classes, order, batch, statistics=statistics)
        assert_close(by_class(found, features), wanted, atol=1e-5, rtol=1e-6)
        if statistics == "covariance":
            assert_close(found.products, features.double().T @ features.double(), atol=1e-9, rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 5), st.booleans()), min_size=1, max_size=12))
def test_only_counted_images_of_the_newest_task_enter(images: list[tuple[int, bool]]) -> None:
    """Padding, images that counted before and images of older tasks' classes (rehearsal) leave no trace."""
    found = ClassPrototypes(3, "covariance")
    found.begin_task([0, 2], 0)
    found.begin_task([1, 3, 2], 1)
    features, classes = draw(len(images), 3, seed=3), torch.tensor([c for c, _ in images])
    counted = torch.tensor([flag for _, flag in images])
    features[~counted] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    found.add(features, torch.where(classes < 0, -100, classes), counted)
    taken = [row for row, (c, flag) in enumerate(images) if flag and c in (1, 2, 3)]
    assert found.count.tolist() == [0, 0] + [sum(classes[row] == c for row in taken) for c in (1, 3, 2)]
    for row, column in enumerate([1, 3, 2], start=2):
        own = [features[i].double() for i in taken if classes[i] == column]
        assert_close(found.sum[row], sum(own, torch.zeros(3).double()))
    assert_close(found.products, sum((torch.outer(f, f) for f in features[taken].double()), torch.zeros(3, 3).double()))


@pytest.mark.parametrize("statistics", ["mean", "covariance"])
def test_classes_that_come_back_with_the_same_images_are_of_one_task_in_every_batch(statistics: str) -> None:
    """Their scores are equal in all tasks: the lowest number is chosen, whatever the batch rounds."""
    found, query = ClassPrototypes(32, statistics), draw(64, 32, seed=1) + 1
    features, classes = draw(12, 32) + 1, torch.tensor([0, 1, 2] * 4)
    for number, batch in enumerate((12, 5, 1, 7, 3)):  # sums in another order
        found.begin_task(range(3), number)
        for rows in torch.arange(12).roll(number).split(batch):
            found.add(features[rows], classes[rows], torch.ones(len(rows), dtype=torch.bool))
        for size in (1, 3, 64):
            assert torch.cat([found.nearest_task(part) for part in query.split(size)]).tolist() == [0] * 64


def test_few_images() -> None:
    """No image: no score. One image a class leaves no covariance, and distances are Euclidean; then it is singular."""
    found = ClassPrototypes(20, "covariance", 1e-30)
    found.begin_task([0, 1, 2], 0)
    query, images = draw(9, 20, seed=1), draw(4, 20) + 100
    assert found.class_scores(query).unique().tolist() == [-torch.inf]
    assert found.nearest_task(query).tolist() == [0] * 9
    real = torch.ones(3, dtype=torch.bool)
    found.add(images[:2], torch.tensor([0, 1]), real[:2])
    scores = found.class_scores(query + 100)
    assert torch.equal(scores[:, :2].argmax(1), torch.cdist(query + 100, images[:2]).argmin(1))
    assert scores[:, 2].unique().tolist() == [-torch.inf]
    found.add(images[2:3], torch.tensor([0]), real[:1])
    with pytest.raises(ValueError, match="covariance_shrinkage=1e-30: the classes' shared covariance cannot be inverted"):
        found.class_scores(query)
    found.shrinkage = None
    assert found.class_scores(query)[:, :2].isfinite().all()


def test_sums_on_devices_without_float64() -> None:
    """A move there casts before it moves; a move back, or a cast of the model, leaves float64."""
    found = statistics_of(*features_of(), statistics="covariance")
    elsewhere = FakeTensorMode()

    def to_mps(tensor: Tensor) -> Tensor:
        assert tensor.dtype != torch.float64
        return FakeTensor(elsewhere, tensor.to("meta"), torch.device("mps"))

    there = copy.deepcopy(found)._apply(to_mps)
    assert {name: (b.dtype, b.device.type) for name, b in there.named_buffers()} == {
        "sum": (torch.float32, "mps"),
        "count": (torch.int64, "mps"),
        "products": (torch.float32, "mps"),
    }
    back = there._apply(lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))
    assert {name: b.dtype for name, b in back.named_buffers()} == {name: b.dtype for name, b in found.named_buffers()}
    assert found.float().sum.dtype == torch.float64


# ---- methods -------------------------------------------------------------------------------------------------------


METHODS: dict[str, Any] = {
    "hide": lambda **more: HiDePromptConfig(layers=[0, 2], task_init="fresh", **more),
    "norga": lambda **more: NoRGaConfig(layers=[0, 2], task_init="fresh", **more),
    "dualprompt": lambda **more: DualPromptConfig(
        **{"g_layers": [0], "e_layers": [1, 2], "task_init": "fresh", "task_inference": "prototype", **more}
    ),
    "dualprompt keys_per_layer": lambda **more: METHODS["dualprompt"](keys_per_layer=True, **more),
    "hash": lambda **more: HashPromptConfig(
        pool_size=6,
        top_k=2,
        layers=[0, 2],
        hgm="none",
        hdr="none",
        router_init="normal",
        router_inference="prototype",
        **more,
    ),
}


def new_model(method: str, **fields: Any) -> PromptPoolModel:
    base = build("vit")
    torch.manual_seed(0)
    return get_prompt_pool_model(base, METHODS[method](**fields))


def of_task(model: PromptPoolModel, task: int) -> PromptPoolModel:
    """A copy that answers every image as one of this task."""
    model = copy.deepcopy(model)
    pool = model.adapter.pool
    with torch.no_grad():
        if "router" in dict(pool.named_parameters()):
            pool.router.copy_([*pool.old_routers, pool.router][task])
            pool.config.router_inference = "last"
        else:
            prompts = pool.e_prompts if hasattr(pool, "e_prompts") else pool.prompts
            chosen = [*prompts.earlier, prompts.current][task].clone()
            prompts.earlier[:] = chosen
            prompts.current.copy_(chosen)
    return model


def oracle(model: PromptPoolModel, images: Tensor, statistics: str) -> Tensor:
    """Tasks by score, best first [images, 3], from the features of the images that `learn` shows."""
    features = torch.cat([model.base_model.extract_features(images_of(task)) for task in range(3)]).double().numpy()
    classes = torch.cat([labels_of(task) for task in range(3)]).numpy()
    query = model.base_model.extract_features(images).double().numpy()
    if statistics == "covariance":  # balanced classes: priors are alike
        discriminant = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3).fit(features, classes)
        scores, order = discriminant.decision_function(query), discriminant.classes_.tolist()
    else:
        order = sorted(set(classes.tolist()))
        means = np.stack([features[classes == c].mean(0) for c in order])
        scores = query @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    best = np.stack([scores[:, [order.index(c) for c in task]].max(1) for task in TASKS], 1)
    return torch.from_numpy((-best).argsort(1))


@pytest.mark.by_turns(3)
@pytest.mark.parametrize("statistics", ["mean", "covariance"])
@pytest.mark.parametrize("method", METHODS)
def test_an_image_is_answered_as_one_of_its_inferred_task(method: str, statistics: str) -> None:
    fields = {"covariance_shrinkage": 0.3} if statistics == "covariance" else {}
    model = learn(new_model(method, task_statistics=statistics, **fields), range(3)).eval()
    images = torch.cat([images_of(task, 10)[6:] for task in range(3)])
    tasks = oracle(model, images, statistics)
    assert set(tasks[:, 0].tolist()) == {0, 1, 2}, "the images must disagree on the task"
    found = answer(model, images)
    each = torch.stack([answer(of_task(model, task), images).logits for task in range(3)])
    assert (each[0] - each[1]).abs().amax(1).min() > 1e-3, "another task's prompt must give another answer"
    assert_close(found.logits, each[tasks[:, 0], range(12)], atol=1e-5, rtol=0)
    assert torch.equal(model.base_model.chosen_tasks(found), tasks[:, 0])
    if method != "hash":
        assert torch.equal(found.prompt_ids, tasks[:, :1])
        assert torch.equal(found.scores.argsort(1, descending=True), tasks)
        model.adapter.config.ensemble = 2
        found = answer(model, images)
        assert torch.equal(found.prompt_ids, tasks[:, :2])
        both = [each[tasks[:, i], range(12)].softmax(1) for i in range(2)]
        assert_close(found.logits.softmax(1), (both[0] + both[1]) / 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("keys_per_layer", [False, True])
def test_dualprompt_trains_the_same(keys_per_layer: bool) -> None:
    """Only the test differs: after three tasks every parameter, keys included, is bit-equal."""
    by = {
        rule: learn(new_model("dualprompt", task_inference=rule, keys_per_layer=keys_per_layer), range(3))
        for rule in ("keys", "prototype")
    }
    ours, wanted = (dict(model.adapter.named_parameters()) for model in by.values())
    assert ours.keys() == wanted.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, wanted[name]), name
    extra = set(by["prototype"].adapter.state_dict()) - set(by["keys"].adapter.state_dict())
    assert extra == {"pool.prototypes.sum", "pool.prototypes.count"}
    pool = by["prototype"].adapter.pool
    assert pool.prototypes.count.tolist() == [3] * 6, "three steps a task, but an image counts once"
    assert pool.prototypes.rows == [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (2, 5)]


def test_a_pool_that_grows_keeps_its_statistics() -> None:
    model = learn(new_model("hash", task_statistics="covariance"), range(2))
    before = {name: b.clone() for name, b in model.adapter.pool.prototypes.named_buffers()}
    model.grow_pool(9)
    after = dict(model.adapter.pool.prototypes.named_buffers())
    assert before.keys() == after.keys() == {"sum", "count", "products"}
    assert all(torch.equal(after[name], before[name]) for name in before)
