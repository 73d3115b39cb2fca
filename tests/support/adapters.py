"""Small trained adapters for the tests of what PEFT promises."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_prompts import HashPromptConfig, L2PConfig, PromptPoolConfig, PromptPoolOutput, get_prompt_pool_model
from support.families import inputs


METHODS: dict[str, Callable[..., PromptPoolConfig]] = {
    "l2p": lambda **more: L2PConfig(pool_size=7, top_k=3, **more),
    "hash": lambda **more: HashPromptConfig(pool_size=7, layers=[0, 2], **more),
}
LEARNED = {
    "l2p": {"pool.prompts", "pool.keys", "head.weight", "head.bias"},
    "hash": {"pool.prompts", "pool.router", "head.weight", "head.bias"},
}
methods = pytest.mark.parametrize("method", METHODS)
heads = pytest.mark.parametrize("classifier", [False, True], ids=["bare", "classifier"])


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def learn(model: Any, classes: list[int], seed: int = 0) -> list[PromptPoolOutput]:
    """One task of two SGD steps; returns the outputs. Gradients of the last step stay."""
    model.begin_task(classes)
    model.train()
    optimizer = torch.optim.SGD(model.parameter_groups(learning_rate=0.5))
    model.attach_optimizer(optimizer)
    outputs = []
    for step in range(2):
        optimizer.zero_grad()
        labels = torch.tensor([classes[0], classes[-1], classes[0]])
        outputs.append(model(**inputs("vit", seed=10 * seed + step), labels=labels))
        outputs[-1].loss.backward()
        optimizer.step()
    model.end_task()
    return outputs


@torch.no_grad()
def logits(model: Any, seed: int = 99) -> Tensor:
    answer: Tensor = model.eval()(**inputs("vit", seed=seed)).logits
    return answer


def trained(base: Any, method: str, **more: Any) -> Any:
    """A model of two tasks, classes out of order."""
    torch.manual_seed(3)
    model = get_prompt_pool_model(base, METHODS[method](**more))
    learn(model, [7, 3])
    learn(model, [1, 5], seed=1)
    return model
