"""Small Hash models, some of which have learned."""

from typing import Any

import torch
from torch import Tensor

from cl_prompts import HashPromptConfig, PromptPoolModel, get_prompt_pool_model
from support.families import build
from support.tensors import draw


IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TASKS = ([4, 1], [0, 7], [3, 5])
SMALL: dict[str, Any] = {"pool_size": 6, "prompt_length": 4, "top_k": 2, "layers": [0, 2], "history_top": 2, "delta": 0.4}
SMALL |= {"router_scale": 1.0, "relative_delta": False}  # as the paper has it


def labels_of(task: int) -> Tensor:
    return torch.tensor(TASKS[task] * 4)


def images_of(task: int) -> Tensor:
    return IMAGES + draw(*IMAGES.shape, seed=20 + task)


def new_model(**fields: Any) -> PromptPoolModel:
    base = build("vit")
    torch.manual_seed(0)
    return get_prompt_pool_model(base, HashPromptConfig(**{**SMALL, **fields}))


def learn(model: PromptPoolModel, tasks: int, *, end: bool = True) -> PromptPoolModel:
    """Three steps a task, with routers of different tasks far apart."""
    for task in range(tasks):
        model.begin_task(TASKS[task])
        with torch.no_grad():
            model.adapter.pool.router.add_(draw(*model.adapter.pool.router.shape, seed=task))
        optimizer = torch.optim.Adam(model.parameter_groups(learning_rate=1e-2))
        model.attach_optimizer(optimizer)
        model.train()
        for _ in range(3):
            model(images_of(task), labels=labels_of(task), sample_ids=range(8)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if end or task < tasks - 1:
            model.end_task()
    return model
