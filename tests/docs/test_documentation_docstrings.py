"""No public name without a docstring that tells arguments, shapes, errors and source; the API reference has all of them."""

import ast
from typing import Any

import pytest
import torch
from support.documentation_audit import exported, found, gaps, names_paper, shown
from support.paths import ROOT
from torch import Tensor

from cl_prompts.baselines import BASELINES
from cl_prompts.continual import GaussianStream
from cl_prompts.heads import AlignedClassifier, DiscriminantClassifier, RidgeClassifier, align, fit_map
from cl_prompts.methods import METHODS


def by_identity(names: list[str]) -> dict[int, str]:
    return {id(found(name)): name for name in names}


@pytest.mark.parametrize("name", sorted({**by_identity(shown()), **by_identity(exported())}.values()))
def test_docstring_tells_what_the_code_does(name: str) -> None:
    assert not gaps(found(name))


def test_api_reference_has_every_exported_name() -> None:
    missing = {name for number, name in by_identity(exported()).items() if number not in by_identity(shown())}
    assert not missing, f"no page in docs/api shows {sorted(missing)}"


def test_signatures_show_defaults() -> None:
    """The API pages evaluate `field(default=...)`; a function of ours around it would be shown as it stands."""
    fields = [
        (path.name, node.target.id, node.value.func.id)
        for path in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call)
        if isinstance(node.value.func, ast.Name) and node.value.func.id.startswith("_")
    ]
    assert not fields


PUBLISHED = [
    *(method.config_class for method in METHODS.values()),
    *(BASELINES[name] for name in sorted(set(BASELINES) - {"finetune", "frozen", "joint"})),
    AlignedClassifier,
    DiscriminantClassifier,
    RidgeClassifier,
    GaussianStream,
    align,
    fit_map,
]


@pytest.mark.parametrize("thing", PUBLISHED, ids=lambda thing: thing.__name__)
def test_what_is_published_names_its_paper(thing: Any) -> None:
    assert names_paper(thing)


def test_names_of_papers() -> None:
    def told(text: str) -> bool:
        return names_paper(type("Learner", (), {"__doc__": text}))

    assert told('A learner.\n\nLi & Hoiem, "Learning without\n    Forgetting", ECCV 2016: it distils.')
    assert told("After Wang et al., NeurIPS 2023.")
    assert not told('Wang et al. say so. It has "two" parts since 2016.')
    assert not told("A learner.\n\nArgs:\n    x: Wang et al., NeurIPS 2023.")


# ---- the audit itself: each of its complaints, by an example ----------------------------------------------------------


def silent(x: int) -> None:
    pass


def half_told(images: Tensor, classes: int) -> Tensor:
    """Images in, something out.

    Args:
        images: some images.
        other: what is none of its parameters.
    """
    return images[:classes]


def raising(path: str) -> None:
    """Read `path`."""
    if not path:
        raise ValueError("no path")
    _helper(path)


def _helper(path: str) -> None:
    raise OSError(path)


def all_told(images: Tensor, k: int) -> Tensor:
    """The first `k` of images.

    Args:
        images: [B, 3, H, W].

    Returns:
        [k, 3, H, W].

    Raises:
        ValueError: there are not so many.
    """
    if k > len(images):
        raise ValueError(f"{k} of {len(images)}")
    return torch.narrow(images, 0, 0, k)


class Base:
    """Something with a contract, made of nothing."""

    def answer(self, features: Tensor) -> Tensor:
        """Logits [B, C] of `features` [B, D]."""
        return features


class Heir(Base):
    """It keeps the contract, and has a property."""

    def answer(self, features: Tensor) -> Tensor:
        """Others."""
        return features + 1

    @property
    def keys(self) -> Tensor:
        """Keys."""
        return torch.zeros(1)

    def undescribed(self) -> None:
        pass


@pytest.mark.parametrize(
    ("thing", "complaints"),
    [
        (silent, ["silent: no docstring"]),
        (
            half_told,
            [
                "half_told: tells no shape of the tensor 'images'",
                "half_told: says nothing of 'classes'",
                "half_told: Args name 'other', which is no parameter of its own",
                "half_told: returns a tensor and tells no shape",
            ],
        ),
        (
            raising,
            ["raising: raises OSError, Raises does not say when", "raising: raises ValueError, Raises does not say when"],
        ),
        (all_told, []),
        (Heir, ["Heir.keys: a tensor without a shape", "Heir.undescribed: no docstring"]),
    ],
)
def test_audit_complains(thing: Any, complaints: list[str]) -> None:
    assert gaps(thing) == complaints
