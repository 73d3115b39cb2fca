"""Classifiers made from features, in models: what is saved and loaded, what is refused."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.closed_form_models import (
    answers,
    learn_task,
    learnt_model,
    new_model,
    state,
    task_images,
)
from support.families import build
from support.methods import WITH_CLASSIFIER
from support.small_runs import CLASSES

from cl_prompts import L2PConfig, NoPromptsConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.heads import build_classifier


pytestmark = pytest.mark.by_turns(3)


every_classifier = pytest.mark.parametrize("method", WITH_CLASSIFIER)
WEIGHTS = "adapter_model.safetensors"


# ---- files -------------------------------------------------------------------------------------------------------------


def sizes(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {name.partition(".prompt_pool.")[2]: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


@every_classifier
@pytest.mark.parametrize("lean", [False, True])
def test_loaded_models_answer_bit_equal_and_statistics_go_on(method: str, lean: bool, tmp_path: Path) -> None:
    model = learnt_model(method, CLASSES[:2])
    model.save_pretrained(tmp_path)
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path, is_trainable=True, low_cpu_mem_usage=lean)
    assert torch.equal(answers(loaded), answers(model))
    for one in (model, loaded):
        torch.manual_seed(8)
        learn_task(one, CLASSES[2], train=one.trains_task(2))
    mine, theirs = state(model), state(loaded)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == ["adapter.classifier.counted"] * (
        method not in ("hash discriminant",) and int(theirs["adapter.classifier.counted"]) != 3
    )
    assert torch.equal(answers(loaded), answers(model))


@pytest.mark.by_turns(5, always=())
@pytest.mark.parametrize("method", ["none analytic", "l2p analytic", "coda aligned"])
@pytest.mark.parametrize("lean", [False, True])
def test_without_statistics_it_answers_and_learns_no_more(method: str, lean: bool, tmp_path: Path) -> None:
    model = learnt_model(method, save_statistics=False)
    model.save_pretrained(tmp_path)
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path, is_trainable=True, low_cpu_mem_usage=lean)
    assert torch.equal(answers(loaded), answers(model))
    what = "Gram matrix and class sums" if method == "none analytic" else "class means and covariances"
    before = state(loaded)
    with pytest.raises(ValueError, match=f"saved without the {what} .*save_statistics=True"):
        loaded.begin_task([7, 8])
    assert loaded.classes == model.classes
    assert not loaded.adapter.config.state.task_open
    after = state(loaded)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(answers(loaded), answers(model))
    learn_task(model, [0, 5], revisit=True, train=model.trains_task(3))  # the one that was saved goes on


def test_the_file_holds_what_answers(tmp_path: Path) -> None:
    """Projection and solution alone, and the classes; G and B on request."""
    plain, whole = (learnt_model("none analytic", save_statistics=save) for save in (False, True))
    plain.save_pretrained(tmp_path / "plain")
    whole.save_pretrained(tmp_path / "whole")
    found = sizes(tmp_path / "plain")
    assert found == {
        "tasks._extra_state": [6, 2],
        "head.weight": [6, 64],
        "head.bias": [6],
        "classifier.projection": [64, 40],
        "classifier.solution": [40, 6],
        "classifier.chosen_ridge": [],
        "classifier.fitted": [],
    }
    more = {"classifier.gram": [40, 40], "classifier.sums": [40, 6], "classifier.counted": []}
    assert sizes(tmp_path / "whole") == {**found, **more}
    bytes_of = {name: (tmp_path / name / WEIGHTS).stat().st_size for name in ("plain", "whole")}
    assert bytes_of["plain"] < 4 * (64 * 40 + 40 * 6 + 6 * 64 + 6) + 8 * 6 * 2 + 16 + 2000
    assert bytes_of["whole"] - bytes_of["plain"] == pytest.approx(8 * (40 * 40 + 40 * 6), abs=500)
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path / "plain")
    held = {name: b.numel() for name, b in loaded.adapter.classifier.named_buffers() if name in ("gram", "sums")}
    assert held == {"gram": 0, "sums": 0}


@every_classifier
@pytest.mark.parametrize("save", [True, False])
def test_a_task_can_be_saved_before_it_is_consolidated(method: str, save: bool, tmp_path: Path) -> None:
    """An adapter's file answers; a training state goes on, whatever of the statistics a file would hold."""
    model = learnt_model(method, CLASSES[:1], save_statistics=save)
    images = task_images(CLASSES[1])
    if model.needs_features_before:
        model.record_features([images])
    model.begin_task(CLASSES[1])
    model.save_pretrained(tmp_path)
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path)
    assert torch.equal(answers(loaded), answers(model))
    twin = new_model(method, save_statistics=save)
    twin.load_training_state_dict(model.training_state_dict())
    for one in (model, twin):
        one.eval().consolidate([images])
        one.end_task()
    assert torch.equal(answers(twin), answers(model))


