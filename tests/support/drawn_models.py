"""Models whose prompts and keys are all drawn at random, for comparison with formulas."""

from typing import Any

import torch

from cl_prompts import PromptPoolConfig, get_prompt_pool_model
from support.families import build


def model_of(config: PromptPoolConfig, tasks: int = 1, family: str = "vit") -> Any:
    """A model that has begun some tasks, with prompts and keys of every task drawn anew."""
    torch.manual_seed(4)
    model = get_prompt_pool_model(build(family), config)
    for task in range(tasks):
        if task:
            model.end_task()
        model.begin_task([2 * task, 2 * task + 1])
        with torch.no_grad():
            for parameter in model.adapter.pool.parameters():
                parameter.normal_(std=0.5)
    return model.eval()
