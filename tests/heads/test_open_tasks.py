"""A classifier made from features within an open task: what it needs before it, and what it can answer."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.closed_form_models import answers, in_batches, learn_task, learnt_model, state, task_images, train_steps
from support.families import build
from support.small_runs import CLASSES

from cl_prompts import PromptPoolModel
from cl_prompts.heads.gaussians import ClassGaussians


FOLLOWING = ("hash discriminant", "l2p analytic", "coda aligned")  # classifiers that compensate drift
followers = pytest.mark.parametrize("method", FOLLOWING)


def in_second_task(method: str, **config: Any) -> Any:
    """A model that has trained the second task and not seen it yet."""
    model = learnt_model(method, CLASSES[:1], **config)
    images = task_images(CLASSES[1])
    model.record_features([images])
    model.begin_task(CLASSES[1])
    train_steps(model, images)
    return model


def old_means(model: Any) -> torch.Tensor:
    """Means of the classes of the first task [classes, 1, D]."""
    (gaussians,) = [part for part in model.adapter.classifier.modules() if isinstance(part, ClassGaussians)]
    return gaussians.mean[: len(CLASSES[0])].clone()


@followers
def test_a_task_that_could_not_be_consolidated_is_not_begun(method: str) -> None:
    model = learnt_model(method, CLASSES[:1])
    before = state(model)
    with pytest.raises(ValueError, match=r"call model.record_features\(images\) before begin_task, or set drift_comp"):
        model.begin_task(CLASSES[1])
    assert model.classes == list(CLASSES[0])
    after = state(model)
    assert before.keys() == after.keys()
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    learn_task(model, CLASSES[1])
    kept = learnt_model(method, CLASSES[:1], drift_compensation="none")
    kept.begin_task(CLASSES[1])


@followers
def test_an_adapter_saved_within_a_task_ends_it_with_statistics_as_they_were(method: str, tmp_path: Path) -> None:
    model = in_second_task(method)
    model.save_pretrained(tmp_path)
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path, is_trainable=True)
    means = old_means(loaded)
    with pytest.warns(UserWarning, match="saved within a task, without the features of its images from before it"):
        loaded.eval().consolidate(in_batches(task_images(CLASSES[1]), 5))
    torch.testing.assert_close(old_means(loaded), means)
    loaded.end_task()
    assert answers(loaded).isfinite().all()
    learn_task(loaded, CLASSES[2])  # goes on as always
    model.eval().consolidate(in_batches(task_images(CLASSES[1]), 5))
    assert not torch.allclose(old_means(model), means, atol=1e-3), "where it was recorded, the statistics follow"


def test_tensors_of_an_open_task_loaded_into_one_keep_what_was_recorded(tmp_path: Path) -> None:
    model = in_second_task("hash discriminant")
    model.save_pretrained(tmp_path)
    again = learnt_model("hash discriminant", CLASSES[:1])
    again.record_features([task_images(CLASSES[1])])
    again.begin_task(CLASSES[1])
    again.load_adapter(tmp_path, "default", is_trainable=True)
    for one in (model, again):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one.eval().consolidate([task_images(CLASSES[1])])
        one.end_task()
    assert answers(model).equal(answers(again))


@pytest.mark.parametrize("method", ["hash discriminant", "l2p analytic"])
def test_labels_that_it_cannot_answer_yet_are_refused(method: str) -> None:
    model = in_second_task(method).eval()
    old, new = task_images(CLASSES[0]), task_images(CLASSES[1])
    with torch.no_grad():
        assert model(**old).loss.isfinite()
        assert model(pixel_values=new["pixel_values"]).logits[:, : len(CLASSES[0])].isfinite().all()
        both = {name: torch.cat([old[name], new[name]]) for name in ("pixel_values", "labels")}
        found = ", ".join(map(str, sorted(CLASSES[1])))
        for given in (new, both):
            with pytest.raises(ValueError, match=rf"labels \[{found}\] are of classes that the .* head answers"):
                model(**given)
        padded = new["labels"].clone().fill_(-100)
        assert model(pixel_values=new["pixel_values"], labels=padded).logits.shape[0] == len(padded)
        model.consolidate([new])
        assert model(**new).loss.isfinite()


def test_an_aligned_head_answers_within_a_task() -> None:
    model = in_second_task("coda aligned").eval()
    with torch.no_grad():
        assert model(**task_images(CLASSES[1])).loss.isfinite()


def test_of_classes_without_images_alone_no_answer_can_be_had() -> None:
    model = learnt_model("hash discriminant", CLASSES[:1])
    images = task_images(CLASSES[1][:1])
    model.record_features([images])
    model.begin_task(CLASSES[1])
    model.eval().consolidate([images])
    model.end_task()
    with pytest.raises(ValueError, match="none of the classes that would be left had images: keep one that had"):
        model.forget_classes([*CLASSES[0], CLASSES[1][0]])
    assert set(model.classes) == {*CLASSES[0], *CLASSES[1]}
    model.forget_classes(CLASSES[0])
    assert answers(model)[:, 0].isfinite().all()
