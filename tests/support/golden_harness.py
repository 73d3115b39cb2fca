"""What a fixture of `golden/` is, and how it becomes a model of ours."""

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import ViTModel

from cl_prompts import PromptPoolConfig, PromptPoolModel, PromptPoolOutput, get_prompt_pool_model
from support.paths import TESTS


GOLDEN = Path(os.environ.get("CL_PROMPTS_GOLDEN", TESTS / "golden"))

# Takes a tensor of the model and gives its value or its gradient (zeros where it has none).
Value = Callable[[Tensor], Tensor]


@dataclass
class Case:
    tensors: dict[str, Tensor]
    about: dict[str, Any]

    @classmethod
    def load(cls, name: str) -> "Case":
        return cls(load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text()))

    @property
    def sizes(self) -> dict[str, Any]:
        found: dict[str, Any] = self.about["hyperparameters"]
        return found

    @property
    def task(self) -> int:
        return int(self.about["task"]["task_id"])

    def tolerance(self, what: str, value: Tensor | float = 0.0) -> float:
        rules = {name: rule for names, rule in self.about["tolerance"].items() for name in names.split(", ")}
        rule = rules.get(what, rules.get(what.removeprefix("eval_")))
        if isinstance(rule, float):
            return rule
        number = float(rule.replace("per tensor:", "").split("*")[0])  # "2e-5 * max(1, |value|)" and the like
        return number * max(1.0, abs(float(value)))

    def close(self, actual: Tensor, name: str, what: str) -> None:
        assert_close(actual, self.tensors[name], atol=self.tolerance(what), rtol=0)


@dataclass
class Part:
    """One of the adapter's tensors as a part of one of the fixture's.

    Args:
        name: the fixture's tensor, without "before/" and the like.
        index: where in it ours lies.
        ours: value or gradient, in the fixture's shape; as value a view that can be written to.
    """

    name: str
    index: Any
    ours: Tensor


@dataclass
class Method:
    """How one fixture meets our library.

    Args:
        config: the fixture's settings as our config.
        layout: where the pool's trained tensors, and those it froze, lie in the fixture.
        parts: our names of the fixture's loss parts; "a+b" where the fixture has the sum of two of ours.
        rates: the fixture's learning rates as arguments of `parameter_groups`.
        test_tasks: number of tasks to begin for the fixture's test numbers, where these use prompts of tasks to come. None:
            as many as in training.
        prepare: sets what is no trainable tensor (counts, class means).
        fixture: the fixture's file, where several methods share one.
        variant: "as_released/" for a fixture's second set of numbers.
        check_test: further checks on the answer at test.
    """

    config: Callable[[Case], PromptPoolConfig]
    layout: Callable[[Case, Any, Value], list[Part]]
    parts: dict[str, str]
    rates: Callable[[dict[str, Any]], dict[str, float]] = lambda about: {"learning_rate": about["lr"]}
    test_tasks: Callable[[Case], int | None] = lambda case: None
    prepare: Callable[[Case, Any], None] = lambda case, pool: None
    fixture: str = ""
    variant: str = ""
    check_test: Callable[[Case, PromptPoolOutput], None] = lambda case, output: None

    def build(self, case: Case, *, test: bool) -> PromptPoolModel:
        """The fixture's model. The last task begun has the fixture's current classes."""
        vit = ViTModel.from_pretrained(GOLDEN / "backbone", add_pooling_layer=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="batchwise_selection")
            model = get_prompt_pool_model(vit, self.config(case))
        tasks = (self.test_tasks(case) if test else None) or case.task + 1
        for classes in _tasks(case, tasks):
            if model.classes:
                model.end_task()
            model.begin_task(classes)
        if test:  # published tests come after the task
            model.end_task()
        with torch.no_grad():
            for part in self.all_parts(case, model, lambda tensor: tensor):
                part.ours.copy_(case.tensors[f"before/{part.name}"][part.index])
        self.prepare(case, model.adapter.pool)
        return model

    def all_parts(self, case: Case, model: PromptPoolModel, value: Value) -> list[Part]:
        head, rows = model.adapter.head, torch.tensor(model.classes)
        return [
            *self.layout(case, model.adapter.pool, value),
            Part("head.weight", rows, value(head.weight)),
            *([] if head.bias is None else [Part("head.bias", rows, value(head.bias))]),
        ]


def _tasks(case: Case, tasks: int) -> Sequence[Sequence[int]]:
    """The fixture's classes in `tasks` tasks: the last one has the current ones, the first one what is left over."""
    current = case.about["task"]["current_classes"]
    others = [c for c in range(case.about["dims"]["num_classes"]) if c not in current]
    if tasks == 1:
        return [current]
    if tasks - 1 > len(others):  # a test with prompts of tasks to come: which classes a task has does not matter there
        return [[c] for c in sorted(others + current)]
    return [others[tasks - 2 :], *([c] for c in others[: tasks - 2]), current]


def gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def by_layer(name: str, stacked: Tensor, layers: Sequence[int], index: Any = ...) -> list[Part]:
    """Tensors [layers, ...] as the fixture's "name/layer2" and so on."""
    return [Part(f"{name}/layer{layer}", index, stacked[row]) for row, layer in enumerate(layers)]


def tasks_of(per_task: Any, value: Value) -> list[Tensor]:
    """A PerTask's tensors, task by task."""
    return [*value(per_task.earlier), value(per_task.current)]
