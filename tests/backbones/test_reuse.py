"""Blocks below the lowest prompt run once, and nothing changes by it."""

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from support.families import BARE, build, inputs, with_noise
from torch import Tensor, nn

from cl_prompts import (
    CodaPromptConfig,
    DualPromptConfig,
    L2PConfig,
    L2PPrefixConfig,
    get_prompt_pool_model,
)


LABELS = torch.tensor([0, 1, 0])
HIGH: dict[str, Any] = {
    "coda": lambda **more: CodaPromptConfig(components_per_task=3, layers=[1, 2], **more),
    "l2p_prefix": lambda **more: L2PPrefixConfig(pool_size=5, prompt_length=4, top_k=2, layers=[2], **more),
    "dualprompt": lambda **more: DualPromptConfig(g_layers=[1], e_layers=[2], **more),
}


def new_model(name: str, config: Any) -> Any:
    base = build(name)
    torch.manual_seed(0)
    model = get_prompt_pool_model(base, config)
    model.begin_task([0, 1])
    return model


def blocks_run(model: Any, values: dict[str, Tensor], **more: Any) -> tuple[list[int], Any]:
    """How often the MLP, or whatever comes last in it, of each block ran; and the answer."""
    counts = [0] * 3

    def count(number: int) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            counts[number] += 1

        return note

    attentions = [model.get_base_model().get_submodule(name) for name in model.base_model.structure.attentions]
    model.base_model.backbone.readable(0, 1)  # the trial runs once, before the first pass
    handles = [attention.register_forward_hook(count(i)) for i, attention in enumerate(attentions)]
    answer = model(**values, **more)
    for handle in handles:
        handle.remove()
    return counts, answer


@pytest.mark.by_turns(3)
@pytest.mark.parametrize("name", BARE)
@pytest.mark.parametrize("method", HIGH)
def test_the_numbers_are_bit_equal(method: str, name: str) -> None:
    model, values = new_model(name, HIGH[method]()), with_noise(name, inputs(name))
    lowest = min(model.base_model.adapter.pool.layers)

    def numbers() -> dict[str, Tensor]:
        model.train()
        counts, learnt = blocks_run(model, values, labels=LABELS)
        learnt.loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model.eval()
        return found | {"logits": learnt.logits, "test": model(**values).logits, "blocks": torch.tensor(counts)}

    own = numbers()
    assert own.pop("blocks").tolist() == [1 if i < lowest else 2 for i in range(3)]
    model.base_model.backbone.unprompted_blocks = lambda lowest: 0
    plain = numbers()
    assert plain.pop("blocks").tolist() == [2, 2, 2]
    assert own.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in own.items())


def test_where_both_passes_need_them() -> None:
    """A query that the caller brings, prompts in block 0, tokens, or a lower block that is trained along."""
    values = inputs("vit")
    model = new_model("vit", HIGH["coda"]()).eval()
    query = model.base_model.extract_features(values["pixel_values"])
    assert blocks_run(model, values, query=query)[0] == [1, 1, 1]
    assert blocks_run(model, values)[0] == [1, 2, 2]
    assert blocks_run(new_model("vit", L2PConfig(top_k=2)).eval(), values)[0] == [2, 2, 2]
    model = new_model("vit", HIGH["l2p_prefix"](modules_to_save=["layernorm_before"])).train()
    counts, output = blocks_run(model, values, labels=LABELS)
    assert counts == [2, 2, 2]
    output.loss.backward()
    assert model.get_base_model().layers[0].layernorm_before.modules_to_save["default"].weight.grad.abs().sum() > 0


def test_the_base_is_whole_afterwards_and_after_an_error() -> None:
    model, values = new_model("vit", HIGH["coda"]()).eval(), inputs("vit")
    with model.disable_adapter():
        expected = model(**values).last_hidden_state
    model(**values)
    with pytest.raises(TypeError):
        model(**values, unknown_argument=torch.ones(1), labels="none")
    handle = model.get_base_model().layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**values)
    handle.remove()
    with model.disable_adapter():
        assert torch.equal(model(**values).last_hidden_state, expected)


def test_blocks_with_a_forward_of_their_own_keep_it() -> None:
    """As those of a base that Accelerate has spread over devices."""
    model, values, counts = new_model("vit", HIGH["coda"]()).eval(), inputs("vit"), [0]

    class Counting(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            counts[0] += 1
            return args, kwargs

    model(**values)  # the trial of the last block runs once
    for block in model.get_base_model().layers:
        add_hook_to_module(block, Counting())
    for number in (1, 2):
        model(**values)
        assert counts == [number * 6], "two passes through three blocks"
    assert all("forward" in vars(block) for block in model.get_base_model().layers)
