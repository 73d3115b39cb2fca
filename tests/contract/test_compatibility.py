"""Adapters that were saved once load for ever: tests/adapters_v*, made by make_adapter_fixtures.py."""

import json
import shutil
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.closed_form_models import answers, learn_task
from support.make_adapter_fixtures import EVERY, NAMES, NEWEST, TASKS, base_of, fixture_of, images_of
from support.paths import TESTS
from torch import Tensor
from torch.testing import assert_close

from cl_prompts import PromptPoolConfig, PromptPoolModel
from cl_prompts.storage.adapter_state import FORMAT_VERSION, AdapterState
from cl_prompts.storage.integrity import CLASSES_SUFFIX, SAVED_PREFIX, WEIGHTS_FILE


pytestmark = pytest.mark.by_turns(5)


VERSIONS = sorted(TESTS.glob("adapters_v*"))
FIXTURES = [
    pytest.param(folder, id=f"{version.name}-{folder.name}")
    for version in VERSIONS
    for folder in sorted(path.parent for path in version.glob("*/adapter_config.json"))
]
every_fixture = pytest.mark.parametrize("fixture", FIXTURES)
CONFIG = "adapter_config.json"


@cache
def base(version: Path) -> Any:
    return base_of(version)


def load(folder: Path, version: Path, **options: Any) -> Any:
    """A fixture's adapter on the base it was made on; any warning fails the test."""
    return PromptPoolModel.from_pretrained(base(version), folder, **options)


def logits(model: Any, version: Path) -> Tensor:
    return answers(model, images_of(version))


def stored(fixture: Path) -> Tensor:
    return load_file(fixture / "logits.safetensors")["logits"]


