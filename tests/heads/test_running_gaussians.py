"""Running Gaussians of features, and the head's expected cross entropy on them."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.heads.running_gaussians import WINDOW, RunningGaussians


def head_and_gaussians(scale: float | None = None) -> tuple[IncrementalHead, RunningGaussians]:
    torch.manual_seed(0)
    head, gaussians = IncrementalHead(5, scale), RunningGaussians(5, save=False)
    head.expand([7, 8, 9], [7, 8, 9])
    gaussians.expand(3, [0, 1, 2])
    torch.nn.init.normal_(head.weight, std=0.5)
    return head, gaussians


@pytest.mark.parametrize("scale", [None, 4.0])
def test_moments_are_those_of_all_images(scale: float | None) -> None:
    """Far from the origin too; padding, NaN included, and classes of other tasks count nowhere."""
    head, gaussians = head_and_gaussians(scale)
    features = 100 + torch.randn(40, 5)
    targets = torch.arange(40) % 2
    for rows in torch.arange(40).split(7):
        batch = torch.cat([features[rows], torch.full((1, 5), torch.nan)])
        gaussians.update(head, batch, torch.cat([targets[rows], torch.tensor([-100])]))
    read = features if scale is None else F.normalize(features, dim=1)
    for index in (0, 1):
        own = read[targets == index].double()
        assert_close(gaussians.mean[index].double(), own.mean(0), rtol=1e-5, atol=1e-5)
        assert_close(gaussians.variance[index].double(), own.var(0, correction=0), rtol=1e-3, atol=1e-6)
    assert gaussians.count.tolist() == [20, 20, 0]
    gaussians.expand(4, [3])
    gaussians.update(head, features[:2], torch.tensor([0, 3]))
    assert gaussians.count.tolist() == [20, 20, 0, 1]


def test_old_images_count_less_than_a_window() -> None:
    head, gaussians = head_and_gaussians()
    for value in (0.0, 1.0):
        for _ in range(4):
            gaussians.update(head, torch.full((WINDOW, 5), value), torch.zeros(WINDOW, dtype=torch.int64))
    assert 0.9 < gaussians.mean[0, 0] < 1


@pytest.mark.parametrize("scale", [None, 4.0])
def test_the_loss_bounds_that_of_drawn_features(scale: float | None) -> None:
    head, gaussians = head_and_gaussians(scale)
    assert gaussians.cross_entropy(head).item() == 0
    gaussians.mean.normal_()
    gaussians.count += torch.tensor([3, 3, 0])
    weight = head.weight if scale is None else scale * F.normalize(head.weight, dim=1)

    def drawn() -> float:
        noise = torch.randn(20000, 5, generator=torch.Generator().manual_seed(1))
        terms = []
        for index in (0, 1):
            logits = F.linear(gaussians.mean[index] + noise * gaussians.variance[index].sqrt(), weight, head.bias)[:, :2]
            terms.append(F.cross_entropy(logits, torch.full((20000,), index)))
        return (terms[0] + terms[1]).item() / 2

    assert gaussians.cross_entropy(head).item() == pytest.approx(drawn(), rel=1e-5)
    gaussians.variance.fill_(0.3)
    loss = gaussians.cross_entropy(head)
    assert drawn() < loss.item() < drawn() + 1
    loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad[:2].norm() > 0
    assert head.weight.grad[2].norm() == 0
