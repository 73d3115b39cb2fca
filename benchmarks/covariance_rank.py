"""Final average accuracy of discriminant heads by the rank of their class covariances, side by side on the same runs.

    python benchmarks/covariance_rank.py results/features/l2p_cifar100_mini-*.pt

The files are those of `benchmarks/run_features.py`. The last columns: all covariances in full, and one for all classes.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from discriminant import accuracies, discriminant

from cl_prompts.evaluation.report import machine


RANKS = (1, 2, 4, 8, 16, 32)


def final_accuracy(found: dict[str, Any], **options: Any) -> float:
    """Mean over tasks of the accuracy on test images after the last one, in percent."""
    classifier = discriminant(found["tasks"], **options)
    return accuracies(found, lambda features: classifier(features).argmax(1))[1]


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
