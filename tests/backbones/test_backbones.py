"""Prompts into every family: against an independent oracle, off equals base, compiled and checkpointed."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import transformers as T
from support.families import BARE, CLASSIFIERS, SIZES, build, inputs, tensors_of, with_noise
from support.methods import METHODS
from support.oracles import random_prefixes, record_block_inputs, run, token_extension
from torch import nn
from torch.testing import assert_close

from cl_prompts import HashPromptConfig, L2PConfig, get_prompt_pool_model
from cl_prompts.backbones.plan import PassPlan, PassRecord
from cl_prompts.backbones.prompted_backbone import PromptedBackbone
from cl_prompts.backbones.structure import cls_position_embedding, find_structure
from cl_prompts.interfaces import PrefixKV


pytestmark = pytest.mark.by_turns(3)


ALL = [(name, False) for name in BARE] + [(name, True) for name in CLASSIFIERS]
NAMES = [f"{name}{'-classifier' if c else ''}" for name, c in ALL]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "classifier"), ALL, ids=NAMES)
def test_prefixes_equal_the_token_extension(name: str, classifier: bool, attention: str) -> None:
    model, values = build(name, classifier=classifier, attention=attention).requires_grad_(False), inputs(name)
    backbone, prefixes = PromptedBackbone(model), random_prefixes(model, 3)
    plain = run(backbone, values)
    with token_extension(model, prefixes):
        expected = run(backbone, values)
    actual = run(backbone, values, prefixes=prefixes)
    assert_close(actual, expected, atol=1e-5, rtol=0)
    assert (actual - plain).abs().max() > 1e-3
    assert actual.shape == plain.shape

    actual.square().sum().backward()
    for prefix in prefixes.values():
        for part in (prefix.k, prefix.v):
            assert part.grad is not None
            assert (part.grad.flatten(2).abs().sum(2) > 0).all()
    assert torch.equal(run(backbone, values), plain)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_prefix_logit_bias_and_input_space(attention: str) -> None:
    """-inf on all of a prefix switches it off; rows in the input space go through the block's own projections."""
    model, values = build("beit_relative", attention=attention), inputs("beit_relative")
    backbone = PromptedBackbone(model)
    plain = run(backbone, values)
    for bias, same in ((float("-inf"), True), (0.0, False)):
        k, v = (p.detach() for p in (random_prefixes(model, 3)[0].k, random_prefixes(model, 3)[2].v))
        biased = run(backbone, values, prefixes={1: PrefixKV(k, v, logit_bias=torch.full((3, 4, 17, 5), bias))})
        assert torch.allclose(biased, plain, atol=1e-5) == same
    rows = torch.randn(3, 5, 32)
    through = run(backbone, values, prefixes={1: PrefixKV(rows, rows)})
    attention_module = model.get_submodule(find_structure(model).attentions[1])
    k, v = (p(rows).view(3, 5, 4, 8).transpose(1, 2) for p in (attention_module.k_proj, attention_module.v_proj))
    assert_close(through, run(backbone, values, prefixes={1: PrefixKV(k, v)}), atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "classifier"), ALL, ids=NAMES)
def test_tokens_equal_a_sequence_built_by_hand(name: str, classifier: bool, attention: str) -> None:
    """Tokens at any position are seen by every token, leave the sequence at the end, and get gradients."""
    model, values = build(name, classifier=classifier, attention=attention).requires_grad_(False), inputs(name)
    backbone = PromptedBackbone(model)
    structure = backbone.structure
    tokens = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
    plain = run(backbone, values)
    outputs = []
    for index in (0, int(structure.has_cls)):
        plan = PassPlan(PassRecord(), tokens=tokens, token_index=index)
        blocks = record_block_inputs(model, structure.blocks[0])
        with backbone.prompted(plan):
            model(**values)
        assert plan.record.hidden is not None
        assert plan.record.prompt_hidden is not None
        outputs.append((plan.record.hidden, plan.record.prompt_hidden))
        assert torch.equal(blocks[0][:, index : index + 4], tokens)
        assert plan.record.hidden.shape == plain.shape
    # Attention does not depend on the order of tokens.
    for here, there in zip(*outputs, strict=True):
        assert_close(here, there, atol=1e-5, rtol=0)
    assert (outputs[0][0] - plain).abs().max() > 1e-3
    outputs[0][0].square().sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad.abs().sum(2) > 0).all()


