"""The last block computes what is read, and the numbers are those of the plain block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.families import BARE, CLASSIFIERS, build, inputs, with_noise
from support.methods import METHODS
from torch import Tensor, nn

from cl_prompts import HashPromptConfig, L2PConfig, VPTConfig, get_prompt_pool_model


pytestmark = pytest.mark.by_turns(3)


LABELS = torch.tensor([0, 1, 0])
# Their blocks take rotary embeddings or position biases, so they run as they are.
PLAIN = {"beit_relative", "beit_shared", "dinov3"}


def new_model(name: str, config: Any, **more: Any) -> Any:
    model = get_prompt_pool_model(build(name, **more), config)
    model.begin_task([0, 1])
    if config.needs_optimizer:
        model.attach_optimizer(torch.optim.SGD(model.parameter_groups(learning_rate=0.1)))
    return model


@contextmanager
def all_tokens(model: Any) -> Iterator[None]:
    """Passes that compute all tokens, for comparison."""
    model.base_model.backbone.readable = lambda *tokens: None
    try:
        yield
    finally:
        del model.base_model.backbone.readable


def numbers(model: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, logits and gradients of a training pass, logits and query of a test."""
    model.train()
    learnt = model(**values, labels=LABELS)
    learnt.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.eval()
    with torch.no_grad():
        tested = model(**values)
    found |= {"loss": learnt.loss.detach(), "logits": tested.logits, "features": tested.features}
    return found | ({} if tested.query is None else {"query": tested.query})


def check_numbers(model: Any, values: dict[str, Tensor]) -> None:
    own = numbers(model, values)
    with all_tokens(model):
        plain = numbers(model, values)
    assert own.keys() == plain.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, plain[name], atol=1e-5 * max(1.0, float(plain[name].abs().max())), rtol=0)


@pytest.mark.by_turns(5)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BARE)
def test_every_family_gives_the_plain_numbers(name: str, attention: str) -> None:
    values = with_noise(name, inputs(name))
    for config in (
        L2PConfig(top_k=2),
        VPTConfig(deep=True, prompt_length=3),
        VPTConfig(readout="prompt", position="front"),
    ):
        check_numbers(new_model(name, config, attention=attention), values)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_plain_numbers(method: str) -> None:
    check_numbers(new_model("vit", METHODS[method]()), inputs("vit"))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_base_with_a_head_of_its_own(name: str) -> None:
    """It reads tokens that are not there any more; its answer is not asked for, but it must not stumble."""
    check_numbers(new_model(name, L2PConfig(top_k=2), classifier=True), inputs(name))


def tokens_computed(model: Any, values: dict[str, Tensor], **more: Any) -> list[int]:
    """How many tokens leave the attention of the last block, in each pass of a forward."""
    structure = model.base_model.structure
    seen: list[int] = []
    model.base_model.backbone.readable(0, 1)  # the trial runs once, before the first pass

    def note(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0].shape[1])

    handle = model.get_base_model().get_submodule(structure.attentions[-1]).register_forward_hook(note)
    model(**values, **more)
    handle.remove()
    return seen


@pytest.mark.parametrize("name", sorted(set(BARE) - {"siglip", "siglip2", "ijepa", "beit"}))
def test_the_work(name: str) -> None:
    """The query pass computes the CLS token, the prompted pass the 10 tokens of two prompts; prefixes: the CLS token."""
    values, narrowed = with_noise(name, inputs(name)), name not in PLAIN
    model = new_model(name, L2PConfig(top_k=2, readout="prompt")).eval()
    seen = tokens_computed(model, values)
    assert (seen == [1, 10]) if narrowed else (min(seen) > 16)
    model = new_model(name, VPTConfig(deep=True, prompt_length=3)).eval()
    seen = tokens_computed(model, values)
    assert (seen == [1]) if narrowed else (min(seen) > 16)


def test_where_all_tokens_are_needed() -> None:
    """A mean reads them all, a router in the last block is asked about them all, a recomputed block must find them."""
    values = inputs("vit")
    for config in (VPTConfig(readout="mean"), VPTConfig(readout="cls_mean"), HashPromptConfig(pool_size=4, layers=[2])):
        model = new_model("vit", config)
        assert set(tokens_computed(model.eval(), values)) <= {5 + 16, 1 + 16, config.prompt_length + 17}
    model = new_model("vit", VPTConfig(deep=True, prompt_length=3))
    expected = numbers(model, values)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    found = numbers(model, values)
    assert all(torch.allclose(tensor, expected[name], atol=1e-5) for name, tensor in found.items())
    model.train()
    assert set(tokens_computed(model, values, labels=LABELS)) == {17}


@pytest.mark.parametrize("module", ["k_proj", "layernorm_before", "mlp", "attention"])
def test_modules_that_are_trained_along(module: str) -> None:
    model = new_model("vit", VPTConfig(deep=True, prompt_length=3, modules_to_save=[module]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(torch.full_like(parameter, 0.05))
    check_numbers(model, inputs("vit"))


def test_a_block_that_another_formula_runs_is_left_alone() -> None:
    """A block whose attention sees something else than its norm's output fails the trial."""
    base = build("vit")
    attention = base.layers[-1].attention
    attention.register_forward_pre_hook(lambda m, args: (2 * args[0] - args[0].mean(1, keepdim=True), *args[1:]))
    model = new_model_on(base)
    assert set(tokens_computed(model, inputs("vit"))) == {17}
    model = new_model_on(build("vit"))
    assert set(tokens_computed(model, inputs("vit"))) == {1}


def new_model_on(base: Any) -> Any:
    model = get_prompt_pool_model(base, VPTConfig(deep=True, prompt_length=3))
    model.begin_task([0, 1])
    return model.eval()


def test_half_precision_and_a_change_of_attention() -> None:
    base = build("vit").to(torch.bfloat16)
    model = new_model_on(base)
    with all_tokens(model), torch.no_grad():
        plain = model(**inputs("vit")).features
    values = inputs("vit")
    for attention in ("sdpa", "eager"):
        base.set_attn_implementation(attention)
        with torch.no_grad():
            own = model(**values).features
        assert tokens_computed(model, values) == [1]
        assert (own - plain).abs().max() < 0.05 * plain.abs().max()


def test_the_base_is_given_back_whole() -> None:
    base, values = build("vit"), inputs("vit")
    expected = base(**values).last_hidden_state
    model = new_model_on(base)
    model(**values)
    with model.disable_adapter():
        assert torch.equal(model(**values).last_hidden_state, expected)
    assert torch.equal(model.unload()(**values).last_hidden_state, expected)
    assert not any(hooks for m in base.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))
    assert not any(name.startswith("_cl_") or name == "forward" for m in base.modules() for name in vars(m))
