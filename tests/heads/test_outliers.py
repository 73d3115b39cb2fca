"""Virtual outlier regularization: golden numbers of OVOR's released code, and the stage after a task's training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build
from support.golden_harness import Case
from support.methods import METHODS
from support.tensors import draw
from torch.nn import functional as F
from torch.testing import assert_close

from cl_prompts import L2PConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.heads.outliers import energy_loss, farthest, regularize_head, virtual_outliers


TASKS = [[4, 1], [0, 7]]


def head_of(case: Case) -> IncrementalHead:
    head = IncrementalHead(32)
    head.expand(range(10), case.about["task"]["current_classes"])
    with torch.no_grad():
        head.weight.copy_(case.tensors["before/head.weight"])
        head.bias.copy_(case.tensors["before/head.bias"])
    return head


def test_golden_loss_gradient_and_steps() -> None:
    case = Case.load("ovor")
    head, about, sizes = head_of(case), case.about["optimizer"], case.sizes
    features, targets, outliers = (case.tensors[f"ood/{name}"] for name in ("id_features", "id_labels", "outliers"))
    optimizer = torch.optim.Adam(head.parameters(), lr=about["lr"], betas=tuple(about["betas"]), eps=about["eps"])
    for step, wanted in enumerate(case.about["expected_scalars"]["ood/step_losses"]):
        logits, of_outliers = head(features), head(outliers)[:, head.current]
        energy = energy_loss(logits[:, head.current], of_outliers, sizes["thres_id"], sizes["thres_ood"])
        loss = F.cross_entropy(logits.masked_fill(~head.current, float("-inf")), targets) + sizes["lmda"] * energy
        optimizer.zero_grad()
        loss.backward()
        assert loss.item() == pytest.approx(wanted, abs=case.tolerance("step_losses", wanted))
        if not step:
            value = case.about["expected_scalars"]["ood/loss/energy"]
            assert sizes["lmda"] * energy.item() == pytest.approx(value, abs=case.tolerance("loss", value))
            case.close(-logits[:, head.current].logsumexp(1), "expected/ood/id_energy", "energies")
            for name, parameter in head.named_parameters():
                expected = case.tensors[f"expected/ood/grad/head.{name}"]
                assert_close(parameter.grad, expected, atol=case.tolerance("grad") * float(expected.abs().max()), rtol=0)
        optimizer.step()
    for name, parameter in head.named_parameters():
        case.close(parameter.detach(), f"expected/ood/after/head.{name}", "after")


def test_golden_selection() -> None:
    """As the paper describes it; and the released ranking on its own candidates, noise around zero."""
    case = Case.load("ovor")
    features, offsets, sizes = case.tensors["select/features"], case.tensors["select/offsets"], case.sizes
    index, count = F.normalize(features, dim=1), sizes["num_per_class"] * sizes["classes_in_selection"]
    edge = farthest(index, index, sizes["K"], sizes["select"])
    assert torch.equal(edge, case.tensors["expected/select/boundary_indices"])
    found = virtual_outliers(
        features, offsets, neighbors=sizes["K"], boundary=sizes["select"], spread=sizes["cov"], count=count
    )
    case.close(found, "expected/select/paper_outliers", "features")
    released = farthest((sizes["cov"] * offsets).repeat(sizes["select"], 1), index, sizes["K"], count) % len(offsets)
    assert torch.equal(released.unique(), case.tensors["expected/select/offset_indices"])


def test_few_features_and_few_candidates() -> None:
    found = virtual_outliers(draw(3, 5), draw(2, 5), neighbors=50, boundary=50, spread=0.1, count=40)
    assert found.shape == (6, 5)
    head = IncrementalHead(5)
    head.expand([0, 1], [0, 1])
    before = head.weight.detach().clone()
    regularize_head(head, draw(3, 5), torch.tensor([0, 1, 0]), epochs=2, draws=2)
    assert not torch.equal(head.weight, before)
    assert head.weight.requires_grad


def model_of(method: str, **fields: Any) -> PromptPoolModel:
    base = build("vit")
    torch.manual_seed(0)
    options = {"outlier_epochs": 2, "outlier_learning_rate": 0.02, "outlier_draws": 20, "outlier_neighbors": 3}
    return get_prompt_pool_model(base, METHODS[method](**options | fields))


@pytest.mark.parametrize("method", ["one_prompt", "l2p", "apt", "cpg"])
def test_a_stage_of_any_method(method: str, tmp_path: Path) -> None:
    """After the pass only rows of the task's classes have changed; a loaded adapter goes on."""
    model = model_of(method)
    for number, classes in enumerate(TASKS):
        model.begin_task(classes)
        images, labels = draw(6, 3, 32, 32, seed=number), torch.tensor(classes * 3)
        with pytest.raises(ValueError, match=r"call model.consolidate\("):
            model.end_task()
        before = model.head.weight.detach().clone()
        model.eval().consolidate([{"pixel_values": images, "labels": labels}])
        rows = 2 * number
        assert torch.equal(model.head.weight[:rows], before[:rows])
        assert (model.head.weight[rows:] - before[rows:]).abs().min(1).values.max() > 1e-4
        model.end_task()
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            wanted = model(images).logits
        model = PromptPoolModel.from_pretrained(build("vit"), tmp_path, is_trainable=True).eval()
        with torch.no_grad():
            assert torch.equal(model(images).logits, wanted)


def test_the_same_seed_gives_the_same_head() -> None:
    found = []
    for seed in (0, 0, 1):
        model = model_of("l2p", classifier_seed=seed)
        model.begin_task(TASKS[0])
        batch = {"pixel_values": draw(6, 3, 32, 32), "labels": torch.tensor(TASKS[0] * 3)}
        model.eval().consolidate([batch])
        found.append(model.head.weight.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"outlier_epochs": -1}, "outlier_epochs=-1 must be an integer"),
        ({"outlier_epochs": 1, "head": "ridge"}, "head='ridge' replaces it"),
        ({"outlier_epochs": 1, "alignment": "covariance"}, "alignment='covariance' replaces it"),
        ({"outlier_energies": [-1.0]}, r"outlier_energies=\[-1.0\] must be two numbers"),
        ({"outlier_energies": [-1.0, float("nan")]}, "must be two numbers"),
        ({"outlier_learning_rate": 0}, "outlier_learning_rate=0"),
        ({"outlier_neighbors": 0}, "outlier_neighbors=0"),
        ({"outlier_epochs": 1, "num_labels": 4, "class_mask": "none"}, "without tasks there is no time"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        L2PConfig(**fields)
