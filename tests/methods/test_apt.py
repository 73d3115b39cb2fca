"""APT: golden numbers beside those of tests/contract/test_golden.py, the average over tasks, models without a CLS token."""

from typing import Any

import pytest
import torch
from support.families import build, inputs
from support.golden_cases import APT
from support.golden_harness import Case
from support.tensors import draw
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from cl_prompts import APTConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.heads.incremental import IncrementalHead


TASKS = [[4, 1], [0, 7], [3, 5]]


def new_model(family: str = "vit", **fields: Any) -> PromptPoolModel:
    base = build(family)
    torch.manual_seed(0)
    return get_prompt_pool_model(base, APTConfig(**fields))


def test_golden_numbers_of_training_and_of_the_end_of_a_task() -> None:
    case = Case.load("apt")
    model = APT.build(case, test=False)
    images = case.tensors["pixel_values"]
    with torch.no_grad():
        model.eval()
        pool = model.adapter.pool
        pool.average.copy_(pool.prompts)  # training uses P
        trained = model.head(model(images).features)
        assert_close(trained, case.tensors["expected/train_logits"][:, model.classes], atol=1e-5, rtol=0)
        pool.average.copy_(case.tensors["fixed/global_prompt"])
        for part in APT.all_parts(case, model, lambda tensor: tensor):
            part.ours.copy_(case.tensors[f"after/{part.name}"][part.index])
        before = model(images).logits
        model.end_task()
        case.close(pool.average, "expected/global_prompt_after", "logits")
        after = model(images).logits
    assert torch.equal(before, after), "an open task answers as after its end"
    assert_close(after, case.tensors["expected/eval_logits_after"][:, model.classes], atol=1e-5, rtol=0)


def test_the_prompt_at_test_is_an_average_over_tasks() -> None:
    model = new_model(average=0.75, layers=[1])
    pool, wanted = model.adapter.pool, None
    for number, classes in enumerate(TASKS):
        model.begin_task(classes)
        with torch.no_grad():
            pool.prompts.copy_(draw(*pool.prompts.shape, seed=number))
        wanted = pool.prompts.detach().clone() if wanted is None else 0.75 * wanted + 0.25 * pool.prompts.detach()
        model.end_task()
        assert_close(pool.average, wanted, atol=1e-6, rtol=0)
        assert torch.equal(pool.prompts, draw(*pool.prompts.shape, seed=number)), "P goes on as it is"


def adding(own: Tensor) -> Any:
    return lambda module, args, rows: torch.cat([rows[:, :1] + own, rows[:, 1:]], 1)


def test_the_vectors_are_added_to_the_projections_of_cls() -> None:
    """Against hooks on the projections, which add them by hand."""
    model, images = new_model(layers=[0, 2]), inputs("vit", 3)["pixel_values"]
    model.begin_task(TASKS[0])
    pool, base = model.adapter.pool, model.get_base_model()
    with torch.no_grad():
        pool.prompts.copy_(draw(*pool.prompts.shape))
        answer = model.eval()(images).features
    for row, layer in enumerate((0, 2)):
        for column, name in enumerate(("k_proj", "v_proj")):
            getattr(base.layers[layer].attention, name).register_forward_hook(adding(pool.prompts[row, column].detach()))
    with torch.no_grad(), model.disable_adapter():
        wanted = base(images).last_hidden_state[:, 0]
    assert_close(answer, wanted, atol=1e-5, rtol=0)


def test_without_cls_they_are_a_token_of_their_own() -> None:
    model, images = new_model("siglip"), inputs("siglip", 2)["pixel_values"]
    model.begin_task(TASKS[0])
    output = model.train()(images, labels=torch.tensor(TASKS[0]))
    output.loss.backward()
    assert all(row.any() for row in model.adapter.pool.prompts.grad.flatten(0, 1))


def test_the_head_reads_a_layer_norm() -> None:
    head, features = IncrementalHead(6, 1.0, layer_norm=True), draw(4, 6)
    head.expand([0, 1, 2], [0, 1, 2])
    rows = head.weight / head.weight.norm(dim=1, keepdim=True)
    centered = features - features.mean(1, keepdim=True)
    wanted = centered / (features.var(1, correction=0, keepdim=True) + 1e-5).sqrt() @ rows.T
    assert_close(head(features), wanted, atol=1e-5, rtol=0)
    assert not torch.allclose(F.normalize(features, dim=1) @ rows.T, wanted, atol=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"average": 1.5}, "average=1.5 is a weight"), ({"diversity_weight": 0.1}, "apt has one prompt")],
)
def test_a_bad_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        APTConfig(**fields)
