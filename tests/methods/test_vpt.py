"""Visual prompt tuning against models that really insert tokens."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.families import BARE, CLASSIFIERS, build, inputs
from support.tensors import draw
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from cl_prompts import PromptPoolConfig, PromptPoolModel, VPTConfig, get_prompt_pool_model
from cl_prompts.backbones.structure import attention_norm, find_structure


pytestmark = pytest.mark.by_turns(3)


LABELS = torch.tensor([0, 1, 1])


def prompted(name: str, **fields: Any) -> PromptPoolModel:
    """A model whose prompts are as large as its tokens."""
    base = build(name)
    torch.manual_seed(0)
    model = get_prompt_pool_model(base, VPTConfig(prompt_length=4, **fields))
    model.begin_task([0, 1])
    with torch.no_grad():
        prompts = model.adapter.pool.prompts
        prompts.copy_(draw(*prompts.shape, seed=1))
    return model.train()


def whole(name: str, base: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs with which the masking model sees all patches, in order."""
    if name != "vit_mae":
        return values
    base.config.mask_ratio = 0.0
    return {**values, "noise": torch.arange(16.0).expand(3, -1)}


@contextmanager
def last_hidden(model: nn.Module) -> Iterator[list[Tensor]]:
    """What leaves the last block."""
    seen: list[Tensor] = []
    block = model.get_submodule(find_structure(model).blocks[-1])
    handle = block.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    yield seen
    handle.remove()


# ---- deep ----------------------------------------------------------------------------------------------------------


def insert_in_blocks(model: nn.Module, prompts: dict[int, Tensor]) -> None:
    """The oracle, with no code of ours in it: P tokens go in front of each block's input and are cut off its output.

    A mask or position bias that the model brings gets P free rows and columns.
    """
    structure = find_structure(model)
    for layer, rows in prompts.items():
        length = len(rows)

        def longer(block: nn.Module, args: Any, kwargs: Any, rows: Tensor = rows) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            return (torch.cat([rows.expand(len(hidden), -1, -1), hidden], 1), *args[1:]), kwargs

        def free(attention: nn.Module, args: Any, kwargs: Any, length: int = length) -> Any:
            pad = lambda x: F.pad(x, (length, 0, length, 0), value=float(x.dtype == torch.bool))  # noqa: E731
            args = tuple(pad(x) if i and isinstance(x, Tensor) else x for i, x in enumerate(args))
            if isinstance(kwargs.get("attention_mask"), Tensor):
                kwargs["attention_mask"] = pad(kwargs["attention_mask"])
            return args, kwargs

        def shorter(block: nn.Module, args: Any, output: Any, length: int = length) -> Any:
            return (output[0][:, length:], *output[1:]) if isinstance(output, tuple) else output[:, length:]

        block = model.get_submodule(structure.blocks[layer])
        block.register_forward_pre_hook(longer, with_kwargs=True)
        block.register_forward_hook(shorter)
        model.get_submodule(structure.attentions[layer]).register_forward_pre_hook(free, with_kwargs=True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", BARE)
def test_deep_prompts_equal_inserted_tokens(name: str, attention: str) -> None:
    """Last hidden state 1e-5, and the prompts' gradients, in every family."""
    model, values = prompted(name, deep=True, readout="mean"), inputs(name)
    model.get_base_model().set_attn_implementation(attention)
    with last_hidden(model.get_base_model()) as ours:
        model(**values, labels=LABELS)
    base = build(name, attention=attention).requires_grad_(False)
    values = whole(name, base, values)
    with last_hidden(base) as plain, torch.no_grad():
        base(**values)
    rows = model.adapter.pool.prompts.detach().clone().requires_grad_()
    insert_in_blocks(base, dict(enumerate(rows)))
    with last_hidden(base) as theirs:
        base(**values)
    assert ours[-1].shape == plain[0].shape
    assert_close(ours[-1], theirs[0], atol=1e-5, rtol=0)
    assert (ours[-1] - plain[0]).abs().max() > 0.1
    weight = draw(*plain[0].shape, seed=2) / plain[0].numel() ** 0.5
    for hidden in ours[-1], theirs[0]:
        (hidden * weight).sum().backward()
    assert_close(model.adapter.pool.prompts.grad, rows.grad, atol=1e-5, rtol=1e-4)
    assert (rows.grad.abs().sum(2) > 0).all()


def test_deep_prompts_of_some_layers() -> None:
    model, values = prompted("vit", deep=True, readout="mean", layers=[2, 0]), inputs("vit")
    assert model.adapter.config.layers == [0, 2]
    prompts = model.adapter.pool.prompts.detach()
    assert prompts.shape == (2, 4, 32)
    with last_hidden(model.get_base_model()) as ours:
        model(**values, labels=LABELS)
    base = build("vit")
    insert_in_blocks(base, {0: prompts[0], 2: prompts[1]})
    with last_hidden(base) as theirs, torch.no_grad():
        base(**values)
    assert_close(ours[-1], theirs[0], atol=1e-5, rtol=0)


def test_deep_prompts_pass_a_norm_that_is_trained_along() -> None:
    """With `modules_to_save` the block's norm is a copy: prompts go through the copy, as tokens do."""
    base = build("vit")
    config = VPTConfig(deep=True, prompt_length=4, modules_to_save=["layernorm_before"], readout="mean")
    model = get_prompt_pool_model(base, config)
    model.begin_task([0, 1])
    oracle = build("vit")
    with torch.no_grad():
        model.adapter.pool.prompts.copy_(draw(3, 4, 32, seed=1))
        for i in range(3):
            for name in ("weight", "bias"):
                change = draw(32, seed=i)
                getattr(oracle.layers[i].layernorm_before, name).add_(change)
                getattr(base.layers[i].layernorm_before.modules_to_save["default"], name).add_(change)
    insert_in_blocks(oracle, dict(enumerate(model.adapter.pool.prompts.detach())))
    with last_hidden(base) as ours, last_hidden(oracle) as theirs, torch.no_grad():
        model.eval()(**inputs("vit"))
        oracle(**inputs("vit"))
    assert_close(ours[-1], theirs[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "classifier"), [(name, False) for name in BARE] + [(name, True) for name in CLASSIFIERS], ids=str
)
def test_attention_norm_is_what_the_attention_reads(name: str, classifier: bool) -> None:
    model = build(name, classifier=classifier)
    structure = find_structure(model)
    found: list[Tensor] = []
    read: list[Tensor] = []
    for block_name, attention_name in zip(structure.blocks, structure.attentions, strict=True):
        block, attention = model.get_submodule(block_name), model.get_submodule(attention_name)
        norm = block.get_submodule(attention_norm(block, attention))
        norm.register_forward_hook(lambda m, args, output: found.append(output))
        attention.register_forward_pre_hook(
            lambda m, args, kwargs: read.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    with torch.no_grad():
        model(**inputs(name))
    assert len(found) == len(read) == 3
    assert all(a is b for a, b in zip(found, read, strict=True))


def test_a_base_in_half_precision() -> None:
    """Prompts are kept in float32 and go through the base's modules in its own type."""
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = prompted("vit", deep=True, readout="mean")
        model.get_base_model().to(dtype)
        loss = model(inputs("vit")["pixel_values"].to(dtype), labels=LABELS).loss
        loss.backward()
        assert model.adapter.pool.prompts.dtype == torch.float32
        assert (model.adapter.pool.prompts.grad.abs().sum(2) > 0).all()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], abs=0.05)


