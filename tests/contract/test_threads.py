"""One model, many callers: threads, models that share a base, and passes inside passes get the answers they get alone."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from PIL import Image
from support.families import build, inputs, with_noise
from support.methods import METHODS
from torch import Tensor, nn
from transformers import ViTImageProcessor

from cl_prompts import HashPromptConfig, L2PConfig, PromptPoolModel, PromptPoolPipeline, get_prompt_pool_model


pytestmark = pytest.mark.by_turns(7)


THREADS = 4
CALLS = 200  # of each method and family in the slow test; the unit suite makes fewer
FAMILIES = ["vit", "dinov2", "clip", "siglip"]


def learnt(
    method: str, family: str = "vit", base: nn.Module | None = None, seed: int = 1, **fields: Any
) -> PromptPoolModel:
    """A model that knows two tasks, with parameters that have moved from their start."""
    base = build(family) if base is None else base
    torch.manual_seed(seed)
    model = get_prompt_pool_model(base, METHODS[method]())
    for classes in ([0, 1], [2, 3]):
        model.begin_task(classes)
        model.end_task()
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


def questions(family: str, count: int = 8) -> list[dict[str, Tensor]]:
    """Batches of different sizes."""
    return [with_noise(family, inputs(family, 1 + number % 3, seed=number)) for number in range(count)]


def check_answers_from_threads(ask: Callable[[Any], Tensor], batches: list[Any], calls: int = 48) -> None:
    """Ask from several threads at once and compare each answer with the one that was given alone."""
    with torch.no_grad():
        alone = [ask(batch) for batch in batches]

    def call(number: int) -> int:
        with torch.no_grad():
            found = ask(batches[number % len(batches)])
        return int(not torch.equal(found, alone[number % len(batches)]))

    with ThreadPoolExecutor(THREADS) as threads:
        wrong = sum(threads.map(call, range(calls)))
    assert wrong == 0, f"{wrong} of {calls} answers differ"


@pytest.mark.by_turns(29, always=("l2p",))
@pytest.mark.parametrize(
    ("method", "family"),
    [(method, "vit") for method in METHODS] + [(m, family) for m in ("l2p", "hash", "coda") for family in FAMILIES[1:]],
)
def test_threads_share_one_model(method: str, family: str) -> None:
    model = learnt(method, family)
    check_answers_from_threads(lambda batch: model(**batch).logits, questions(family, 4))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_threads_share_one_model_for_long(method: str, family: str) -> None:
    model = learnt(method, family)
    check_answers_from_threads(lambda batch: model(**batch).logits, questions(family), CALLS)


def pipeline_of(method: str, family: str) -> Callable[[Any], Tensor]:
    """Scores of pictures, all classes in the order of their names."""
    pipe = PromptPoolPipeline(learnt(method, family), ViTImageProcessor(size={"height": 32, "width": 32}), batch_size=2)

    def ask(images: list[Image.Image]) -> Tensor:
        answers = pipe(images, top_k=None)
        return torch.tensor([[a["score"] for a in sorted(row, key=lambda a: a["label"])] for row in answers])

    return ask


def pictures(count: int) -> list[list[Image.Image]]:
    """Lists of one to three random pictures."""
    pixels = torch.randint(0, 256, (count, 3, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [[Image.fromarray(p.numpy()) for p in row[: 1 + number % 3]] for number, row in enumerate(pixels)]


@pytest.mark.by_turns(3, always=())
@pytest.mark.parametrize("method", ["l2p", "hash", "coda"])
def test_threads_share_one_pipeline(method: str) -> None:
    check_answers_from_threads(pipeline_of(method, "vit"), pictures(4))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_threads_share_one_pipeline_for_long(method: str, family: str) -> None:
    check_answers_from_threads(pipeline_of(method, family), pictures(8), CALLS)


def test_a_base_without_prompts_is_asked_beside_them() -> None:
    """Threads that ask the bare base, the adapter switched off by nobody, and features, beside prompted answers."""
    model, batches = learnt("coda"), questions("vit")
    base = model.get_base_model()
    kinds: list[Callable[[dict[str, Tensor]], Tensor]] = [
        lambda batch: model(**batch).logits,
        lambda batch: base(**batch).last_hidden_state,
        lambda batch: model.base_model.extract_features(**batch),
    ]
    jobs = [(kind, batch) for batch in batches for kind in kinds]
    check_answers_from_threads(lambda job: job[0](job[1]), jobs)


def test_threads_on_models_that_share_a_base() -> None:
    base = build("vit")
    models = [learnt(method, base=base, seed=seed) for seed, method in enumerate(["l2p", "coda", "hash", "none"])]
    jobs = [(model, batch) for batch in questions("vit", 4) for model in models]
    check_answers_from_threads(lambda job: job[0](**job[1]).logits, jobs)


@torch.no_grad()
@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize("first", ["l2p", "hash"])
def test_two_models_on_one_base_answer_by_turns(first: str, second: str) -> None:
    values = inputs("vit")
    alone = [learnt(first, seed=1)(**values).logits, learnt(second, seed=2)(**values).logits]
    base = build("vit")
    models = [learnt(first, base=base, seed=1), learnt(second, base=base, seed=2)]
    for _ in range(2):
        for model, expected in zip(models, alone, strict=True):
            assert torch.equal(model(**values).logits, expected)
    plain = build("vit").eval()(**values).last_hidden_state
    assert torch.equal(base(**values).last_hidden_state, plain)
    assert torch.equal(models[0].unload()(**values).last_hidden_state, plain)
    assert torch.equal(models[1](**values).logits, alone[1]), "the other model goes on"
    with pytest.raises(ValueError, match="the base of this model was unloaded"):
        models[0](**values)
    models[1].unload()
    assert not any(hooks for m in base.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))


@pytest.mark.by_turns(7, always=())
@torch.no_grad()
@pytest.mark.parametrize("inner", ["same model", "other model on the base", "bare base", "other base"])
@pytest.mark.parametrize("place", ["base", "block", "attention", "embeddings"])
@pytest.mark.parametrize("method", ["l2p", "hash", "coda"])
def test_a_forward_inside_a_forward(method: str, place: str, inner: str) -> None:
    """A hook of a user's own asks again, inside either pass, and each answer is the one that is given alone."""
    base, values, others = build("vit"), inputs("vit"), inputs("vit", 2, seed=5)
    model = learnt(method, base=base)
    second = learnt("l2p", base=base if inner == "other model on the base" else None, seed=4)
    asked: dict[str, Callable[[], Tensor]] = {
        "same model": lambda: model(**others).logits,
        "other model on the base": lambda: second(**others).logits,
        "bare base": lambda: base(**others).last_hidden_state,
        "other base": lambda: second(**others).logits,
    }
    expected, alone = model(**values).logits, asked[inner]()
    places = {"base": base, "block": base.layers[1], "attention": base.layers[2].attention, "embeddings": base.embeddings}
    found: list[Tensor] = []
    inside = False

    def ask_again(*_: Any) -> None:
        nonlocal inside
        if not inside:
            inside = True
            found.append(asked[inner]())
            inside = False

    handle = places[place].register_forward_hook(ask_again)
    outer = model(**values).logits
    handle.remove()
    assert torch.equal(outer, expected)
    assert found
    assert all(torch.equal(answer, alone) for answer in found)


