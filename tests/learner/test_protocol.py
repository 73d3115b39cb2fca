"""The task API is declared on the model that users hold, with types, and all learners have what a trainer asks for."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.comparison import small_learner
from support.families import build, inputs
from support.paths import ROOT
from torch.testing import assert_close

from cl_prompts import L2PConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.baselines import BASELINES, get_baseline
from cl_prompts.learner.protocol import Learner
from cl_prompts.tuner.task_api import TaskAPI


def members(kind: type) -> list[str]:
    return sorted(name for name in vars(kind) if not name.startswith("_"))


def learners() -> Iterator[Any]:
    model = get_prompt_pool_model(build("vit"), L2PConfig())
    yield from (model, model.base_model)
    yield from (small_learner(name) for name in BASELINES)


def test_every_learner_has_what_a_trainer_asks_for() -> None:
    asked = [*members(Learner), "training"]
    assert len(asked) > 30
    lacking = {type(learner).__name__: {n for n in asked if not hasattr(type(learner), n)} for learner in learners()}
    # Set in __init__; mypy knows them (below).
    assert set().union(*lacking.values()) <= {"head", "class_mask", "training"}
    assert all(hasattr(learner, name) for learner in learners() for name in asked)


@pytest.mark.parametrize("name", ["prompts", "ewc", "packnet", "icarl"])
def test_passes_outside_training_have_all_inputs_of_the_base(name: str) -> None:
    """SigLIP 2 takes patches, their places, and which are padding."""
    base = build("siglip2")
    learner: Any = get_prompt_pool_model(base) if name == "prompts" else get_baseline(name, base)
    given = inputs("siglip2", 4)
    given["spatial_shapes"][1:] = torch.tensor([2, 4])
    given["pixel_attention_mask"][1:, 8:] = 0
    batch = {**given, "labels": torch.tensor([0, 1, 0, 1]), "sample_ids": torch.arange(4)}
    learner.begin_task([0, 1])
    learner.eval().consolidate([batch], [batch])
    learner.end_task()
    with torch.no_grad():
        assert_close(learner.features_of(batch), learner(**given).features)


def test_the_fisher_information_is_of_images_of_another_size() -> None:
    learner: Any = get_baseline("ewc", build("vit"))
    learner.begin_task([0, 1])
    images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    batch = {"pixel_values": images, "labels": torch.tensor([0, 1, 0, 1]), "interpolate_pos_encoding": True}
    learner.eval().consolidate([batch | {"sample_ids": torch.arange(4)}])
    assert any(t.any() for name, t in learner.extra_tensors().items() if "importance" in name)


@pytest.mark.parametrize("name", members(TaskAPI))
def test_the_model_declares_the_task_api(name: str) -> None:
    """Found on the class, so that completion and go-to-definition find it, and documented there."""
    assert hasattr(PromptPoolModel, name)
    assert getattr(PromptPoolModel, name).__doc__


LEARNERS = """
from torch import nn

from cl_prompts.baselines import Baseline
from cl_prompts.learner.protocol import Learner
from cl_prompts.tuner.task_api import TaskAPI


class PromptLearner(TaskAPI, nn.Module):
    '''PromptPoolModel and its tuner for mypy, which knows PEFT's classes as Any and would let them pass as anything.'''


class Unfinished(nn.Module):
    pass


def prompts(model: PromptLearner) -> Learner:
    return model


def baseline(model: Baseline) -> Learner:
    return model


def neither(model: Unfinished) -> Learner:
    return model  # an error
"""

RIGHT = """
import torch
from torch import Tensor

from cl_prompts import PromptPoolModel


def learn(model: PromptPoolModel, images: Tensor, labels: Tensor) -> dict[int, str]:
    model.begin_task([3, 1], revisit=False, class_names={3: "owl"})
    model.initialize_prompts(images, seed=1)
    optimizer = torch.optim.Adam(model.parameter_groups(learning_rate=5e-3, head=5e-4))
    model.attach_optimizer(optimizer)
    model.grow_pool(20, optimizer)
    model.check_labels()
    model.consolidate([{"pixel_values": images, "labels": labels}])
    model.end_task()
    state = model.training_state_dict()
    model.load_training_state_dict(state)
    query: Tensor = model.extract_features(images)
    output = model(images, labels, query=query)
    tasks: Tensor | None = model.chosen_tasks(output)
    mask: str = model.class_mask
    key: dict[str, object] = model.cache_key()
    needs: bool = model.needs_query
    model.compile_backbone(fullgraph=True)
    return {c: f"{mask} {tasks} {key} {needs} {model.fingerprint()[:8]}" for c in model.classes}
"""

WRONG = """
from torch import Tensor

from cl_prompts import PromptPoolModel


def learn(model: PromptPoolModel, images: Tensor) -> None:
    model.begin_task("owl")  # an error
    model.begin_task([1], revist=True)  # an error
    model.parameter_groups(lr="fast", learning_rate=1.0)  # an error
    model.attach_optimizer(images)  # an error
    model.grow_pool("20")  # an error
    classes: str = model.classes  # an error
    loss: int = model.extract_features(images)  # an error
    model.load_training_state_dict(images)  # an error
"""


def test_mypy_knows_the_types(tmp_path: Path) -> None:
    """In scripts of a user, mypy finds an error in each line that says so, and in no other."""
    scripts = {"learners.py": LEARNERS, "right.py": RIGHT, "wrong.py": WRONG}
    for name, script in scripts.items():
        (tmp_path / name).write_text(script)
    paths = [str(tmp_path / name) for name in scripts]
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    lines = [line.split(":") for line in done.stdout.splitlines() if ": error: " in line]
    found = {(Path(parts[0]).name, int(parts[1])) for parts in lines}
    expected = {
        (name, number)
        for name, script in scripts.items()
        for number, line in enumerate(script.splitlines(), 1)
        if line.endswith("# an error")
    }
    assert len(expected) == 9
    assert found == expected, done.stdout