# ---- shallow -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["after_cls", "front"])
@pytest.mark.parametrize("add_position", [False, True])
def test_shallow_prompts_equal_a_longer_sequence(position: str, add_position: bool) -> None:
    """The blocks, one after the other, over a sequence that is put together here."""
    model, values = prompted("vit", position=position, add_cls_position_embedding=add_position), inputs("vit")
    output = model(**values, labels=LABELS)
    base = build("vit").requires_grad_(False)
    rows = model.adapter.pool.prompts.detach()[0].clone().requires_grad_()
    tokens = rows + base.embeddings.position_embeddings[0, 0] if add_position else rows
    hidden = base.embeddings(values["pixel_values"])
    cut = 1 if position == "after_cls" else 0
    hidden = torch.cat([hidden[:, :cut], tokens.expand(3, -1, -1), hidden[:, cut:]], 1)
    for block in base.layers:
        hidden = block(hidden)
    features = base.layernorm(hidden[:, 0 if cut else 4])
    assert_close(output.features, features, atol=1e-5, rtol=0)
    head = model.adapter.head
    loss = F.cross_entropy(features @ head.weight.detach().T + head.bias.detach(), LABELS)
    assert_close(output.loss, loss, atol=1e-5, rtol=0)
    output.loss.backward()
    loss.backward()
    assert_close(model.adapter.pool.prompts.grad[0], rows.grad, atol=1e-6, rtol=1e-4)


def test_the_classifier_may_read_the_prompts() -> None:
    model = prompted("vit", readout="prompt")
    before = model(**inputs("vit"), labels=LABELS).features
    assert before.shape == (3, 32)
    assert not torch.allclose(before, prompted("vit")(**inputs("vit"), labels=LABELS).features, atol=1e-2)


# ---- the pool ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
def test_one_prompt_for_all_tasks(deep: bool) -> None:
    """No query pass, nothing chosen; every task trains the same tensor; without tasks too."""
    model = prompted("vit", deep=deep)
    assert not model.base_model.needs_query
    assert model.adapter.pool.prompt_table().shape == (3 if deep else 1, 1, 4, 32)
    prompts = model.adapter.pool.prompts
    model.end_task()
    model.begin_task([5, 7])
    assert model.adapter.pool.prompts is prompts
    output = model(**inputs("vit"), labels=LABELS * 2 + 5)
    assert output.prompt_ids is output.prompt_weights is output.scores is output.query is None
    assert set(output.losses) == {"cross_entropy"}

    config = PromptPoolConfig(method="vpt", deep=deep, num_labels=2, class_mask="none")
    free = get_prompt_pool_model(build("vit"), config).train()
    free(**inputs("vit"), labels=LABELS).loss.backward()
    assert (free.adapter.pool.prompts.grad.abs().sum(2) > 0).all()


def test_how_prompts_start() -> None:
    """The released range is that of Xavier for as many pixels as dimensions: sqrt(6 / (D + D))."""
    torch.manual_seed(0)
    wide = get_prompt_pool_model(build("vit"), VPTConfig(prompt_length=500)).adapter.pool.prompts
    assert 0.99 * math.sqrt(6 / 64) < wide.abs().max() <= math.sqrt(6 / 64)
    assert wide.std().item() == pytest.approx(math.sqrt(6 / 64) / math.sqrt(3), rel=0.02)
    plain = get_prompt_pool_model(build("vit"), VPTConfig(prompt_length=500, prompt_init="normal")).adapter.pool.prompts
    assert plain.std().item() == pytest.approx(0.02, rel=0.05)
