"""How well novelty scores tell seen classes from those of tasks to come, after every task, without prompts.

    python benchmarks/novelty.py --model ./vit-tiny --data ./cifar100-mini

docs/results.md says how to make both folders. The data are two parquet files, `train.parquet` and `test.parquet`, with
columns `img` and `fine_label`: ten tasks of ten classes in the order of their ids. The table in docs/methods/classifiers.md
is from this script.
"""

import argparse
import io
from collections import Counter
from pathlib import Path
from statistics import mean

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

from cl_prompts.evaluation.novelty import NoveltyMeasures
from cl_prompts.evaluation.report import machine
from cl_prompts.heads import DiscriminantClassifier
from cl_prompts.heads.calibration import TaskTemperatures, fit_temperature, information
from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.heads.novelty import energy, threshold_carried_on, threshold_of


TASKS, CLASSES = 10, 10


@torch.no_grad()
def features_of(model: str, file: Path, pixels: int, images: int) -> tuple[Tensor, Tensor]:
    """CLS features [n, D] and labels [n] of the first `images` images of each class in a file."""
    vit, table = AutoModel.from_pretrained(model).eval(), pq.read_table(file)
    found: list[Tensor] = []
    counts, kept = Counter[int](), []
    for row, label in enumerate(table["fine_label"].to_pylist()):
        counts[label] += 1
        kept += [row] if counts[label] <= images else []
    table = table.take(kept)
    rows = table["img"].to_pylist()
    for start in range(0, len(rows), 64):
        pictures = [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in rows[start : start + 64]]
        scaled = [np.array(picture.resize((pixels, pixels), Image.Resampling.BILINEAR)) for picture in pictures]
        batch = torch.from_numpy(np.stack(scaled)).permute(0, 3, 1, 2).float() / 127.5 - 1
        found.append(vit(batch, interpolate_pos_encoding=True).last_hidden_state[:, 0])
    return torch.cat(found), torch.tensor(table["fine_label"].to_pylist())


def trained(head: IncrementalHead, features: Tensor, targets: Tensor, current: range) -> None:
    """Three epochs of Adam on the current task's logits."""
    optimizer, mask = torch.optim.Adam(head.parameters(), 5e-3), torch.full((len(head.weight),), -torch.inf)
    mask[list(current)] = 0
    for _ in range(3):
        for rows in torch.randperm(len(targets)).split(64):
            loss = F.cross_entropy(head(features[rows]) + mask, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def known_in_advance(x: Tensor, y: Tensor, seen_x: Tensor, seen_y: Tensor) -> Tensor:
    """Probabilities of all classes for images [n, D], by a discriminant that was fitted to all: [n, C]. For a bound."""
    classifier = DiscriminantClassifier(x.shape[1], drift="none")
    for task in range(TASKS):
        rows = y // CLASSES == task
        classifier.begin_task(range(CLASSES * task, CLASSES * (task + 1)))
        answers = classifier.held_out_answers(x[rows], y[rows])
        classifier.fit(x[rows], y[rows])
    temperature = fit_temperature(answers.logits, answers.targets)
    assert temperature is not None
    accuracy = (classifier(seen_x).argmax(1) == seen_y).float().mean()
    print(f"accuracy after the last task: {100 * float(accuracy):.1f}")
    return (classifier(seen_x) / temperature).softmax(1)


def main() -> None:
    """Print a row for each score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="./vit-tiny")
    parser.add_argument("--data", type=Path, default=Path("cifar100-mini"))
    parser.add_argument("--pixels", type=int, default=112)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=1_000_000, help="training images of a class")
    parser.add_argument("--tests", type=int, default=1_000_000, help="test images of a class")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    (x, y), (seen_x, seen_y) = (
        features_of(args.model, args.data / f"{part}.parquet", args.pixels, images)
        for part, images in (("train", args.images), ("test", args.tests))
    )
    among_all = known_in_advance(x, y, seen_x, seen_y)
    classifier, head = DiscriminantClassifier(x.shape[1], drift="none"), IncrementalHead(x.shape[1])
    measures: dict[str, list[NoveltyMeasures]] = {}
    temperatures, threshold = TaskTemperatures([], []), None
    for task in range(TASKS - 1):
        current = range(CLASSES * task, CLASSES * (task + 1))
        features, targets = x[y // CLASSES == task], y[y // CLASSES == task]
        head.expand(range(current.stop), current)
        trained(head, features, targets, current)
        classifier.begin_task(current)
        logits, held, novelty, _ = classifier.held_out_answers(features, targets)
        classifier.fit(features, targets)
        temperature = fit_temperature(logits, held)
        assert temperature is not None
        temperatures = temperatures.after(task, temperature, information(logits, held, temperature))
        assert novelty is not None
        threshold = threshold_carried_on(threshold, threshold_of(novelty, 0.05), len(held))
        assert temperatures.common is not None
        g = classifier.gaussians
        whiten = torch.linalg.inv(torch.linalg.cholesky(g.pooled(classifier.spherical))).T
        center = g.mean[:, 0].double().mean(0)
        z, means = (seen_x.double() - center) @ whiten, (g.mean[:, 0].double() - center) @ whiten
        with torch.no_grad():
            scores = {
                "whitened cosine": classifier.novelty(seen_x),
                "relative Mahalanobis": torch.cdist(z, means).square().amin(1) - z.square().sum(1),
                "probability of the best class": -(classifier(seen_x) / temperatures.common).softmax(1).amax(1),
                "trained head, energy": energy(head(seen_x), 1.0),
                "classes to come known (bound)": -among_all[:, : current.stop].sum(1),
            }
        known = seen_y < current.stop
        for name, score in scores.items():
            beyond = threshold if name == "whitened cosine" else None
            measures.setdefault(name, []).append(NoveltyMeasures.of(score[known], score[~known], beyond))
    print(machine())
    for name, found in measures.items():
        print(f"| {name} | {mean(one.auroc for one in found):.1f} | {mean(one.fpr95 for one in found):.0f} |")
    print("known and unknown images beyond the threshold, after each task:")
    print(", ".join(f"{one.false_alarms:.0f} {one.found:.0f}" for one in measures["whitened cosine"]))


if __name__ == "__main__":
    main()
