"""Accuracy by the map that carries old classes to the features after a task, beside statistics of all images.

    python benchmarks/drift_maps.py --record apt-0.pt --recipe l2p_cifar100_mini --method apt --learning_rate 0.02 \
        --max_grad_norm 0 --held_out 0.2 --model MODEL --dataset DATA --seed 0
    python benchmarks/drift_maps.py --compare apt-0.pt apt-1.pt lora-0.pt lora-1.pt

With `--record`, trains as `cl-prompts train` does with the arguments that follow and writes the features of all images to
a file; a file that is there is left as it is. With `--compare`, prints a table of the files. Each map is fitted to the
features of a task's images before and after its training, and moves the features of all images of earlier tasks; every
fifth image of the task is held out to choose the settings of the map. Then one discriminant head is fitted to the moved
features. A continual learner can move statistics only; for "shift" and "affine" that is the same. The last row has the
true features of all images after the last task, which no continual learner has. Files that differ only behind the last
"-" share a column of means and standard deviations. In brackets: the share of the change of the held-out images that a map
explains.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import AutoImageProcessor

from cl_prompts.continual import ContinualTrainer
from cl_prompts.evaluation.report import machine
from cl_prompts.heads import DiscriminantClassifier, FeatureClassifier, fit_map
from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.learner.features import record
from cl_prompts.runs.arguments import read_arguments
from cl_prompts.runs.building import build_learner, build_stream


Map = Callable[[Tensor], Tensor]  # features before a task [n, D] -> after it [n, D], float64


class Recorder(FeatureClassifier):
    """Keeps what it is fitted to; it answers nothing."""

    def __init__(self) -> None:
        super().__init__(save_statistics=False, drift="affine")
        self.tasks: list[dict[str, Tensor | None]] = []

    def _fit(self, features: Tensor, targets: Tensor, before: Tensor | None, head: IncrementalHead | None) -> None:
        self.tasks.append({"features": features, "targets": targets, "before": before})

    def forward(self, features: Tensor) -> Tensor:
        """Zeros [B, C]."""
        return features.new_zeros(len(features), self.num_classes)


def recorded(words: list[str]) -> dict[str, Any]:
    """Features along a run with these arguments of `cl-prompts train`."""
    args, training = read_arguments(words)
    training.output_dir, args.extra_classifiers = "", []
    set_seed(training.seed)
    stream = build_stream(args, AutoImageProcessor.from_pretrained(args.model), training.seed)
    learner, recorder = build_learner(args, stream, training.seed), Recorder()
    trainer = ContinualTrainer(learner, stream, training, classifiers={"recorder": recorder})
    trainer.train()
    provider = trainer.feature_provider
    found: dict[str, Any] = {"tasks": recorder.tasks, "known": [], "test": [], "test_targets": []}
    with provider.eval_mode(), trainer.accelerator.autocast():
        for task in stream.tasks:
            found["known"].append(record(learner.features_of, provider.task_images(task)).features)
            seen = record(learner.features_of, provider.test_batches(task))
            found["test"].append(seen.features)
            found["test_targets"].append(learner.head.to_targets(seen.labels)[0])
    return found


def shifted(before: Tensor, after: Tensor) -> Map:
    """All features move alike."""
    shift = (after - before).mean(0)
    return lambda x: x + shift


def affine(before: Tensor, after: Tensor) -> Map:
    """The map of the library."""
    change = fit_map(before, after)
    return lambda x: x @ change.matrix + change.shift


def split(images: Tensor) -> tuple[Tensor, Tensor]:
    """Four fifths of the images, and the others."""
    held = torch.arange(len(images)) % 5 == 4
    return images[~held], images[held]


def best(before: Tensor, after: Tensor, candidates: list[Callable[[Tensor, Tensor], Map]]) -> Map:
    """The candidate with the smallest squared error on held-out images, fitted to all."""
    (x, seen), (y, wanted) = split(before), split(after)
    errors = [float((fit(x, y)(seen) - wanted).square().sum()) for fit in candidates]
    return candidates[errors.index(min(errors))](before, after)


def near_images(width: float, start: Callable[[Tensor, Tensor], Map]) -> Callable[[Tensor, Tensor], Map]:
    """After `start`, each feature moves as those of near images do (Yu et al., CVPR 2020), with weights exp(-d^2 / 2 w^2).

    Args:
        width: w, in units of the median distance between images.
        start: fits the map that is corrected.
    """

    def fit(before: Tensor, after: Tensor) -> Map:
        first = start(before, after)
        rest, scale = after - first(before), float(torch.cdist(before, before).median()) * width
        return lambda x: first(x) + (-0.5 * (torch.cdist(x, before) / scale).square()).softmax(1) @ rest

    return fit


def kernel(width: float, ridge: float) -> Callable[[Tensor, Tensor], Map]:
    """The affine map, then kernel ridge regression of what it misses: radial kernel of `width` median distances."""

    def fit(before: Tensor, after: Tensor) -> Map:
        first, scale = affine(before, after), float(torch.cdist(before, before).median()) * width

        def gram(x: Tensor) -> Tensor:
            return (-0.5 * (torch.cdist(x, before) / scale).square()).exp()

        regularized = gram(before) + ridge * torch.eye(len(before), dtype=before.dtype)
        weight = torch.linalg.solve(regularized, after - first(before))
        return lambda x: first(x) + gram(x) @ weight

    return fit


def network(before: Tensor, after: Tensor) -> Map:
    """The affine map, then a network of one hidden layer for what it misses, stopped where held-out images are best."""
    (x, seen), (y, wanted) = split(before), split(after)
    first = affine(x, y)
    center, scale, size = x.mean(0), float(x.std()), float((y - first(x)).std())
    torch.manual_seed(0)
    width = x.shape[1]
    last = nn.Linear(256, width)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    net = nn.Sequential(nn.Linear(width, 256), nn.GELU(), last).double()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-2)

    def error(some: Tensor, target: Tensor) -> Tensor:
        return (net((some - center) / scale) * size - (target - first(some))).square().sum(1).mean()

    kept, least = copy.deepcopy(net.state_dict()), float("inf")
    for _ in range(60):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            (error(x[rows], y[rows]) / size**2).backward()
            optimizer.step()
        with torch.no_grad():
            if (now := float(error(seen, wanted))) < least:
                kept, least = copy.deepcopy(net.state_dict()), now
    net.load_state_dict(kept)
    return lambda some: first(some) + net((some - center) / scale).detach() * size


WIDTHS = (0.1, 0.2, 0.3, 0.5)
MAPS: dict[str, Callable[[Tensor, Tensor], Map]] = {
    "none": lambda before, after: lambda x: x,
    "shift": shifted,
    "drift of near images": lambda x, y: best(x, y, [near_images(w, lambda a, b: lambda x: x) for w in WIDTHS]),
    "affine, the library's": affine,
    "affine, then near images": lambda x, y: best(x, y, [affine, *(near_images(w, affine) for w in WIDTHS)]),
    "affine, then kernel regression": lambda x, y: best(
        x, y, [affine, *(kernel(w, r) for w in (0.5, 1.0, 2.0) for r in (0.01, 0.1, 1.0, 10.0))]
    ),
    "affine, then a network": network,
}


def carried(tasks: list[dict[str, Any]], fit: Callable[[Tensor, Tensor], Map]) -> tuple[Tensor, float]:
    """Features of all images, moved [n, D], and the share of the change of a task's held-out images that maps explain."""
    features, missed, changed = tasks[0]["features"].double(), 0.0, 0.0
    for task in tasks[1:]:
        before, after = task["before"].double(), task["features"].double()
        features = torch.cat([fit(before, after)(features), after])
        (x, seen), (y, wanted) = split(before), split(after)
        missed += float((fit(x, y)(seen) - wanted).square().sum())
        changed += float((wanted - seen).square().sum())
    return features, 1 - missed / changed