def edited(fixture: Path, room: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a fixture with another config."""
    folder = Path(shutil.copytree(fixture, room / "edited", dirs_exist_ok=True))
    config = json.loads((fixture / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@every_fixture
def test_it_answers_as_it_did_and_learns_on(fixture: Path) -> None:
    model = load(fixture, fixture.parent, is_trainable=True)
    assert model.classes == [c for task in TASKS for c in task]
    assert model.adapter.config.state.class_names == {str(c): name for c, name in NAMES.items()}
    assert model.adapter.config.state.written_by is not None
    expected = stored(fixture)
    # Log densities of a discriminant head are of the order of 50, where other processors' kernels differ by 1e-4.
    assert_close(logits(model, fixture.parent), expected, atol=1e-5, rtol=1e-5)
    number = len(TASKS)
    learn_task(model, [2, 5], train=model.trains_task(number))
    after = logits(model, fixture.parent)
    assert after.shape == (len(expected), 6)
    assert after.isfinite().all()


@pytest.mark.parametrize("method", EVERY)
def test_every_method_has_one(method: str) -> None:
    assert fixture_of(NEWEST, method).is_dir(), "python tests/support/make_adapter_fixtures.py makes it; git add it"


def test_there_is_one_folder_for_each_format_version() -> None:
    assert [folder.name for folder in VERSIONS] == [f"adapters_v{n + 1}" for n in range(FORMAT_VERSION)]


# ---- fields that come and go


def default_of(config: PromptPoolConfig | AdapterState) -> dict[str, Any]:
    """Default values of the fields that have one."""
    made = {f.name: f.default_factory() for f in fields(config) if f.default_factory is not MISSING}
    return made | {f.name: f.default for f in fields(config) if f.default is not MISSING}


@every_fixture
def test_a_field_that_was_added_later_has_its_default(fixture: Path, tmp_path: Path) -> None:
    """An older file is one that lacks every field whose value is the default, in the config and in its state."""
    known = PromptPoolConfig.from_pretrained(fixture)

    def forget(config: dict[str, Any]) -> None:
        for values, defaults in ((config, default_of(known)), (config["state"], default_of(known.state))):
            for name in [n for n, value in values.items() if n != "method" and defaults.get(n, MISSING) == value]:
                del values[name]

    older = edited(fixture, tmp_path, forget)
    assert len(json.loads((older / CONFIG).read_text())) < len(known.to_dict()) - 10
    model = load(older, fixture.parent)
    assert torch.equal(logits(model, fixture.parent), logits(load(fixture, fixture.parent), fixture.parent))
    assert PromptPoolConfig.from_pretrained(older) == known


@every_fixture
def test_fields_that_this_version_does_not_know_are_named_and_ignored(fixture: Path, tmp_path: Path) -> None:
    """Those of a newer version, and those that a version has removed."""

    def add(config: dict[str, Any]) -> None:
        config.update(gate_temperature=0.5, adapters=[{"a": 1}])
        config["state"].update(mood="good")

    newer = edited(fixture, tmp_path, add)
    with (
        pytest.warns(UserWarning, match=r"unknown fields \['adapters', 'gate_temperature'\] in the file of a \w+Config"),
        pytest.warns(UserWarning, match=r"unknown fields \['mood'\] in the adapter's state are ignored"),
    ):
        model = load(newer, fixture.parent)
    assert torch.equal(logits(model, fixture.parent), logits(load(fixture, fixture.parent), fixture.parent))
    assert not hasattr(model.adapter.config, "gate_temperature")


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        (lambda config: config.pop("method"), r"unknown method None: choose one of"),
        (lambda config: config.pop("peft_type"), r"has peft_type None, not 'PROMPT_POOL'"),
        (lambda config: config.pop("state"), r"does not fit its config|the config implies"),
        (lambda config: config["state"].pop("tasks"), r"does not fit its config|the config implies"),
        (lambda config: config.pop("pool_size"), r"the config implies .*are both files from the same save"),
        (lambda config: config.pop("layers"), r"layers \[3\] are out of range"),
    ],
)
def test_a_file_that_lacks_what_its_tensors_need_is_refused(
    forget: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    fixture = fixture_of(NEWEST, "hash")
    with pytest.raises(ValueError, match=message):
        load(edited(fixture, tmp_path, forget), NEWEST)


# ---- newer formats


@pytest.mark.parametrize(
    ("written_by", "needed"),
    [
        ("2.3.1", r"'cl-prompts>=2.3.1'"),
        ("1.0rc2+cu12", r"'cl-prompts>=1.0rc2\+cu12'"),
        (None, r"'cl-prompts'"),
        (7, r"'cl-prompts'"),
        # nobody shall copy that into a shell
        ("1'; curl x | sh; '", r"'cl-prompts'"),
        ("1\n2", r"'cl-prompts'"),
    ],
)
def test_a_newer_format_names_the_version_that_reads_it(written_by: Any, needed: str, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["state"].update(format_version=FORMAT_VERSION + 1, written_by=written_by, tasks="in another form")

    folder = edited(fixture_of(NEWEST, "l2p"), tmp_path, change)
    message = rf"format version {FORMAT_VERSION + 1}, this cl_prompts \S+ reads up to {FORMAT_VERSION}: upgrade with `pip "
    with pytest.raises(ValueError, match=rf"{message}install -U {needed}`$"):
        load(folder, NEWEST)


def test_a_file_is_of_the_version_that_wrote_it(tmp_path: Path) -> None:
    """Not of the one it was loaded from."""
    folder = edited(fixture_of(NEWEST, "l2p"), tmp_path, lambda config: config["state"].update(written_by="0.0.1"))
    load(folder, NEWEST).save_pretrained(tmp_path / "again")
    state = json.loads((tmp_path / "again" / CONFIG).read_text())["state"]
    assert state["format_version"] == FORMAT_VERSION
    assert state["written_by"] not in (None, "0.0.1")
    saved, original = (load_file(place / WEIGHTS_FILE) for place in (tmp_path / "again", fixture_of(NEWEST, "l2p")))
    assert saved.keys() - original.keys() == {f"{SAVED_PREFIX}{CLASSES_SUFFIX}"}, "files of then had no classes"
    assert all(torch.equal(saved[name], tensor) for name, tensor in original.items())
