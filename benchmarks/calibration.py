"""Calibration error of the heads along runs, with temperature 1 and with the chosen one, beside what chance alone gives.

    python benchmarks/calibration.py results/features/*-coda-0.pt

The files are those of `benchmarks/run_features.py`. Images are the held-out training images and the test images of the
tasks seen, none of which were trained on. For each head: after the last task, mean over the tasks, and largest.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from run_features import moves
from torch import Tensor

from cl_prompts.evaluation.calibration import Reliability
from cl_prompts.evaluation.report import machine
from cl_prompts.heads import AlignedClassifier, DiscriminantClassifier, FeatureClassifier, RidgeClassifier
from cl_prompts.heads.calibration import TaskTemperatures, fit_temperature, information, log_scores
from cl_prompts.heads.incremental import IncrementalHead


HEADS: dict[str, Callable[..., FeatureClassifier]] = {
    "discriminant": DiscriminantClassifier,
    "aligned": AlignedClassifier,
    "ridge (M = 2,000)": lambda width, drift: RidgeClassifier(width, drift=drift, projection_size=2000),
}


def scaled(logits: Tensor, scale: Tensor | None) -> Tensor:
    """Logits [B, C], divided by the scale of each image [B] if there is one."""
    return logits if scale is None else logits / scale[:, None]


def head_of(found: dict[str, Any]) -> IncrementalHead:
    """A head like the trained one, without classes: linear, or without a bias as `head="layer_norm"`."""
    width, cosine = found["tasks"][0]["features"].shape[1], found["tasks"][0]["bias"] is None
    return IncrementalHead(width, 1.0 if cosine else None, layer_norm=cosine)


def measure(
    found: dict[str, Any], make: Callable[..., FeatureClassifier], *, only_current: bool
) -> list[list[Reliability]]:
    """Reliability with temperature 1 and with the chosen one, after each task."""
    tasks = found["tasks"]
    width = tasks[0]["features"].shape[1]
    classifier, head = make(width, drift="affine" if moves(tasks) else "none"), head_of(found)
    parts = [part for part in ("held", "test") if tasks[-1][part] is not None]
    numbers = torch.cat([found[f"{part}_tasks"] for part in parts])
    targets = torch.cat([found[f"{part}_targets"] for part in parts])
    temperatures, tasks_of_classes = TaskTemperatures([], []), []
    known: list[int] = []
    reliability: list[list[Reliability]] = []
    for number, task in enumerate(tasks):
        own = sorted(set(task["targets"].tolist()))
        new = len(set(own) - set(known))
        known += [index for index in own if index not in known]
        head.expand(known, own)
        head.weight.data = task["weight"].clone()
        if task["bias"] is not None and head.bias is not None:
            head.bias.data = task["bias"].clone()
        given = (task["features"], task["targets"], task["before"] if moves(tasks) else None, head)
        classifier.begin_task(own)
        logits, held, _, scale = classifier.held_out_answers(*given, only_current=only_current)
        scores = scaled(log_scores(logits, classifier.score_width), scale)
        chosen = fit_temperature(scores, held)
        assert chosen is not None
        growth = (len(known) / (len(known) - new)) ** classifier.temperature_power if number else 1.0
        temperatures = temperatures.after(number, chosen, information(scores, held, chosen), growth)
        tasks_of_classes.append(own)
        classifier.fit(*given)
        seen = numbers <= number
        features = torch.cat([task[part] for part in parts])[seen]
        raw = classifier(features).detach()
        calibrated = scaled(log_scores(raw, classifier.score_width), classifier.scale(features))
        calibrated /= torch.tensor(temperatures.of_classes(tasks_of_classes, len(known)))[calibrated.argmax(1), None]
        both = [z.double().softmax(1).numpy() for z in (raw, calibrated)]
        reliability.append([Reliability.of(probabilities, targets[seen].numpy()) for probabilities in both])
    return reliability


def main() -> None:
    """Print a row for each file and head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    print("| run, head; before > after (by chance) | last task | mean | largest | NLL after the last task |")
    print("|---|---:|---:|---:|---:|")
    for file in args.files:
        found = torch.load(file)
        for name in args.heads:
            rows = measure(found, HEADS[name], only_current="pacs" not in file.stem)
            before, after = ([one[i].expected_calibration_error for one in rows] for i in (0, 1))
            chance = [one[1].calibration_error_by_chance for one in rows]
            cells = [
                f"{of(before):.1f} > {of(after):.1f} ({of(chance):.1f})" for of in (lambda values: values[-1], mean, max)
            ]
            loss = " > ".join(f"{one.negative_log_likelihood:.2f}" for one in rows[-1])
            print(f"| {file.stem}, {name} | {' | '.join(cells)} | {loss} |", flush=True)


if __name__ == "__main__":
    main()
