"""Prompts in attention that runs in windows, against visual prompt tuning of Swin written out in plain torch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.families import tensors_of
from support.further_families import WINDOWED, build_further, windowed
from support.oracles import run
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from cl_prompts import HashPromptConfig, L2PConfig, VPTNSP2Config, get_prompt_pool_model
from cl_prompts.backbones.plan import PassPlan, PassRecord
from cl_prompts.backbones.prompted_backbone import PromptedBackbone
from cl_prompts.backbones.structure import find_structure
from cl_prompts.interfaces import PrefixKV


WIDTH, HEADS, BATCH, ROWS, TOKENS = 32, 4, 2, 5, 4
VALUES = {"pixel_values": torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def build(family: str) -> Any:
    return build_further(family).requires_grad_(False)


def windows_of(x: Tensor, side: int) -> Tensor:
    """[B, H, W, D] -> [B, windows, side * side, D]."""
    x = x.unfold(1, side, side).unfold(2, side, side)  # [B, rows, columns, D, side, side]
    return x.permute(0, 1, 2, 4, 5, 3).flatten(3, 4).flatten(1, 2)


def image_of(x: Tensor, side: int, height: int) -> Tensor:
    rows = height // side
    x = x.unflatten(2, (side, side)).unflatten(1, (rows, -1))  # [B, rows, columns, side, side, D]
    return x.permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2, 3)


def block_by_hand(block: Any, x: Tensor, tokens: Tensor, prefix: PrefixKV | None) -> tuple[Tensor, Tensor]:
    """A block over x [B, 16, D] and prompt tokens [B, P, D], after Jia et al.'s code for Swin."""
    nested = hasattr(block.attention, "self")
    attention = block.attention.self if nested else block.attention
    second = hasattr(attention, "logit_scale")
    names = ("query", "key", "value") if nested else ("q_proj", "k_proj", "v_proj")
    side, shift, length = block.window_size, block.shift_size, tokens.shape[1]
    grid = 4 + -4 % side
    inside, beside = (x, tokens) if second else (block.layernorm_before(x), block.layernorm_before(tokens))
    inside = F.pad(inside.unflatten(1, (4, 4)), (0, 0, 0, grid - 4, 0, grid - 4)).roll((-shift, -shift), (1, 2))
    cut = windows_of(inside, side)
    every = torch.cat([beside[:, None].expand(-1, cut.shape[1], -1, -1), cut], 2)  # [B, windows, P + n, D]
    q, k, v = (getattr(attention, name)(every).unflatten(-1, (HEADS, -1)).transpose(2, 3) for name in names)
    rows = 0
    if prefix is not None:
        rows = prefix.k.shape[2]
        every_window = (-1, cut.shape[1], -1, -1, -1)
        k, v = (torch.cat([p[:, None].expand(every_window), own], 3) for p, own in ((prefix.k, k), (prefix.v, v)))
    if second:
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * attention.logit_scale.clamp(max=4.6052).exp()
        table = attention.continuous_position_bias_mlp(attention.relative_coords_table).view(-1, HEADS)
        table = 16 * table.sigmoid()
    else:
        logits = q @ k.mT / q.shape[-1] ** 0.5
        attention = attention if nested else attention.relative_position_bias
        table = attention.relative_position_bias_table
    bias = table[attention.relative_position_index.view(-1)].view(side**2, side**2, HEADS).permute(2, 0, 1)
    logits[..., length:, rows + length :] += bias
    if shift:  # tokens that were not neighbors before the shift; transformers adds the mask of Swin v2 twice
        region = torch.zeros(1, grid, grid, 1)
        for i, down in enumerate((slice(0, -side), slice(-side, -shift), slice(-shift, None))):
            for j, right in enumerate((slice(0, -side), slice(-side, -shift), slice(-shift, None))):
                region[:, down, right] = 3 * i + j
        number = windows_of(region, side)[0, :, :, 0]
        apart = (number[:, None] != number[:, :, None])[None, :, None]
        logits[..., length:, rows + length :] += apart * -(200.0 if second else 100.0)
    out = (logits.softmax(-1) @ v).transpose(2, 3).flatten(3)
    out = (block.attention.output.dense if nested else block.attention.o_proj)(out)
    tokens_out, cut = out[:, :, :length].mean(1), out[:, :, length:]
    inside = image_of(cut, side, grid).roll((shift, shift), (1, 2))[:, :4, :4].flatten(1, 2)
    ends = []
    for residual, change in ((x, inside), (tokens, tokens_out)):
        if second:
            y = residual + block.layernorm_before(change)
            ends.append(y + block.layernorm_after(block.output(block.intermediate(y))))
        else:
            y = residual + change
            inside = block.layernorm_after(y)
            ends.append(y + (block.output(block.intermediate(inside)) if nested else block.mlp(inside)))
    return ends[0], ends[1]


def stage_by_hand(model: Any, tokens: Tensor, prefixes: dict[int, PrefixKV]) -> tuple[Tensor, Tensor]:
    """Output of the last stage for patches and prompt tokens."""
    stage, seen = model.encoder.layers[-1], []
    handle = stage.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**VALUES)
    handle.remove()
    x = seen[0]
    for layer, block in enumerate(stage.blocks):
        x, tokens = block_by_hand(block, x, tokens, prefixes.get(layer))
    return x, tokens