@pytest.mark.parametrize("config", [L2PConfig, lambda: HashPromptConfig(layers=[0, 2])], ids=["l2p", "hash"])
@pytest.mark.parametrize(("name", "classifier"), ALL, ids=NAMES)
def test_off_is_off(name: str, classifier: bool, config: Callable[[], Any]) -> None:
    """`disable_adapter()` gives the base's own output, bit for bit; a failed forward leaves nothing behind."""
    values = with_noise(name, inputs(name))
    # torch chooses other kernels where gradients are wanted, so the base is compared without, as users run it frozen.
    base = build(name, classifier=classifier).requires_grad_(False)
    with torch.no_grad():
        expected = tensors_of(base(**values))
    model = get_prompt_pool_model(build(name, classifier=classifier), config())
    model.begin_task([0, 1])
    model.eval()
    with torch.no_grad():
        model(**inputs(name))
        with pytest.raises(ValueError, match="no declared class"):
            model(**inputs(name), labels=torch.tensor([0, 1, 9]))
        with model.disable_adapter():
            actual = tensors_of(model(**values))
    assert len(actual) == len(expected) > 0
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    with torch.no_grad():
        unloaded = tensors_of(model.unload()(**values))
    assert all(torch.equal(a, e) for a, e in zip(unloaded, expected, strict=True))


COMPILED = [
    (method, name) for method in ("l2p", "hash") for name in ("vit", "beit_relative", "dinov2", "dinov3", "clip", "siglip")
]


# dynamo itself looks at the .grad of tensors it traces
@pytest.mark.by_turns(12, always=())
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(("method", "name"), COMPILED)
def test_compiled_backbone(method: str, name: str) -> None:
    """One full graph per pass; new prompts, a grown head and a new router compile nothing again."""
    torch._dynamo.reset()
    config = L2PConfig() if method == "l2p" else HashPromptConfig(layers=[0, 2], modulate="gradient")
    model = get_prompt_pool_model(build(name), config)
    compiled = get_prompt_pool_model(build(name), config)
    values = inputs(name)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled.compile_backbone(backend=counter, fullgraph=True, dynamic=False)
    graphs = []
    tasks = [[0, 1, 0], [5, 4, 5], [7, 7, 8]]
    if name == "vit":
        tasks += [[c, c + 1, c] for c in range(10, 24, 2)]
    for task, labels in enumerate(tasks):
        for m in (model, compiled):
            m.begin_task(sorted(set(labels)))
        compiled.load_state_dict(model.state_dict())
        losses = []
        for m in (model, compiled):
            m.train().zero_grad()
            loss = m(**values, labels=torch.tensor(labels)).loss
            loss.backward()
            losses.append(loss)
            m.end_task()
        assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
        for (n, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
            if p.requires_grad:
                assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=n, t=task: f"{n}, task {t}: {m}")
        graphs.append(counter.frame_count)
    assert graphs[0] <= 2
    assert graphs == [graphs[0]] * len(tasks)


