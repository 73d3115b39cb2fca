"""Classifiers made from features over two gloo processes, and beside a learner in the trainer, killed and resumed."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.closed_form_models import in_batches, new_model, task_images
from support.matrices import assert_same_matrix
from support.processes import become, free_port, in_two_processes
from support.small_runs import Stop, StopAt, small_model, small_stream, small_trainer, tensors
from torch import Tensor
from torch.testing import assert_close

from cl_prompts.continual import ContinualArguments, ContinualTrainer
from cl_prompts.continual.checkpointing.checkpoint import split_tensors
from cl_prompts.continual.extra_classifiers import ExtraClassifiers
from cl_prompts.heads import AlignedClassifier, DiscriminantClassifier, FeatureClassifier, RidgeClassifier
from cl_prompts.learner.features import record


# Un-prompted features are the same on both sides, so that what is made of them is, too.
RUNS: dict[str, dict[str, Any]] = {
    "none analytic": {"method": "none analytic", "batch_size": 6},
    "none discriminant": {"method": "none", "config": {"head": "discriminant"}},
    "l2p analytic, first task": {"method": "l2p analytic", "config": {"trained_tasks": "first"}},
    "hash with others": {"method": "hash", "batch_size": 6},
}


def others() -> dict[str, FeatureClassifier]:
    return {
        "exact": RidgeClassifier(32, projection_size=30, drift="none"),
        "ridge": RidgeClassifier(32, projection_size=30),
        "discriminant": DiscriminantClassifier(32),
        "aligned": AlignedClassifier(32, epochs=2),
    }


def result(run: str) -> dict[str, Any]:
    settings = {**RUNS[run], "tasks": 2, "learning_rate": 1e-3, "num_train_epochs": 1}
    extra = others() if "others" in run else None
    trainer = small_trainer(settings.pop("method"), classifiers=extra, **settings)
    trainer.train()
    matrices = [trainer.matrix.to_dict(), {name: m.to_dict() for name, m in trainer.extra_classifiers.matrices.items()}]
    return {
        "tensors": tensors(trainer),
        "extra": split_tensors(trainer.extra_classifiers.state_dict())[0],
        "matrices": matrices,
    }


def records() -> dict[str, Tensor]:
    """Five images over one process or two: each has its own, one of both, and padding."""
    model, images = new_model("hash"), task_images([4, 1], 3)
    model.begin_task([4, 1])
    batches = in_batches(images, 1)
    if torch.distributed.is_initialized():
        own = [[0, 1, 5], [3, 2, 1]][torch.distributed.get_rank()]
        batches = [batches[i] for i in own]
        if torch.distributed.get_rank() == 1:
            batches[2] = {**batches[2], "labels": torch.tensor([-100])}
    else:
        batches = [batches[i] for i in (0, 1, 2, 3, 5)]
    return vars(record(model.eval().features_of, batches))


def one_of_two(rank: int, port: int, folder: str) -> None:
    become(rank, port)
    found: dict[str, Any] = {run: result(run) for run in RUNS}
    found["records"] = records()
    try:
        record(lambda batch: torch.zeros(1, 2), [{"pixel_values": torch.zeros(1, 3, 32, 32), "labels": torch.tensor([0])}])
    except ValueError as error:
        found["error"] = str(error)
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    in_two_processes(one_of_two, free_port(), str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Counts exactly; the rest as exactly as float32 sums in another order let it be."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value.is_floating_point():
            assert_close(found[name], value, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
        else:
            assert torch.equal(found[name], value), name


@pytest.mark.slow
@pytest.mark.xdist_group("closed-form-processes")
@pytest.mark.parametrize("run", RUNS)
def test_two_processes_equal_one(run: str, two_processes: list[dict[str, Any]]) -> None:
    one, two = result(run), [found[run] for found in two_processes]
    for found in two:
        (matrix, extra), (one_matrix, one_extra) = found["matrices"], one["matrices"]
        assert_same_matrix(matrix, one_matrix)
        assert extra.keys() == one_extra.keys()
        for name, by_classifier in extra.items():
            assert_same_matrix(by_classifier, one_extra[name])
        assert_same(found["tensors"], one["tensors"])
        assert_same(found["extra"], one["extra"])
    for part in ("tensors", "extra"):
        for name, value in two[0][part].items():
            if not name.startswith("recorded"):
                assert torch.equal(value, two[1][part][name]), f"{name} differs between the processes"


@pytest.mark.slow
@pytest.mark.xdist_group("closed-form-processes")
def test_every_image_is_recorded_once(two_processes: list[dict[str, Any]]) -> None:
    one = records()
    assert one["ids"].tolist() == [0, 1, 2, 3, 5]
    for found in two_processes:
        assert torch.equal(found["records"]["ids"], one["ids"])
        assert torch.equal(found["records"]["labels"], one["labels"])
        assert_close(found["records"]["features"], one["features"], atol=1e-5, rtol=0)
        assert "pass sample_ids, a number for each" in found["error"]


# ---- beside a learner --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_classifiers_beside_a_learner_resume(tmp_path: Path) -> None:
    """Killed in the second task, after the features before it were recorded."""
    settings: dict[str, Any] = {"tasks": 2, "num_train_epochs": 1, "classifiers": others()}
    whole = small_trainer("hash", **settings)
    whole.train()
    with pytest.raises(Stop):
        small_trainer("hash", tmp_path, **{**settings, "classifiers": others()}, callbacks=[StopAt(5)]).train()
    resumed = small_trainer("hash", tmp_path, **{**settings, "classifiers": others()})
    resumed.train(resume=True)
    assert resumed.extra_classifiers.matrices == whole.extra_classifiers.matrices
    mine, theirs = (split_tensors(t.extra_classifiers.state_dict())[0] for t in (resumed, whole))
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hash", "none analytic", "hash discriminant"])
def test_forward_transfer_with_classifiers_that_know_nothing_yet(method: str) -> None:
    """The same classes in every task: the trainer measures before training, when they have no answer."""
    stream = small_stream(2)
    stream.tasks = [replace(stream.tasks[0], number=n, classes=[4, 1], revisit=n > 0) for n in range(len(stream))]
    args = ContinualArguments(num_train_epochs=1, batch_size=4, forward_transfer=True)
    extra = {"aligned": AlignedClassifier(32, epochs=1)} if method == "hash" else {}
    trainer = ContinualTrainer(small_model(method), stream, args, classifiers=extra)
    trainer.train()
    assert set(trainer.matrix.before) == {1}
    assert set(trainer.matrix.baseline) == ({1} if method == "hash" else set())


def test_a_class_without_images_has_a_column_beside_the_learner() -> None:
    model = new_model("none")
    images = task_images([4, 1])
    extra = ExtraClassifiers(model, {"ridge": RidgeClassifier(32, projection_size=20, drift="none")})
    model.begin_task([4, 1, 3])
    extra.fit([images])
    assert extra.classifiers["ridge"](torch.randn(2, 32)).shape == (2, 3)


def test_other_images_beside_a_learner_are_refused() -> None:
    model = new_model("hash")
    extra = ExtraClassifiers(model, {"discriminant": DiscriminantClassifier(32)})
    model.begin_task([4, 1])
    extra.fit([task_images([4, 1])])
    model.end_task()
    extra.record([task_images([0, 3])])
    model.begin_task([0, 3])
    with pytest.raises(ValueError, match="the same images before and after the task"):
        extra.fit([task_images([0, 3], per_class=5)])


def test_classes_that_a_learner_forgets_are_told_to_classifiers_beside_it() -> None:
    """Their columns are those of the learner: class 1 would get the rows of class 4, without an error."""
    model = new_model("none")
    extra = ExtraClassifiers(model, {"discriminant": DiscriminantClassifier(32, drift="none")})
    model.begin_task([4, 1])
    extra.fit([task_images([4, 1])])
    model.end_task()
    kept = ExtraClassifiers(model, {"discriminant": DiscriminantClassifier(32, drift="none")})
    kept.load_state_dict(extra.state_dict())
    model.forget_classes([4])
    model.begin_task([0])
    for one in (extra, kept):
        for call in (one.record, one.fit):
            with pytest.raises(ValueError, match=r"'discriminant'\] know classes \[4, 1\], the learner \[1, 0\]"):
                call([task_images([0])])