def random_prompts() -> tuple[Tensor, dict[int, PrefixKV]]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randn(BATCH, TOKENS, WIDTH, generator=generator).requires_grad_()
    parts = torch.randn(2, 2, BATCH, HEADS, ROWS, WIDTH // HEADS, generator=generator)
    return tokens, {layer: PrefixKV(*(p.requires_grad_() for p in own)) for layer, own in zip((0, 1), parts, strict=True)}


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("given", ["prefixes", "tokens", "both"])
def test_windows_equal_visual_prompt_tuning_by_hand(family: str, given: str) -> None:
    model = build(family)
    tokens, prefixes = random_prompts()
    with torch.no_grad():
        own = tensors_of(model(**VALUES))
    expected = stage_by_hand(model, tokens if given != "prefixes" else tokens[:, :0], prefixes if given != "tokens" else {})
    backbone = PromptedBackbone(model)
    assert backbone.structure.shape.num_layers == 3
    assert backbone.structure.shape.width == WIDTH
    plain = run(backbone, VALUES)
    plan = PassPlan(
        PassRecord(),
        tokens=None if given == "prefixes" else tokens,
        prefixes={} if given == "tokens" else prefixes,
    )
    with backbone.prompted(plan):
        model(**VALUES)
    found = plan.record.hidden
    assert found is not None
    assert_close(found, expected[0], atol=1e-5, rtol=1e-5)
    assert (found - plain).abs().max() > 1e-3
    total = found.square().sum()
    if given != "prefixes":
        assert plan.record.prompt_hidden is not None
        assert_close(plan.record.prompt_hidden, expected[1], atol=1e-5, rtol=1e-5)
        total = total + plan.record.prompt_hidden.square().sum()
    learned = [*([tokens] if given != "prefixes" else []), *(p for q in plan.prefixes.values() for p in (q.k, q.v))]
    for gradient in torch.autograd.grad(total, learned):
        assert (gradient.flatten(2).abs().sum(-1) > 0).all()
    with torch.no_grad():
        assert all(torch.equal(a, e) for a, e in zip(tensors_of(model(**VALUES)), own, strict=True))


@pytest.mark.parametrize("family", WINDOWED)
def test_functions_of_queries_see_whole_images(family: str) -> None:
    """A bias of -inf that a prefix computes from the queries switches it off in every window."""
    backbone = PromptedBackbone(build(family))
    k, v = (part.detach() for part in (random_prompts()[1][1].k, random_prompts()[1][1].v))
    plain, sizes = run(backbone, VALUES), []

    def switched_off(block_input: Tensor, queries: Tensor) -> PrefixKV:
        sizes.append((block_input.shape, queries.shape))
        return PrefixKV(k, v, logit_bias=torch.full((*queries.shape[:3], ROWS), float("-inf")))

    assert_close(run(backbone, VALUES, prefixes={1: switched_off}), plain, atol=1e-5, rtol=1e-5)
    assert sizes == [((BATCH, 16, WIDTH), (BATCH, HEADS, 36, WIDTH // HEADS))]


CONFIGS: dict[str, Callable[[], Any]] = {
    "hash": lambda: HashPromptConfig(layers=[0, 2], modulate="gradient"),
    "l2p": lambda: L2PConfig(pool_size=4, top_k=2),
}


@pytest.mark.by_turns(3)
@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("method", CONFIGS)
def test_windows_train_with_checkpointing_and_the_base_is_given_back(family: str, method: str) -> None:
    base = build(family)
    with torch.no_grad():
        expected = tensors_of(base(**VALUES))
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = get_prompt_pool_model(copy.deepcopy(base), CONFIGS[method]())
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable()
        model.begin_task([0, 1])
        model.train()(**VALUES, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0].values())
    for parameter, gradient in gradients[0].items():
        assert_close(gradients[1][parameter], gradient, atol=1e-6, rtol=1e-4)
    model.eval()
    with torch.no_grad():
        together = model(**VALUES).logits
        apart = [model(pixel_values=image[None]).logits for image in VALUES["pixel_values"]]
        assert_close(torch.cat(apart), together, atol=1e-5, rtol=1e-5)
        with model.disable_adapter():
            off = tensors_of(model(**VALUES))
        given_back = tensors_of(model.unload()(**VALUES))
    for found in (off, given_back):
        assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


def test_stages_of_one_block_are_stages() -> None:
    structure = find_structure(windowed("swin", depths=[1, 1]))
    assert structure.blocks == ("encoder.layers.1.blocks.0",)


def test_what_windows_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the base has 3 blocks in its last stage, which takes prompts, 0 to 2"):
        get_prompt_pool_model(build("swin"), HashPromptConfig(layers=[0, 3]))
    with pytest.raises(ValueError, match=r"\"vpt_nsp2\" needs the attention of whole images; this base attends in windows"):
        get_prompt_pool_model(build("swin"), VPTNSP2Config())