def accuracy(found: dict[str, Any], features: Tensor) -> float:
    """FAA in percent of a discriminant head that is fitted to these features of all images."""
    targets = torch.cat([task["targets"] for task in found["tasks"]])
    head = DiscriminantClassifier(features.shape[1], drift="none")
    head.begin_task(sorted(set(targets.tolist())))
    head.fit(features.float(), targets)
    hits = [(head(x).argmax(1) == y).float().mean() for x, y in zip(found["test"], found["test_targets"], strict=True)]
    return 100 * float(torch.stack(hits).mean())


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation; the value if there is one."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def main() -> None:
    """Write a file of features, or print a row for each map."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--compare", type=Path, nargs="+", default=[])
    options, words = parser.parse_known_args()
    torch.set_num_threads(1)
    if options.record:
        if not options.record.exists():
            torch.save(recorded(words), options.record)
        return
    runs: dict[str, list[dict[str, Any]]] = {}
    for file in options.compare:
        runs.setdefault(file.stem.rsplit("-", 1)[0], []).append(torch.load(file))
    print(f"{machine()}\n\n| FAA | " + " | ".join(f"{name}, {len(found)} seeds" for name, found in runs.items()) + " |")
    print("|---|" + "---:|" * len(runs))
    for label, fit in MAPS.items():
        cells = []
        for column in runs.values():
            moved = [carried(found["tasks"], fit) for found in column]
            reached = [accuracy(found, features) for found, (features, _) in zip(column, moved, strict=True)]
            cells.append(f"{spread(reached)} ({mean(share for _, share in moved):.2f})")
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)
    bounds = [[accuracy(found, torch.cat(found["known"])) for found in column] for column in runs.values()]
    print("| true features of all images | " + " | ".join(spread(column) for column in bounds) + " |")


if __name__ == "__main__":
    main()
