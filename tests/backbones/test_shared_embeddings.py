"""The patch embedding runs once for both passes, and nothing changes by it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.families import BARE, inputs, with_noise
from support.methods import METHODS
from test_reuse import new_model

from cl_prompts import CodaPromptConfig, HashPromptConfig, L2PConfig
from cl_prompts.backbones import reuse


LABELS = torch.tensor([0, 1, 0])


def embeddings_of(model: Any) -> Any:
    return model.get_base_model().get_submodule(model.base_model.structure.inner).get_submodule("embeddings")


def runs(model: Any, act: Any) -> tuple[int, Any]:
    """How often patches are cut out, and what comes of it."""
    found: list[int] = []
    cut = next(m for m in embeddings_of(model).modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)))
    handle = cut.register_forward_hook(lambda *_: found.append(1))
    result = act()
    handle.remove()
    return len(found), result


@contextmanager
def embeddings_run_twice() -> Iterator[None]:
    """Passes that share no embeddings, for comparison."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reuse, "shares_embeddings", lambda model, structure: False)
        yield


@pytest.mark.by_turns(7)
@pytest.mark.parametrize("name", BARE)
@pytest.mark.parametrize("method", ["l2p", "coda"])
def test_the_numbers_are_bit_equal(method: str, name: str) -> None:
    model, values = new_model(name, METHODS[method]()), with_noise(name, inputs(name))

    def numbers() -> dict[str, Any]:
        learnt = model.train()(**values, labels=LABELS)
        learnt.loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found | {"logits": learnt.logits, "test": model.eval()(**values).logits}

    count, own = runs(model, numbers)
    assert count == 2, "one step and one answer"
    with embeddings_run_twice():
        count, plain = runs(model, numbers)
    assert count == 4
    assert own.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in own.items())


def test_where_each_pass_needs_its_own() -> None:
    """A gradient to the images, embeddings that are trained along, several candidates, a model that is compiled."""
    values = inputs("vit")
    model = new_model("vit", CodaPromptConfig(components_per_task=3, layers=[0, 1])).eval()
    images = values["pixel_values"].clone().requires_grad_()
    count, answer = runs(model, lambda: model(pixel_values=images))
    assert count == 2
    answer.logits.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    trained = new_model("vit", L2PConfig(top_k=2, modules_to_save=["projection"]))
    count, output = runs(trained.train(), lambda: trained(**values, labels=LABELS))
    output.loss.backward()
    grads = [p.grad for n, p in trained.named_parameters() if "projection.modules_to_save" in n]
    assert grads
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    config = HashPromptConfig(pool_size=6, top_k=2, layers=[0, 1], router_inference="confidence")
    many = new_model("vit", config)
    many.end_task()
    many.begin_task([2, 3])
    many.end_task()
    expected = many.eval()(**values).logits
    with embeddings_run_twice():
        assert torch.equal(many(**values).logits, expected)


def test_the_base_is_whole_afterwards_and_after_an_error() -> None:
    model, values = new_model("vit", CodaPromptConfig(components_per_task=3, layers=[0, 1])).eval(), inputs("vit")
    with model.disable_adapter():
        expected = model(**values).last_hidden_state
    model(**values)
    handle = model.get_base_model().layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**values)
    handle.remove()
    with model.disable_adapter():
        assert torch.equal(model(**values).last_hidden_state, expected)
    other = inputs("vit", seed=9)
    assert not torch.equal(model(**other).logits, model(**values).logits), "never those of other images"
