"""Blocks as transformers had them before 5.23: without further keyword arguments, and checkpointed with their hooks."""

from functools import partial
from inspect import unwrap
from typing import Any

import pytest
import torch
from support.families import build, inputs
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer

from cl_prompts import HashPromptConfig, L2PConfig, PromptPoolModel, get_prompt_pool_model


class PlainLayer(Dinov2Layer):
    """DINOv2's block of transformers 5.17: its attention gets the tokens alone."""

    def forward(self, hidden_states: Tensor, attention_mask: None = None) -> Tensor:
        attended, _ = self.attention(self.norm1(hidden_states))
        hidden_states = self.drop_path(self.layer_scale1(attended)) + hidden_states
        return self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states)))) + hidden_states


class CheckpointedCall(PlainLayer):
    """The block of transformers 5.17 to 5.22: what is checkpointed is its call, hooks included."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(partial(nn.Module.__call__, self, **kwargs), *args)
        return nn.Module.__call__(self, *args, **kwargs)


CheckpointedCall.forward = unwrap(PlainLayer.forward)  # type: ignore[method-assign]  # today's would checkpoint once more


def model_of(method: str, layer: type[nn.Module] | None, *, checkpointing: bool = False) -> PromptPoolModel:
    base: Any = build("dinov2")
    for block in base.encoder.layer:
        block.__class__ = layer or block.__class__
    torch.manual_seed(1)
    config = L2PConfig() if method == "l2p" else HashPromptConfig(layers=[0, 2], modulate="gradient")
    model = get_prompt_pool_model(base, config)
    if checkpointing:
        base.gradient_checkpointing_enable()
    model.begin_task([0, 1])
    return model


def gradients(model: PromptPoolModel) -> dict[str, Tensor | None]:
    """Of two forwards before one backward: what is recomputed must find its own prompts."""
    model.train()
    loss = model(**inputs("dinov2"), labels=torch.tensor([0, 1, 1])).loss
    loss = loss + 2 * model(**inputs("dinov2", seed=5), labels=torch.tensor([1, 0, 0])).loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["l2p", "hash"])
def test_blocks_without_keyword_arguments_answer_as_those_with_them(method: str) -> None:
    plain, usual = (model_of(method, layer).eval() for layer in (PlainLayer, None))
    assert_close(plain(**inputs("dinov2")).logits, usual(**inputs("dinov2")).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["l2p", "hash"])
def test_a_checkpointed_call_finds_its_plan_when_it_is_recomputed(method: str) -> None:
    found, expected = (
        gradients(model_of(method, layer, checkpointing=layer is CheckpointedCall)) for layer in (CheckpointedCall, None)
    )
    for name, gradient in expected.items():
        assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
