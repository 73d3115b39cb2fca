"""State dicts know the classes of their tasks; Accelerate saves and loads them, for every method and baseline."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_model, save_model
from support.families import build
from support.methods import METHODS, WITH_CLASSIFIER
from torch import Tensor

from cl_prompts import get_prompt_pool_model
from cl_prompts.baselines import BASELINES


pytestmark = pytest.mark.by_turns(5)


ALL = {**METHODS, **WITH_CLASSIFIER}
BASES: dict[str, Any] = {}


def model_of(method: str, *tasks: list[int], wrap: Any = get_prompt_pool_model, **config: Any) -> Any:
    """A model of a method, or a baseline, that has begun these tasks; all but the last are closed."""
    if "vit" not in BASES:
        BASES["vit"] = build("vit")
    base = copy.deepcopy(BASES["vit"])
    model = BASELINES[method](base) if method in BASELINES else wrap(base, ALL[method](**config))
    for number, classes in enumerate(tasks):
        if number:
            (model.adapter.tasks if method in ALL else model.tasks).end()
        model.begin_task(classes)
    return model


def different(model: Any) -> Any:
    """The model with other values in all trained tensors."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    wrong = [name for name in expected if not torch.equal(state[name], expected[name])]
    assert not wrong


@pytest.mark.parametrize("method", [*ALL, *BASELINES])
def test_classes_in_another_order_are_refused(method: str) -> None:
    """Shapes are equal, so that nothing else tells. After the error the adapter is as it was."""
    state = state_of(different(model_of(method, [2, 0, 3, 1])))
    other = model_of(method, [0, 1, 2, 3])
    before = state_of(other)
    message = r"the tasks \[\[2, 0, 3, 1\]\], this one has the tasks \[\[0, 1, 2, 3\]\]: logits follow the order"
    for strict in (True, False):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state, strict=strict)
    assert_equal(state_of(other), before)
    same = model_of(method, [2, 0, 3, 1])
    same.load_state_dict(state)
    assert_equal(state_of(same), state)


@pytest.mark.parametrize("wrap", [get_prompt_pool_model, get_peft_model])
@pytest.mark.parametrize(
    ("there", "here"),
    [
        ([[2, 0, 3, 1]], [[0, 1, 2, 3]]),
        ([[2, 0, 3, 1]], [[2, 0]]),
        ([[2, 0], [3, 1]], [[2, 0], [1, 3]]),
        ([[2], [0, 3, 1]], [[2, 0], [3, 1]]),
        ([[7]], []),
    ],
    ids=str,
)
def test_peft_loads_no_state_of_other_classes(there: list[list[int]], here: list[list[int]], wrap: Any) -> None:
    state = get_peft_model_state_dict(model_of("coda", *there, wrap=wrap))
    model = model_of("coda", *here, wrap=wrap)
    before = state_of(model)
    with pytest.raises(ValueError, match="logits follow the order of the classes"):
        set_peft_model_state_dict(model, state)
    assert_equal(state_of(model), before)


@pytest.mark.parametrize("here", [{"num_labels": 5}, {}], ids=str)
def test_a_number_of_labels_is_no_task(here: dict[str, int]) -> None:
    free = {"class_mask": "none"}
    state = model_of("l2p", num_labels=4, **free).state_dict()
    model = model_of("l2p", **here, **free) if here else model_of("l2p", [0, 1, 2, 3])
    with pytest.raises(ValueError, match="is of a model with num_labels=4, this one has"):
        model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("method", [*ALL, *BASELINES])
def test_accelerate_loads_what_it_saved(method: str, tmp_path: Path) -> None:
    """In the first task many tensors are still empty."""
    accelerator = Accelerator(cpu=True)
    saved = accelerator.prepare(different(model_of(method, [2, 0, 3, 1])))
    accelerator.save_state(str(tmp_path))
    expected = state_of(saved)
    different(saved)
    accelerator.load_state(str(tmp_path))
    assert_equal(state_of(saved), expected)


def test_accelerate_loads_no_other_classes(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model_of("coda", [2, 0, 3, 1]))
    accelerator.save_state(str(tmp_path))
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model_of("coda", [0, 1, 2, 3]))
    with pytest.raises(ValueError, match="logits follow the order of the classes"):
        accelerator.load_state(str(tmp_path))


@pytest.mark.parametrize("tasks", [[], [[2, 0]], [[2, 0], [1]]], ids=str)
def test_before_the_first_task_and_after_it(tasks: list[list[int]], tmp_path: Path) -> None:
    """By Accelerate, and by safetensors' own functions for models, which look at storages too."""
    model = different(model_of("layer_grouped", *tasks))
    accelerator = Accelerator(cpu=True)
    accelerator.save_model(model, str(tmp_path))
    save_model(model, str(tmp_path / "own.safetensors"))
    for file in ("model.safetensors", "own.safetensors"):
        loaded = model_of("layer_grouped", *tasks)
        load_model(loaded, tmp_path / file)
        assert_equal(state_of(loaded), state_of(model))


def test_a_module_keeps_its_own_empty_tensors() -> None:
    """`keep_vars` asks for them, as torch.export does."""
    adapter = model_of("coda", [1]).adapter
    assert adapter.state_dict(keep_vars=True)["pool.keys.earlier"] is adapter.pool.keys.earlier
