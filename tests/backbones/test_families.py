"""One row of the matrix for each further family: off is off, equal to an oracle, gradients, checkpointing."""

import copy

import pytest
import torch
from support.families import tensors_of
from support.further_families import FURTHER, build_further, further_inputs
from support.oracles import explicit_attention, random_prefixes, record_block_inputs, run, token_extension
from torch import Tensor
from torch.testing import assert_close

from cl_prompts import HashPromptConfig, get_prompt_pool_model
from cl_prompts.backbones.plan import PassPlan, PassRecord
from cl_prompts.backbones.prompted_backbone import PromptedBackbone
from cl_prompts.interfaces import PrefixKV


BATCH = 2
EXPLICIT = ("data2vec_relative", "sapiens2")  # a bias of fixed size, or a norm of the keys


@pytest.mark.by_turns(5)
@pytest.mark.parametrize("name", FURTHER)
def test_prompts_in_every_further_family(name: str) -> None:
    model, values = build_further(name).requires_grad_(False), further_inputs(name, BATCH)
    with torch.no_grad():
        own = tensors_of(model(**values))
    backbone = PromptedBackbone(model)
    plain = run(backbone, values)

    prefixes = random_prefixes(model, BATCH)
    oracle = explicit_attention if name in EXPLICIT else token_extension
    with oracle(model, prefixes):
        expected = run(backbone, values)
    actual = run(backbone, values, prefixes=prefixes)
    assert_close(actual, expected, atol=1e-5, rtol=0)
    assert (actual - plain).abs().max() > 1e-3
    actual.square().sum().backward()
    for prefix in prefixes.values():
        for part in (prefix.k, prefix.v):
            assert part.grad is not None
            assert (part.grad.flatten(2).abs().sum(2) > 0).all()

    tokens = torch.randn(BATCH, 4, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
    outputs = [outputs_with(backbone, values, tokens, index) for index in (0, int(backbone.structure.has_cls))]
    assert_close(*outputs, atol=1e-5, rtol=0)  # attention does not depend on the order of tokens
    assert outputs[0].shape == plain.shape
    assert (outputs[0] - plain).abs().max() > 1e-3
    outputs[0].square().sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad.abs().sum(2) > 0).all()

    with torch.no_grad():
        assert all(torch.equal(a, e) for a, e in zip(tensors_of(model(**values)), own, strict=True))
    assert len(own) > 0


def outputs_with(backbone: PromptedBackbone, values: dict[str, Tensor], tokens: Tensor, index: int) -> Tensor:
    blocks = record_block_inputs(backbone.model, backbone.structure.blocks[0])
    plan = PassPlan(PassRecord(), tokens=tokens, token_index=index)
    with backbone.prompted(plan):
        backbone.model(**values)
    assert torch.equal(blocks[0][:, index : index + tokens.shape[1]], tokens)
    assert plan.record.hidden is not None
    return plan.record.hidden


@pytest.mark.by_turns(5)
@pytest.mark.parametrize("name", FURTHER)
def test_a_further_family_trains_with_checkpointing_and_is_given_back(name: str) -> None:
    base = build_further(name).requires_grad_(False)
    values, labels = further_inputs(name, BATCH), torch.tensor([0, 1])
    with torch.no_grad():
        expected = tensors_of(base(**values))
    gradients = []
    for checkpointing in (False, True) if base.supports_gradient_checkpointing else (False, False):
        torch.manual_seed(1)
        model = get_prompt_pool_model(copy.deepcopy(base), HashPromptConfig(layers=[0, 2], modulate="gradient"))
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable()
        model.begin_task([0, 1])
        model.train()(**values, labels=labels).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for parameter, gradient in gradients[0].items():
        assert_close(gradients[1][parameter], gradient, atol=1e-6, rtol=1e-4)
    model.eval()
    with torch.no_grad():
        with model.disable_adapter():
            off = tensors_of(model(**values))
        given_back = tensors_of(model.unload()(**values))
    for found in (off, given_back):
        assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["blip", "flava", "data2vec"])
def test_a_bias_and_what_is_added_to_cls_reach_attention_that_is_not_registered(name: str) -> None:
    """-inf on all of a prefix switches it off, in products as in `scaled_dot_product_attention`."""
    model, values = build_further(name).requires_grad_(False), further_inputs(name, BATCH)
    backbone = PromptedBackbone(model)
    plain = run(backbone, values)
    k, v = (part.detach() for part in (random_prefixes(model, BATCH)[0].k, random_prefixes(model, BATCH)[2].v))
    for bias, same in ((float("-inf"), True), (0.0, False)):
        logit_bias = torch.full((BATCH, 4, 17, 5), bias)
        biased = run(backbone, values, prefixes={1: PrefixKV(k, v, logit_bias=logit_bias)})
        assert torch.allclose(biased, plain, atol=1e-5) == same
    added = torch.randn(BATCH, 4, 1, 8)
    off = {"k": k, "v": v, "logit_bias": torch.full((BATCH, 4, 17, 5), float("-inf"))}
    for part in ("cls_k", "cls_v"):
        assert not torch.allclose(run(backbone, values, prefixes={1: PrefixKV(**off, **{part: added})}), plain, atol=1e-3)