@pytest.mark.by_turns(7)
@pytest.mark.parametrize(
    ("method", "name"), [*(("hash", name) for name in BARE), *(("l2p", n) for n in ("vit", "dinov3", "clip"))]
)
def test_checkpointing_gives_the_same_gradients(method: str, name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        config = L2PConfig() if method == "l2p" else HashPromptConfig(layers=[0, 2], modulate="gradient")
        model = get_prompt_pool_model(build(name), config)
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable()
        model.begin_task([0, 1])
        model.train()
        block = model.get_submodule("base_model.model." + model.base_model.structure.blocks[2])
        calls = count_calls(block)
        # two forwards before one backward: what is recomputed must find its own prompts
        loss = model(**inputs(name), labels=torch.tensor([0, 1, 1])).loss
        loss = loss + 2 * model(**inputs(name, seed=5), labels=torch.tensor([1, 0, 0])).loss
        before = len(calls)
        loss.backward()
        assert (len(calls) > before) == checkpointing
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name_, expected in gradients[0].items():
        assert_close(gradients[1][name_], expected, atol=1e-6, rtol=1e-4, msg=lambda m, n=name_: f"{n}: {m}")


def count_calls(block: nn.Module) -> list[int]:
    """Grows with every run of a block's first norm, recomputations included."""
    calls: list[int] = []
    norm = next(m for m in block.modules() if isinstance(m, nn.LayerNorm))
    norm.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (
            lambda: T.ResNetModel(T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])),
            "no list of transformer blocks",
        ),
        (lambda: T.PvtModel(T.PvtConfig(image_size=32)), "4 lists of blocks"),
        (lambda: T.Swin2SRModel(T.Swin2SRConfig(embed_dim=12, depths=[1, 1], num_heads=[2, 2])), "3 lists of blocks"),
        (lambda: T.Phi4MultimodalVisionModel(T.Phi4MultimodalVisionConfig(**SIZES)), "Attention is causal"),
        (lambda: T.Sapiens2Model(T.Sapiens2Config(**SIZES, num_key_value_heads_per_layer=[4, 2, 4])), "numbers of heads"),
        (lambda: T.Sam3ViTModel(T.Sam3ViTConfig(**SIZES)), "no norm follows"),
        (lambda: nn.Linear(3, 3), "no list of transformer blocks"),
    ],
    ids=["cnn", "hierarchy", "windows of one width", "causal", "heads", "norm", "linear"],
)
def test_unsupported_models_are_named(model: Callable[[], Any], why: str) -> None:
    base = model()
    with pytest.raises(TypeError, match=rf"{type(base).__name__} is not supported: .*{why}.*Supported are ViT, DeiT"):
        get_prompt_pool_model(base, L2PConfig())
    assert all(p.requires_grad for p in base.parameters()), "a refused model must stay as it was"


def test_a_detector_is_refused_by_a_trial() -> None:
    """Its structure is that of a plain transformer, but its tokens do not begin with those that are known."""
    base = T.YolosModel(T.YolosConfig(**SIZES | {"image_size": [32, 32]}))
    with pytest.raises(TypeError, match="YolosModel cannot run as a base: a trial with one image failed"):
        get_prompt_pool_model(base, L2PConfig())


@pytest.mark.parametrize(
    ("name", "special", "pooling", "position"),
    [
        ("vit", 1, "cls", True),
        ("deit", 2, "cls", True),
        ("ijepa", 0, "mean", False),
        ("beit", 1, "pooler", False),
        ("beit_shared", 1, "cls", False),
        ("dinov2_registers", 5, "cls", True),
        ("dinov3", 5, "cls", False),
        ("clip", 1, "cls", True),
        ("siglip", 0, "pooler", False),
        ("siglip2", 0, "pooler", False),
    ],
)
def test_structure(name: str, special: int, pooling: str, position: bool) -> None:
    model = build(name)
    structure = find_structure(model)
    assert (structure.special_tokens, structure.pooling) == (special, pooling)
    assert structure.shape.num_layers == 3
    assert (structure.shape.width, structure.shape.num_heads, structure.shape.head_dim) == (32, 4, 8)
    assert (cls_position_embedding(model, structure) is not None) == position


@pytest.mark.parametrize("name", ["vit", "clip", "siglip", "beit_relative", "dinov2", "dinov3"])
def test_query_is_the_models_own_feature(name: str) -> None:
    """CLS behind the final norm, or the model's pooled feature."""
    base = build(name)
    with torch.no_grad():
        own = base(**inputs(name))
    expected = own.pooler_output if name in ("clip", "siglip", "beit_relative") else own.last_hidden_state[:, 0]
    model = get_prompt_pool_model(base, L2PConfig())
    assert_close(model.extract_features(**inputs(name)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["dualprompt", "smope"])
def test_reentrant_checkpointing_of_prefixes_is_refused(method: str) -> None:
    """It would train prefixes on no gradient, and leave out the losses that come out of them, without a word."""
    model = get_prompt_pool_model(build("vit"), METHODS[method]())
    model.begin_task([0, 1])
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    values, labels = inputs("vit"), torch.tensor([0, 1, 1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")  # torch says so of every pass
        with pytest.raises(ValueError, match=r'no or wrong gradients: enable it with {"use_reentrant": False}'):
            model.train()(**values, labels=labels)
        with torch.no_grad():
            assert model(**values).logits.shape == (3, 2)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model(**values, labels=labels).loss.backward()