@every_classifier
def test_configs_survive_their_file(method: str, tmp_path: Path) -> None:
    fields = {
        "ridge": 2.5,
        "classifier_seed": 7,
        "drift_compensation": "shift",
        "projection_size": 30,
        "own_covariance": 0.3,
    }
    model = learnt_model(method, **fields)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name: saved[name] for name in fields} == fields
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path)
    own, other = loaded.adapter.config.to_dict(), model.adapter.config.to_dict()
    assert {name for name in own if own[name] != other[name]} <= {"inference_mode", "auto_mapping"}  # PEFT's business
    assert torch.equal(answers(loaded), answers(model))


@pytest.mark.parametrize("damage", ["bit", "nan", "shape", "missing", "foreign"])
def test_a_damaged_classifier_is_not_loaded(damage: str, tmp_path: Path) -> None:
    learnt_model("none analytic", save_statistics=False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(name for name in tensors if name.endswith("classifier.solution"))
    if damage == "bit":
        tensors[name][3, 2] += 1e-3
    elif damage == "nan":
        tensors[name][3, 2] = float("nan")
    elif damage == "shape":
        tensors[name] = tensors[name][:, :5].contiguous()
    elif damage == "missing":
        del tensors[name]
    else:
        tensors[name.replace("solution", "gram")] = torch.zeros(40, 40)
    save_file(tensors, tmp_path / WEIGHTS)
    base = build("vit")
    match = {
        "bit": "checksum",
        "nan": "NaN or Inf",
        "shape": "config implies",
        "missing": "missing",
        "foreign": "unexpected",
    }
    with pytest.raises(ValueError, match=match[damage]):
        PromptPoolModel.from_pretrained(base, tmp_path, verify=damage != "nan")


def test_a_huge_projection_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    """The Gram matrix of 10 million random features has 800 TB, the projection 1.3 GB; 40,000 ones take 38 GB to learn."""
    learnt_model("none analytic", save_statistics=False).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for drift in ("none", "affine"):
        config = L2PConfig(head="analytic", projection_size=10_000_000, drift_compensation=drift)
        with pytest.raises(ValueError, match="more than max_adapter_bytes"):
            get_prompt_pool_model(build("vit"), config)
    with pytest.raises(ValueError, match="more than max_adapter_bytes"):
        get_prompt_pool_model(build("vit"), NoPromptsConfig(head="analytic", projection_size=40_000))
    file.write_text(file.read_text().replace('"projection_size": 40', '"projection_size": 100000000'))
    with pytest.raises(ValueError, match="more than max_adapter_bytes"):
        PromptPoolModel.from_pretrained(build("vit"), tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


# ---- bad input ---------------------------------------------------------------------------------------------------------


def test_images_before_and_after_must_be_the_same() -> None:
    images = task_images(CLASSES[1])
    fewer = {name: value[:-1] for name, value in images.items()}
    relabelled = {**images, "labels": images["labels"].flip(0)}
    for recorded in (fewer, relabelled):
        model = learnt_model("l2p analytic", CLASSES[:1])
        model.record_features([recorded])
        model.begin_task(CLASSES[1])
        with pytest.raises(ValueError, match="the same images before and after the task: "):
            model.eval().consolidate([images])
        assert int(model.adapter.classifier.fitted) == 1
        with pytest.raises(ValueError, match="has not seen this task"):
            model.end_task()


def test_calls_at_the_wrong_time() -> None:
    model = new_model("hash discriminant")
    images = task_images(CLASSES[0])
    with pytest.raises(ValueError, match="no class is known yet"):
        model.eval().consolidate([images])
    model.begin_task(CLASSES[0])
    with pytest.raises(ValueError, match=r"has seen no task yet: call model.consolidate\(images\)"):
        answers(model)
    with pytest.raises(ValueError, match="before begin_task, a task is open"):
        model.record_features([images])
    with pytest.raises(ValueError, match="has not seen this task"):
        model.end_task()
    model.consolidate([images])
    with pytest.raises(ValueError, match="all 1 tasks begun are fitted already"):
        model.consolidate([images])
    model.end_task()


@every_classifier
def test_images_of_other_classes_are_refused(method: str) -> None:
    model = learnt_model(method, CLASSES[:1])
    images = task_images(CLASSES[1])
    if model.needs_features_before:
        model.record_features([images])
    model.begin_task(CLASSES[1])
    for stranger in (CLASSES[0][0], 5):  # of an earlier task, of none
        labels = images["labels"].clone()
        labels[0] = stranger
        if model.needs_features_before:
            model.adapter.recorded.labels = labels
        with pytest.raises(ValueError, match=rf"labels \[{stranger}\] do not belong to the current task"):
            model.eval().consolidate([{**images, "labels": labels}])


@pytest.mark.parametrize(
    "images", [[], [{"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.tensor([-100, -100])}]]
)
def test_no_images_are_refused(images: list[dict[str, Any]]) -> None:
    model = new_model("none analytic")
    model.begin_task([0, 1])
    with pytest.raises(ValueError, match="there are no images to look at"):
        model.eval().consolidate(images)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": "analytic", "alignment": "covariance"}, "is fitted to all classes and needs no alignment"),
        ({"head": "analytic", "num_labels": 5, "class_mask": "none"}, "num_labels=5: without tasks"),
        ({"alignment": "covariance", "num_labels": 5, "class_mask": "none"}, "num_labels=5: without tasks"),
        ({"head": "ranpac"}, "head='ranpac': choose one of"),
        ({"alignment": "full"}, "alignment='full'"),
        ({"trained_tasks": "one"}, "trained_tasks='one'"),
        ({"trained_tasks": "first", "modules_to_save": ["layernorm"]}, "modules_to_save would be trained on"),
        ({"drift_compensation": "linear"}, "drift_compensation='linear'"),
        ({"projection_size": -1}, "projection_size=-1"),
        ({"projection_size": 10.0}, "projection_size=10.0"),
        ({"ridge": 0.0}, "ridge=0 "),
        ({"ridge": float("inf")}, "ridge=inf"),
        ({"class_covariance": "centroids"}, "class_covariance='centroids'"),
        ({"own_covariance": 1.5}, "own_covariance=1.5"),
        ({"spherical_covariance": -0.1}, "spherical_covariance=-0.1"),
        (
            {"head": "discriminant", "normalize_features": True, "spherical_covariance": 0.0},
            "spherical_covariance=0: normalized features have no variance along one direction",
        ),
        ({"classifier_seed": 2**31}, "classifier_seed=2147483648"),
        ({"classifier_seed": -1}, "classifier_seed=-1"),
        ({"save_statistics": 1}, "save_statistics=1"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        L2PConfig(**fields)


@pytest.mark.parametrize(
    ("method", "drift", "mend"),
    [
        ("hash discriminant", "affine", 'class_covariance="shared", or "low_rank" with a small covariance_rank'),
        ("coda aligned", "affine", 'class_covariance="low_rank" with a small covariance_rank'),
        ("l2p analytic", "affine", "a smaller projection_size, or class_covariance"),
        ("l2p analytic", "none", "a smaller projection_size, or raise that limit"),
    ],
)
def test_statistics_of_further_classes_count_in_the_limit(method: str, drift: str, mend: str) -> None:
    """`begin_task` refuses before it allocates, and nothing has changed; the statistics that are not saved count, too."""
    fields = {"class_covariance": "full", "save_statistics": False, "drift_compensation": drift}
    model = learnt_model(method, CLASSES[:1], **fields)
    before = state(model)
    model.adapter.config.max_adapter_bytes = 200_000
    refused = rf"with 1000 more classes of [\d,]+ bytes of statistics .* max_adapter_bytes=200,000: choose {mend}"
    with pytest.raises(ValueError, match=refused):
        model.begin_task(range(100, 1100))
    assert model.classes == list(CLASSES[0])
    assert state(model).keys() == before.keys()


def test_the_default_statistics_of_a_class_are_light() -> None:
    """100 classes at width 768 in 12 MB, 1,000 in 60 MB, on the meta device."""
    for classes, limit in ((100, 12e6), (1000, 60e6)):
        with torch.device("meta"):
            classifier = build_classifier(NoPromptsConfig(head="discriminant"), 768)
            assert classifier is not None
            classifier.begin_task(range(classes))
        size = sum(t.numel() * t.element_size() for t in classifier.state_dict().values())
        assert size + 4 * classes * 769 < limit
