"""Final average accuracy of discriminant heads by their settings, and of classifiers that keep the features of all images.

    python benchmarks/discriminant.py results/features/l2p_cifar100_mini-*.pt results/features/hash_pacs_mini-*.pt

The files are those of `benchmarks/run_features.py`. Each cell has the accuracy on held-out training images, by which
settings are chosen, and on test images; the last column has means over the files. "normalized": with `normalize_features`.
A support vector machine with a radial kernel and logistic regression are trained on the features of all images of all
tasks, which the drift maps carry along, in coordinates in which the pooled covariance is the identity: more than a
continual learner may keep.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from run_features import moves
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch import Tensor

from cl_prompts.evaluation.report import machine
from cl_prompts.heads import DiscriminantClassifier, fit_map
from cl_prompts.heads.regularized import cholesky, inverse_of_factor, regularize


GRID = [(own, spherical) for own in (0.0, 0.1, 0.2, 0.3) for spherical in (0.1, 0.2, 0.4)]
NORMALIZED = [(0.1, 0.1), (0.1, 0.2), (0.2, 0.4)]

Scores = Callable[[Tensor], Tensor]  # features [n, D] -> class index of each [n]


def discriminant(tasks: list[dict[str, Any]], **options: Any) -> DiscriminantClassifier:
    """A discriminant head with `options`, fitted task after task."""
    drift = "affine" if moves(tasks) else "none"
    classifier = DiscriminantClassifier(tasks[0]["features"].shape[1], drift=drift, **options)
    for task in tasks:
        classifier.begin_task(sorted(set(task["targets"].tolist())))
        classifier.fit(task["features"], task["targets"], task["before"])
    return classifier


def carried_along(tasks: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Features of the images of all tasks after the last one, [n, D] in float64, and their class indices [n]."""
    features, targets = tasks[0]["features"].double(), tasks[0]["targets"]
    for task in tasks[1:]:
        if moves(tasks):
            change = fit_map(task["before"], task["features"], "affine")
            features = features @ change.matrix + change.shift
        features, targets = torch.cat([features, task["features"].double()]), torch.cat([targets, task["targets"]])
    return features, targets


def trained_on_all(tasks: list[dict[str, Any]], model: Any) -> Scores:
    """`model` of scikit-learn, fitted to the features of all images."""
    features, targets = carried_along(tasks)
    within = torch.cat([features[targets == c] - features[targets == c].mean(0) for c in targets.unique()])
    white = inverse_of_factor(cholesky(regularize(within.T @ within / len(within), 0.2, 1e-12)))
    center = features.mean(0)
    model.fit(((features - center) @ white).numpy(), targets.numpy())
    return lambda some: torch.from_numpy(model.predict(((some.double() - center) @ white).numpy()))


def accuracies(found: dict[str, Any], answer: Scores) -> tuple[float, float]:
    """Mean over tasks of the accuracy on held-out and on test images after the last one, in percent."""
    result = []
    for part in ("held", "test"):
        hits, numbers = answer(found["tasks"][-1][part]) == found[f"{part}_targets"], found[f"{part}_tasks"]
        result.append(100 * mean(float(hits[numbers == number].float().mean()) for number in numbers.unique()))
    return result[0], result[1]


def with_settings(classifier: DiscriminantClassifier, own: float, spherical: float) -> DiscriminantClassifier:
    """The same head with other weights of the covariances."""
    classifier.own, classifier.spherical = own, spherical
    classifier.forget_computed()
    return classifier


def print_row(label: str, cells: list[tuple[float, float]]) -> None:
    """A line of the table."""
    means = mean(cell[0] for cell in cells), mean(cell[1] for cell in cells)
    print(f"| {label} | " + " | ".join(f"{held:.1f} / {test:.1f}" for held, test in [*cells, means]) + " |", flush=True)


def main() -> None:
    """Print a row for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    files = parser.parse_args().files
    torch.set_num_threads(1)
    runs = [torch.load(file) for file in files]
    print(f"{machine()}\n")
    print("| held-out / test | " + " | ".join(file.stem for file in files) + " | mean |")
    print("|---|" + "---:|" * (len(files) + 1))
    for normalize, grid, words in ((False, GRID, ""), (True, NORMALIZED, ", normalized")):
        heads = [discriminant(found["tasks"], normalize=normalize) for found in runs]
        for own, spherical in grid:
            cells = []
            for found, head in zip(runs, heads, strict=True):
                changed = with_settings(head, own, spherical)
                cells.append(accuracies(found, lambda some, by=changed: by(some).argmax(1)))  # type: ignore[misc]
            print_row(f"own {own}, spherical {spherical}{words}", cells)
    for label, make in (
        ("support vector machine", lambda: SVC(C=3.0, gamma=0.003)),
        ("logistic regression", lambda: LogisticRegression(C=0.003, max_iter=200)),
    ):
        print_row(f"{label}, all features", [accuracies(found, trained_on_all(found["tasks"], make())) for found in runs])


if __name__ == "__main__":
    main()