@torch.no_grad()
def test_an_error_inside_a_pass_leaves_nothing_behind() -> None:
    model, values = learnt("l2p"), inputs("vit")
    base = model.get_base_model()
    expected, plain = model(**values).logits, base(**values).last_hidden_state
    for module in (base, base.embeddings, base.layers[0], base.layers[2], base.layers[1].attention):
        handle = module.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**values)
        handle.remove()
        assert torch.equal(base(**values).last_hidden_state, plain)
        assert torch.equal(model(**values).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_a_model_of_its_own(how: str) -> None:
    model, values = learnt("l2p"), inputs("vit")
    expected = model(**values).logits
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(**values).logits, expected)
    assert list(copied.base_model.backbone.users) == [copied.base_model]
    for parameter in copied.get_base_model().parameters():
        parameter.add_(1.0)
    assert not torch.equal(copied(**values).logits, expected)
    assert torch.equal(model(**values).logits, expected)
    copied.unload()
    assert torch.equal(model(**values).logits, expected)


def test_copies_of_base_modules_need_a_base_of_their_own() -> None:
    base = build("vit")
    first = get_prompt_pool_model(base, L2PConfig())
    with pytest.raises(ValueError, match=r"modules_to_save=\['layernorm'\]: this base belongs to several models"):
        get_prompt_pool_model(base, HashPromptConfig(layers=[0], modules_to_save=["layernorm"]))
    base = build("vit")
    second = get_prompt_pool_model(base, L2PConfig(modules_to_save=["layernorm"]))
    with pytest.raises(ValueError, match="this base belongs to several models"):
        get_prompt_pool_model(base, HashPromptConfig(layers=[0]))
    assert first is not second  # both are alive until here


def test_a_part_of_a_model_with_prompts_is_refused() -> None:
    base = build("vit", classifier=True)
    model = get_prompt_pool_model(base, L2PConfig())
    with pytest.raises(ValueError, match="already have prompts, as part of another model"):
        get_prompt_pool_model(base.vit, L2PConfig())
    assert model.get_base_model() is base
