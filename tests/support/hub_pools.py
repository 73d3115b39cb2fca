"""A small trained pool, to be pushed and pulled."""

from typing import Any

import torch
from torch import nn

from cl_prompts import L2PConfig, PromptPoolModel, get_prompt_pool_model
from support.families import build


def shaken(model: nn.Module) -> None:
    """Every tensor that is trained gets other values."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


def small(base: Any = None, **more: Any) -> PromptPoolModel:
    """An adapter of two classes."""
    torch.manual_seed(0)
    model = get_prompt_pool_model(base if base is not None else build("vit"), L2PConfig(pool_size=4, top_k=2, **more))
    model.begin_task([3, 1], class_names={3: "cat", 1: "dog"})
    shaken(model)
    model.end_task()
    return model.eval()
