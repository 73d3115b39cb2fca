"""Models with timm's layout, and timm's own where it can be imported, as bases."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from support.families import inputs, randomized, tensors_of
from support.oracles import explicit_attention, random_prefixes, run
from support.timm_layout import KINDS, build_bare, build_layout, converted
from torch import Tensor, nn
from torch.testing import assert_close

from cl_prompts import HashPromptConfig, L2PConfig, get_prompt_pool_model
from cl_prompts.backbones.prompted_backbone import PromptedBackbone
from cl_prompts.backbones.structure import cls_position_embedding, expected_image, find_structure
from cl_prompts.backbones.timm_models import wrapped_if_bare
from cl_prompts.interfaces import PrefixKV


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
TIMM = {
    "vit": "vit_tiny_patch16_224",
    "deit": "deit_tiny_patch16_224",
    "deit, distilled": "deit_tiny_distilled_patch16_224",
    "deit3": "deit3_small_patch16_224",
    "registers": "vit_small_patch14_reg4_dinov2",
    "registers, no CLS": "vit_medium_patch16_reg4_gap_256",
    "beit": "beit_base_patch16_224",
    "clip": "vit_base_patch16_clip_224",
    "siglip": "vit_base_patch16_siglip_224",
    "eva02": "eva02_tiny_patch14_224",
    "dinov3": "vit_small_patch16_dinov3",
}


NO_TIMM = "timm cannot be imported, for example without torchvision"


def wrapped(name: str, kind: str) -> Any:
    pytest.importorskip("timm", reason=NO_TIMM, exc_type=ImportError)
    torch.manual_seed(0)
    return randomized(getattr(T, kind)(T.TimmWrapperConfig(architecture=TIMM[name], model_args=SMALL, num_labels=5)))


def bare(name: str, num_classes: int = 0) -> Any:
    """A model of timm or, for the name of a layout, ours."""
    if name in KINDS:
        return build_bare(name, num_classes)
    timm = pytest.importorskip("timm", reason=NO_TIMM, exc_type=ImportError)
    torch.manual_seed(0)
    return randomized(timm.create_model(TIMM[name], num_classes=num_classes, **SMALL))


BASES: dict[str, Callable[[], Any]] = {f"layout: {kind}": lambda kind=kind: build_layout(kind) for kind in KINDS}
BASES |= {f"bare: {name}": lambda name=name: wrapped_if_bare(bare(name)) for name in (*KINDS[:3], *TIMM)}
for kind in ("TimmWrapperModel", "TimmWrapperForImageClassification"):
    BASES |= {f"{kind}: {name}": lambda name=name, kind=kind: wrapped(name, kind) for name in TIMM}


def backbone_of_timm() -> Any:
    pytest.importorskip("timm", reason=NO_TIMM, exc_type=ImportError)
    torch.manual_seed(0)
    return randomized(T.TimmBackbone(T.TimmBackboneConfig(backbone=TIMM["vit"], out_indices=[-1]), **SMALL))


BASES["TimmBackbone: vit"] = backbone_of_timm


@pytest.mark.parametrize("name", BASES)
def test_prompts_in_models_of_timm(name: str) -> None:
    model, values = BASES[name]().requires_grad_(False), inputs("vit", 2)
    with torch.no_grad():
        own = tensors_of(model(**values))
    backbone, prefixes = PromptedBackbone(model), random_prefixes(model, 2)
    plain = run(backbone, values)
    with explicit_attention(model, prefixes):
        expected = run(backbone, values)
    actual = run(backbone, values, prefixes=prefixes)
    assert_close(actual, expected, atol=1e-5, rtol=0)
    assert (actual - plain).abs().max() > 1e-3
    actual.square().sum().backward()
    assert all((p.grad.flatten(2).abs().sum(2) > 0).all() for kv in prefixes.values() for p in (kv.k, kv.v))

    tokens = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
    places = (0, int(backbone.structure.has_cls))
    outputs = [run(backbone, values, tokens=tokens, token_index=place) for place in places]
    assert_close(*outputs, atol=1e-5, rtol=0)
    assert (outputs[0] - plain).abs().max() > 1e-3
    outputs[0].square().sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad.abs().sum(2) > 0).all()
    with torch.no_grad():
        assert all(torch.equal(a, e) for a, e in zip(tensors_of(model(**values)), own, strict=True))


@pytest.mark.parametrize("name", BASES)
def test_models_of_timm_train_and_are_given_back(name: str) -> None:
    base, values = BASES[name]().requires_grad_(False), inputs("vit", 2)
    with torch.no_grad():
        expected = tensors_of(base(**values))
    for config in (L2PConfig(), HashPromptConfig(layers=[0, 2], modulate="gradient")):
        model = get_prompt_pool_model(base, config)
        model.begin_task([0, 1])
        model.train()(**values, labels=torch.tensor([0, 1])).loss.backward()
        assert all(p.grad is not None for n, p in model.adapter.named_parameters() if n.endswith("prompts"))
        with torch.no_grad(), model.eval().disable_adapter():
            off = tensors_of(model(**values))
        model.unload()
        with torch.no_grad():
            given_back = tensors_of(base(**values))
        for found in (off, given_back):
            assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


def hidden(model: Any, **planned: Any) -> Tensor:
    return run(PromptedBackbone(model), inputs("vit", 2), **planned)


@torch.no_grad()
def test_a_model_of_timm_equals_the_converted_one() -> None:
    for build in (lambda: build_layout("plain"), lambda: build_layout("plain", seed=1)):
        model = build()
        vit = converted(model)
        tokens, prefixes = torch.randn(2, 4, 32), random_prefixes(vit, 2)
        for planned in ({}, {"tokens": tokens, "token_index": 1}, {"prefixes": prefixes}):
            assert_close(hidden(build(), **planned), hidden(converted(model), **planned), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "special", "pooling", "position"),
    [
        ("plain", 1, "cls", True),
        ("registers", 5, "cls", True),
        ("gap", 0, "pooler", False),
        ("attention pooling", 0, "pooler", False),
        ("relative", 1, "cls", True),
        ("rotary", 1, "cls", True),
    ],
)
def test_structure_of_the_layout(kind: str, special: int, pooling: str, position: bool) -> None:
    model = build_layout(kind)
    structure = find_structure(model)
    assert (structure.inner, structure.special_tokens, structure.pooling) == ("timm_model", special, pooling)
    assert (cls_position_embedding(model, structure) is not None) == position
    assert expected_image(model, structure) == (3, (32, 32))
    own = model(**inputs("vit", 2)).pooler_output
    assert_close(get_prompt_pool_model(model, L2PConfig()).extract_features(**inputs("vit", 2)), own, atol=1e-6, rtol=0)


def test_rows_in_the_input_space_pass_biases_that_are_apart() -> None:
    model = build_layout("relative")
    attention = model.timm_model.blocks[1].attn
    rows = torch.randn(2, 5, 32)
    weight = attention.qkv.weight.chunk(3)
    k, v = rows @ weight[1].T, rows @ weight[2].T + attention.v_bias
    heads = PrefixKV(*(x.unflatten(2, (4, 8)).transpose(1, 2) for x in (k, v)))
    backbone = PromptedBackbone(model)
    values = inputs("vit", 2)
    through = run(backbone, values, prefixes={1: PrefixKV(rows, rows)})
    assert_close(through, run(backbone, values, prefixes={1: heads}), atol=1e-5, rtol=0)


def test_blocks_behind_the_list_are_refused() -> None:
    """CaiT has a list of blocks with a class token behind its list of blocks without one."""
    model = build_layout("plain")
    inner = model.timm_model
    for name in ("norm", "fc_norm", "head"):
        part = getattr(inner, name)
        delattr(inner, name)
        if name == "norm":
            inner.blocks_token_only = nn.ModuleList([nn.Linear(32, 32)])
        setattr(inner, name, part)
    with pytest.raises(TypeError, match="`blocks_token_only` comes between its blocks and its norm"):
        get_prompt_pool_model(model, L2PConfig())


def test_checkpointing_of_timm_is_refused_by_name() -> None:
    model = get_prompt_pool_model(build_layout("plain"), L2PConfig())
    model.begin_task([0, 1])
    model.get_base_model().timm_model.grad_checkpointing = True
    with pytest.raises(ValueError, match=r"timm's gradient checkpointing .* gradient_checkpointing_disable"):
        model.train()(**inputs("vit", 2), labels=torch.tensor([0, 1]))
