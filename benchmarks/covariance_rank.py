"""Final average accuracy of discriminant heads by the rank of their class covariances, side by side on the same runs.

    python benchmarks/covariance_rank.py results/features/l2p_cifar100_mini-*.pt

The files are those of `benchmarks/run_features.py`. The last columns: all covariances in full, and one for all classes.
"""

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from cl_prompts.evaluation.report import machine
from cl_prompts.heads import DiscriminantClassifier


RANKS = (1, 2, 4, 8, 16, 32)


def final_accuracy(found: dict[str, Any], **options: Any) -> float:
    """Mean over tasks of the accuracy after the last one, in percent."""
    tasks = found["tasks"]
    moves = any(task["before"] is not None and not task["before"].equal(task["features"]) for task in tasks)
    classifier = DiscriminantClassifier(tasks[0]["features"].shape[1], drift="affine" if moves else "none", **options)
    for task in tasks:
        classifier.begin_task(sorted(set(task["targets"].tolist())))
        classifier.fit(task["features"], task["targets"], task["before"])
    hits = classifier(tasks[-1]["test"]).argmax(1) == found["test_targets"]
    numbers = found["test_tasks"]
    return 100 * mean(float(hits[numbers == number].float().mean()) for number in numbers.unique())


def main() -> None:
    """Print a row for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    kinds: list[dict[str, Any]] = [{"rank": rank} for rank in RANKS] + [{"kind": "full"}, {"kind": "shared"}]
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    print("| run | " + " | ".join(f"rank {rank}" for rank in RANKS) + " | full | shared |")
    print("|---|" + "---:|" * len(kinds))
    for file in parser.parse_args().files:
        found = torch.load(file)
        print(f"| {file.stem} | " + " | ".join(f"{final_accuracy(found, **kind):.1f}" for kind in kinds) + " |", flush=True)


if __name__ == "__main__":
    main()
