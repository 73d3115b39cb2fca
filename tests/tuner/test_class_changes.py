"""Models forget, rename and merge classes between tasks; files saved afterwards hold nothing of a forgotten class."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.closed_form_models import answers, learn_task, learnt_model, new_model, state, task_images
from support.families import build
from support.methods import METHODS, WITH_CLASSIFIER
from support.small_runs import CLASSES
from torch.testing import assert_close

from cl_prompts import L2PConfig, NoPromptsConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.sharing.card import in_bytes
from cl_prompts.sharing.inspect import bytes_per_class, class_statistics, sizes_of_parts
from cl_prompts.storage.adapter_files import find_adapter
from cl_prompts.storage.adapter_state import AdapterState


# A ridge head without drift keeps no Gaussians to move its threshold by; see test_novelty_threshold.py.
NO_GAUSSIANS = pytest.mark.filterwarnings("ignore:.*no statistics of the classes' features")
pytestmark = [pytest.mark.by_turns(3, always=()), NO_GAUSSIANS]


NAMES = {4: "wren", 1: "rook", 0: "robin", 3: "crane", 2: "swift", 5: "egret"}


def rows_of(model: Any, class_id: int) -> list[bytes]:
    """The bytes of every row, in any tensor, that belongs to one class alone."""
    adapter = model.adapter
    index = model.classes.index(class_id)
    rows = []
    for name, tensor in adapter.state_dict().items():
        owner = adapter.get_submodule(name.rpartition(".")[0]) if "." in name else adapter
        last = name.rpartition(".")[2]
        kind = type(owner).__name__
        if last.startswith("_") or tensor.dim() < 2:
            continue
        if kind in ("IncrementalHead", "RunningGaussians") or last == "class_means":
            rows.append(tensor[index])
        elif kind == "ClassGaussians" and last in owner.by_row and len(tensor):
            rows += [tensor[row] for row, c in enumerate(owner.class_indices) if c == index]
        elif kind == "ClassPrototypes" and last == "sum":
            rows += [tensor[row] for row, (_, c) in enumerate(owner.rows) if c == index]
        elif last in ("solution", "sums") and tensor.shape[0]:
            rows += list(tensor[:, index])  # a column: its numbers one by one
    return [row.contiguous().numpy().tobytes() for row in rows if row.any()]


@pytest.mark.by_turns(9, always=("l2p",))
@pytest.mark.parametrize("method", [*METHODS, *WITH_CLASSIFIER])
def test_a_file_saved_afterwards_holds_nothing_of_a_forgotten_class(method: str, tmp_path: Path) -> None:
    model = new_model(method, save_statistics=True)
    for task in CLASSES:
        learn_task(model, task, train=model.trains_task(model.num_tasks), class_names={c: NAMES[c] for c in task})
    before, rows, prompts = answers(model), rows_of(model, 3), dict(model.adapter.pool.named_parameters())
    statistics = model.adapter.config.closed_form
    old = model.adapter
    model.forget_classes([3])
    assert model.classes == [4, 1, 0, 2, 5]
    assert model.num_tasks == 3
    assert model.config.id2label == {0: "wren", 1: "rook", 2: "robin", 3: "swift", 4: "egret"}
    assert all(torch.equal(p, prompts[name]) for name, p in model.adapter.pool.named_parameters())
    assert len(old.classes) == 6
    assert torch.equal(old.head.weight[:3], model.adapter.head.weight[:3])
    # Methods that infer the task by statistics, or choose the most confident task, may use other prompts now.
    if not statistics and method not in ("hide", "norga", "dualprompt prototype", "dualprompt one-stage"):
        others = before.argmax(1) != 3  # images of the forgotten class get the temperature of another one's tasks
        assert_close(answers(model)[others], before[others][:, [0, 1, 2, 4, 5]])
    model.save_pretrained(tmp_path)
    saved = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert rows
    assert not [row for row in rows if len(row) > 8 and row in saved]
    assert "crane" not in (tmp_path / "adapter_config.json").read_text() + (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["state"]["tasks"] == [[4, 1], [0], [2, 5]]
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path, is_trainable=True)
    assert torch.equal(answers(loaded), answers(model))
    for one in (model, loaded):  # it can be learned again, and others after it
        torch.manual_seed(8)
        learn_task(one, [3], train=one.trains_task(3))
    assert torch.equal(answers(loaded), answers(model))
    assert model.classes == [4, 1, 0, 2, 5, 3]


@pytest.mark.by_turns(5, always=())
@pytest.mark.parametrize("method", ["l2p", "hide", "norga", "dualprompt prototype", *WITH_CLASSIFIER])
def test_all_classes_of_a_task_are_forgotten(method: str, tmp_path: Path) -> None:
    for task in CLASSES:
        model = learnt_model(method, save_statistics=True)
        model.forget_classes(task)
        model.save_pretrained(tmp_path)
        assert "(forgotten)" in (tmp_path / "README.md").read_text()
        loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path)
        assert torch.equal(answers(loaded), answers(model))
        assert answers(model).shape[1] == 4
        assert answers(model).isfinite().all()
        check_temperatures(model.adapter.config.state, CLASSES.index(task))
        learn_task(model, task, train=model.trains_task(3))


def check_temperatures(state: AdapterState, forgotten: int) -> None:
    """The mean is that of the tasks that are left."""
    images, values = state.temperature_information, state.task_temperatures
    if images:  # the head of some methods was not consolidated
        assert (values[forgotten], images[forgotten]) == (1.0, 0)
        assert state.temperature == pytest.approx(np.exp(np.average(np.log(values), weights=images)))


@pytest.mark.by_turns(2, always=())
@pytest.mark.parametrize("config", [{"ensemble": 2}, {"trained_tasks": "first", "head": "discriminant"}], ids=str)
@pytest.mark.parametrize("forgotten", [0, 1])
def test_prompts_are_those_of_tasks_with_classes(forgotten: int, config: dict[str, Any]) -> None:
    model = learnt_model("dualprompt prototype", CLASSES[:2], **config)
    model.forget_classes(CLASSES[forgotten])
    assert answers(model).isfinite().all()
    if "ensemble" in config:
        output = model.eval()(pixel_values=task_images([4])["pixel_values"])
        assert output.prompt_ids.flatten().unique().tolist() == [1 - forgotten]


@pytest.mark.by_turns(4, always=())
@pytest.mark.parametrize(
    "config",
    [
        *({"head": "discriminant", "class_covariance": kind} for kind in ("low_rank", "full", "shared", "diagonal")),
        *({"head": "ridge", "projection_size": 40, "trained_tasks": tasks} for tasks in ("first", "all")),
        *({"alignment": kind} for kind in ("covariance", "diagonal", "centroids")),
        {"head": "linear"},
        {"task_inference": "prototype", "task_statistics": "covariance", "head": "discriminant"},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_the_card_says_what_a_class_costs(config: dict[str, Any], tmp_path: Path) -> None:
    """A class more makes the tensors as much larger."""
    model = new_model("dualprompt", save_statistics=True, **config)
    found = []
    for classes in ([4, 1, 0], [3]):
        learn_task(model, classes, train=False)
        model.save_pretrained(tmp_path)
        statistics = class_statistics(find_adapter(tmp_path).tensors)
        found.append((sizes_of_parts(statistics), bytes_per_class(statistics)))
        assert f"{in_bytes(found[-1][1])} for each class" in (tmp_path / "README.md").read_text()
    assert ("pool.prototypes" in found[0][0]) == ("task_inference" in config)
    held = [sum(part["bytes"] for part in parts.values()) for parts, _ in found]
    assert found[0][1] == found[1][1] == held[1] - held[0] > 0


def test_a_class_that_is_left_alone_is_not_refused() -> None:
    """Its novelty is 1 for every image, beyond the threshold of several classes."""
    for leave in (lambda m: m.forget_classes([4]), lambda m: m.merge_classes([4, 1], into=1)):
        model = learnt_model("none", CLASSES[:1], head="discriminant")
        assert model.novelty_threshold is not None
        leave(model)
        assert model.novelty_threshold is None
        learn_task(model, [0, 3], train=False)
        assert model.novelty_threshold is not None
    model.adapter.config.state.temperature_information = [12, 0]  # as after a second task of single images
    model.forget_classes([1])
    assert model.adapter.config.state.temperature is model.novelty_threshold is None


@pytest.mark.parametrize("method", WITH_CLASSIFIER)
def test_merged_classes_answer_as_one_and_files_keep_it(method: str, tmp_path: Path) -> None:
    model = learnt_model(method, save_statistics=True)
    model.merge_classes([4, 1], into=7)  # of one task
    model.merge_classes([0, 2], into=0)  # of two
    assert model.classes == [7, 0, 3, 5]
    assert model.adapter.config.state.tasks == [[7], [0, 3], [0, 5]]
    model.save_pretrained(tmp_path)
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path, is_trainable=True)
    assert torch.equal(answers(loaded), answers(model))
    assert answers(model).isfinite().all()
    assert model.adapter.head.to_targets(torch.tensor([7, 3, 4]))[0].tolist() == [0, 2, -100]
    learn_task(loaded, [1], train=loaded.trains_task(3))
    assert loaded.classes == [7, 0, 3, 5, 1]


def test_a_merged_discriminant_recognizes_both() -> None:
    model = learnt_model("hash discriminant")
    images = [task_images(task, 4, seed=5) for task in CLASSES]
    model.merge_classes([1, 3], into=3)
    merged = {1: 3}
    for batch in images:
        found = [model.classes[i] for i in answers(model, batch["pixel_values"]).argmax(1).tolist()]
        wanted = [merged.get(c, c) for c in batch["labels"].tolist()]
        assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= 7


def test_renaming_changes_names_alone(tmp_path: Path) -> None:
    model = learnt_model("hash discriminant", CLASSES[:2])
    before = state(model)
    model.rename_class(4, "wren")
    model.rename_class("wren", "Zaunkönig")
    model.rename_class(1, "rook")
    assert model.config.id2label == {0: "Zaunkönig", 1: "rook", 2: "0", 3: "3"}
    assert model.config.label2id["Zaunkönig"] == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())
    model.save_pretrained(tmp_path)
    assert "Zaunkönig" in (tmp_path / "README.md").read_text()
    loaded = PromptPoolModel.from_pretrained(build("vit"), tmp_path)
    assert loaded.config.id2label == model.config.id2label
    free = get_prompt_pool_model(build("vit"), L2PConfig(num_labels=3, top_k=2, class_mask="none"))
    free.rename_class(2, "lark")
    assert free.config.id2label[2] == "lark"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.forget_classes([9]), ValueError, r"class 9 is unknown; known are \[4, 1, 0, 3\]"),
        (lambda m: m.forget_classes(["owl"]), ValueError, "class 'owl' is unknown"),
        (lambda m: m.forget_classes([4, 4]), ValueError, "class 4 is given twice"),
        (lambda m: m.forget_classes(["wren", 4]), ValueError, "class 4 is given twice"),
        (lambda m: m.forget_classes([]), ValueError, "no class is given"),
        (lambda m: m.forget_classes(4), TypeError, r"takes a list of classes: write forget_classes\(\[4\]\)"),
        (lambda m: m.forget_classes("wren"), TypeError, "takes a list of classes"),
        (lambda m: m.forget_classes([4.0]), TypeError, "class 4.0 must be an id"),
        (lambda m: m.forget_classes([True]), TypeError, "class True must be an id"),
        (lambda m: m.forget_classes(m.classes), ValueError, "leaves no class: delete the adapter instead"),
        (lambda m: m.merge_classes([4], into=4), ValueError, "needs at least two known classes"),
        (lambda m: m.merge_classes([4, 9], into=4), ValueError, "class 9 is unknown"),
        (lambda m: m.merge_classes([4, 1], into="owl"), ValueError, "class 'owl' is unknown"),
        (lambda m: m.merge_classes([4, 1], into=-1), ValueError, "into=-1 is no class id"),
        (lambda m: m.merge_classes([4, 1], into=2.5), TypeError, "into=2.5 must be a class id"),
        (lambda m: m.rename_class(9, "owl"), ValueError, "class 9 is unknown"),
        (lambda m: m.rename_class(4, ""), ValueError, "needs a character"),
        (lambda m: m.rename_class(4, 5), TypeError, "new=5 must be a name"),
        (lambda m: m.rename_class(1, "wren"), ValueError, "class 4 has the name 'wren' already"),
        (lambda m: m.rename_class(1, "0"), ValueError, "class 0 has the name '0' already"),
    ],
)
def test_what_cannot_be_is_told_in_one_line_and_changes_nothing(call: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as told:
        call(TAUGHT)
    assert "\n" not in str(told.value)
    assert TAUGHT.classes == [4, 1, 0, 3]
    assert TAUGHT.config.id2label[0] == "wren"


TAUGHT = new_model("hash discriminant")
for one in CLASSES[:2]:
    learn_task(TAUGHT, one, class_names={4: "wren"} if 4 in one else {})


def test_an_open_task_a_trained_head_and_fixed_classes_are_refused() -> None:
    model = learnt_model("l2p", CLASSES[:2])
    with pytest.raises(ValueError, match='head="linear" is trained, and one row of it cannot answer for two classes'):
        model.merge_classes([4, 1], into=4)
    model.begin_task([2, 5])
    for call in (lambda: model.forget_classes([4]), lambda: model.forget_classes([2])):
        with pytest.raises(ValueError, match=r"a task is open: call end_task\(\) before forget_classes"):
            call()
    free = get_prompt_pool_model(build("vit"), NoPromptsConfig(num_labels=3, class_mask="none"))
    with pytest.raises(ValueError, match="num_labels=3 fixes the classes of this model: forget_classes needs tasks"):
        free.forget_classes([0])
