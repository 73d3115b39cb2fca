"""Small HiDe-Prompt and NoRGa models, some of which have learned."""

import copy
from typing import Any

import torch
from torch import Tensor

from cl_prompts import HiDePromptConfig, PromptPoolModel, get_prompt_pool_model
from support.families import build
from support.tensors import draw


TASKS = ([4, 1], [0, 7], [3, 5])


def images_of(task: int, count: int = 6) -> Tensor:
    """Images of a task lie around one picture, so that tasks can be told apart."""
    return 0.5 * draw(count, 3, 32, 32, seed=20 + task) + draw(1, 3, 32, 32, seed=task)


def labels_of(task: int, count: int = 6) -> Tensor:
    return torch.tensor((TASKS[task] * count)[:count])


def new_model(config: type[HiDePromptConfig] = HiDePromptConfig, **fields: Any) -> PromptPoolModel:
    base = build("vit")
    torch.manual_seed(0)
    return get_prompt_pool_model(base, config(**{"layers": [0, 2], "prompt_length": 3, "task_init": "fresh", **fields}))


def learn(model: PromptPoolModel, tasks: range, *, end: bool = True, optimizer: Any = None) -> PromptPoolModel:
    """Three steps a task on the same images; a given optimizer is kept and takes new parameters in."""
    for task in tasks:
        model.begin_task(TASKS[task])
        groups = model.parameter_groups(learning_rate=2e-2)
        used = optimizer or torch.optim.AdamW(groups, weight_decay=0.1)
        known = {id(p) for group in used.param_groups for p in group["params"]}
        fresh = [p for group in groups for p in group["params"] if id(p) not in known]
        if fresh:
            used.add_param_group({"params": fresh})
        model.train()
        for _ in range(3):
            model(images_of(task), labels=labels_of(task), sample_ids=range(6)).loss.backward()
            used.step()
            used.zero_grad()
        if end or task != tasks[-1]:
            model.end_task()
    return model


@torch.no_grad()
def answer(model: PromptPoolModel, images: Tensor, tasks: list[int] | Tensor | None = None) -> Any:
    """The answer with these tasks' prompts, or with those the model chooses."""
    if tasks is not None:
        model = copy.deepcopy(model)
        model.adapter.pool.task_inference = lambda query: torch.as_tensor(tasks)
    return model.eval()(images)
