"""How prompts start: inits, CODA-Prompt's Gram-Schmidt, real images."""

from typing import Any

import pytest
import torch
from support.families import build, inputs
from support.golden_harness import Case
from support.methods import METHODS
from support.tensors import draw
from torch import Tensor, nn
from torch.testing import assert_close

from cl_prompts import HashPromptConfig, L2PConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.methods.shared.initialization import gram_schmidt, initial


def new_model(family: str = "vit", config: Any = None) -> PromptPoolModel:
    base = build(family)
    torch.manual_seed(0)
    return get_prompt_pool_model(base, config or L2PConfig())


# ---- inits


@pytest.mark.parametrize(
    ("init", "low", "high", "std"),
    [
        ("uniform", -1, 1, 3**-0.5),
        ("unit_uniform", 0, 1, 12**-0.5),
        ("small_uniform", 0, 0.01, 0.01 * 12**-0.5),
        ("normal", -0.12, 0.12, 0.02),
        ("zeros", 0, 0, 0),
    ],
)
def test_inits(init: str, low: float, high: float, std: float) -> None:
    torch.manual_seed(0)
    values = initial(init, 50, 40, 10)
    assert isinstance(values, nn.Parameter)
    assert low <= values.min() <= values.max() <= high
    assert values.std().item() == pytest.approx(std, rel=0.02)


def test_each_layer_starts_from_the_one_below() -> None:
    torch.manual_seed(0)
    pool = new_model(config=HashPromptConfig(layers=[0, 1, 2], pool_size=50, prompt_init="lower_layer")).adapter.pool
    first, steps = pool.prompts[0], pool.prompts.diff(dim=0)
    assert first.abs().max() <= 1
    assert first.std().item() == pytest.approx(3**-0.5, rel=0.02)
    for step in steps:
        assert step.std().item() == pytest.approx(0.02, rel=0.02)
        assert step.abs().max() < 0.12
    assert abs((steps[0] * steps[1]).mean() / 0.02**2) < 0.05, "each layer has noise of its own"


# ---- Gram-Schmidt


@pytest.mark.parametrize("kind", ["e_prompt", "key", "attention"])
@pytest.mark.parametrize("name", ["coda_prompt_task0", "coda_prompt_task1", "coda_prompt_task2"])
def test_gram_schmidt_as_released(name: str, kind: str) -> None:
    """Components are flattened; earlier rows were trained and are neither of length 1 nor orthogonal any more."""
    case = Case.load(name)
    first, last = case.sizes["first_new_component"], case.sizes["components_in_use"]
    for layer in case.sizes["layers"]:
        raw = case.tensors[f"gram_schmidt_input/{kind}/layer{layer}"].flatten(1)
        rows = case.tensors[f"before/{kind}/layer{layer}"].flatten(1)
        assert_close(gram_schmidt(raw, rows[:first]), rows[first:last], atol=1e-6, rtol=0)


def test_gram_schmidt_of_more_rows_than_dimensions() -> None:
    raw = draw(9, 4)
    rows = gram_schmidt(raw, torch.zeros(2, 4))
    assert_close(rows.norm(dim=1), torch.ones(9))
    assert_close(rows[:4] @ rows[:4].T, torch.eye(4), atol=1e-6, rtol=0)
    assert_close(rows[4:], raw[4:] / raw[4:].norm(dim=1, keepdim=True), atol=1e-6, rtol=0)
    # the same when the rows come task by task, and when a row has nothing of its own
    assert_close(gram_schmidt(raw[6:], rows[:6]), rows[6:], atol=1e-6, rtol=0)
    assert_close(gram_schmidt(rows[:1] * 3, rows[:2]), rows[:1], atol=1e-6, rtol=0)


# ---- real images


def patches_of(family: str, values: dict[str, Tensor]) -> Tensor:
    """What the family's own embeddings make of the patches, without the tokens before them."""
    model = build(family)
    with torch.no_grad():
        embedded = model.embeddings(values["pixel_values"])
    return embedded[:, model_specials(model) :].flatten(0, 1)


def model_specials(model: Any) -> int:
    embeddings = model.embeddings
    tokens = [getattr(embeddings, name, None) for name in ("cls_token", "distillation_token", "register_tokens")]
    return sum(token.shape[1] for token in tokens if token is not None)


def rows_of(model: PromptPoolModel) -> dict[str, Tensor]:
    pool = model.adapter.pool
    named = {n: p for n, p in pool.named_parameters() if pool.roles[n] == "prompts" and n not in pool.no_rows}
    assert named
    return {name: p.detach().clone().reshape(-1, 32) for name, p in named.items()}


def members(rows: Tensor, patches: Tensor) -> Tensor:
    """Number of the patch that each row is."""
    same = (rows[:, None] == patches).all(2)
    assert same.any(1).all()
    return same.int().argmax(1)


@pytest.mark.parametrize("family", ["vit", "deit", "dinov3", "siglip"])
def test_prompts_start_as_patches_of_images(family: str) -> None:
    model, values = new_model(family), inputs(family, 3)
    keys = model.adapter.pool.keys.detach().clone()
    model.initialize_prompts(**values)
    rows, patches = rows_of(model)["prompts"], patches_of(family, values)
    assert len(patches) == 3 * 16
    assert len(set(members(rows, patches).tolist())) > 20, "drawn from all of them"
    assert torch.equal(model.adapter.pool.keys, keys)
    model.initialize_prompts(**values)
    assert torch.equal(rows_of(model)["prompts"], rows)
    model.initialize_prompts(**values, seed=1)
    assert not torch.equal(rows_of(model)["prompts"], rows)
    members(rows_of(model)["prompts"], patches)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("none", "apt")])
def test_every_methods_prompts(method: str) -> None:
    model, values = new_model(config=METHODS[method]()), inputs("vit", 2)
    model.begin_task([0, 1])
    model.end_task()
    model.begin_task([2, 3])
    frozen = {name: b.clone() for name, b in model.adapter.pool.named_buffers()}
    model.initialize_prompts(**values)
    for rows in rows_of(model).values():
        members(rows, patches_of("vit", values))
    for name, buffer in model.adapter.pool.named_buffers():
        assert torch.equal(buffer, frozen[name]), name


def test_padding_of_siglip2_is_no_patch() -> None:
    model, values = new_model("siglip2"), inputs("siglip2", 2)
    values["spatial_shapes"] = torch.tensor([[4, 4], [2, 3]])
    values["pixel_attention_mask"][1, 6:] = 0
    vectors = model.base_model.backbone.patch_embeddings(values.pop("pixel_values"), values)
    assert vectors.shape == (16 + 6, 32)


def test_bad_images_are_refused() -> None:
    model = new_model(config=METHODS["dualprompt"]())
    before = rows_of(model)
    with pytest.raises(ValueError, match=r"has 1 channels, the base takes 3"):
        model.initialize_prompts(torch.zeros(1, 1, 32, 32))
    assert all(torch.equal(rows, before[name]) for name, rows in rows_of(model).items())


def test_without_prompts_there_is_nothing_to_start() -> None:
    for method, message in (("none", 'method "none" has no prompts'), ("apt", "cannot start as patches of images")):
        with pytest.raises(ValueError, match=message):
            new_model(config=METHODS[method]()).initialize_prompts(**inputs("vit", 2))
