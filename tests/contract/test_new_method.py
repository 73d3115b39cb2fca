"""The method that docs/new_method.md writes keeps what all methods promise: its code goes through the matrix of ViT."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_promises
import torch
from support.documentation_blocks import ROOT, Block, parts
from support.families import build, inputs
from support.methods import METHODS

from cl_prompts import PromptPoolModel
from cl_prompts.methods import METHODS as REGISTERED


NAME, FAMILY = "soft_tasks", "vit"
(CODE,) = (
    part.code for part in parts(ROOT / "docs" / "new_method.md") if isinstance(part, Block) and part.title == f"{NAME}.py"
)


@pytest.fixture(scope="module")
def _method(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The page's file, imported and in the table of methods."""
    file = tmp_path_factory.mktemp("page") / f"{NAME}.py"
    file.write_text(CODE)
    spec = importlib.util.spec_from_file_location(NAME, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module  # where dataclasses look types up
    REGISTERED.pop(NAME, None)  # by a test that ran the page
    spec.loader.exec_module(module)
    METHODS[NAME] = lambda **more: module.SoftTasksConfig(layers=[0, 2], **more)
    yield
    for table in (METHODS, REGISTERED, sys.modules):
        del table[NAME]


CELLS = [
    test_promises.test_an_answer_does_not_depend_on_the_batch,
    test_promises.test_an_answer_does_not_depend_on_labels,
    test_promises.test_off_is_off_and_the_backbone_is_never_changed,
    test_promises.test_every_trainable_tensor_learns,
    test_promises.test_what_a_method_freezes_stays_frozen,
]
ROWS = [
    test_promises.test_the_output_tells_what_was_chosen,
    test_promises.test_a_plain_peft_model_is_the_same,
    test_promises.test_answers_under_autocast_are_close,
]


@pytest.mark.usefixtures("_method")
@pytest.mark.parametrize("promise", CELLS, ids=lambda promise: promise.__name__)
def test_promises_of_a_method_on_a_family(promise: Callable[[str, str], None]) -> None:
    promise(NAME, FAMILY)


@pytest.mark.usefixtures("_method")
@pytest.mark.parametrize("promise", ROWS, ids=lambda promise: promise.__name__)
def test_promises_of_a_method(promise: Callable[[str], None]) -> None:
    promise(NAME)


@pytest.mark.usefixtures("_method")
def test_saved_and_loaded_it_answers_bit_equal_and_learns_on(tmp_path: Path) -> None:
    model: Any = test_promises.trained(NAME, FAMILY)
    model.save_pretrained(tmp_path / "saved")
    loaded = PromptPoolModel.from_pretrained(build(FAMILY), tmp_path / "saved")
    images = inputs(FAMILY, 4, seed=5)["pixel_values"]
    assert torch.equal(test_promises.logits(loaded, images), test_promises.logits(model, images))
    test_promises.test_training_goes_on_after_loading(NAME, FAMILY, tmp_path / "again")


def test_it_is_short() -> None:
    assert sum(bool(line.strip()) for line in CODE.splitlines()) < 60
