"""Whether further features of a trained adapter's pass, or a second adapter, raise the accuracy of discriminant analysis.

    python benchmarks/readouts.py ADAPTER [ADAPTER ...] --recipe l2p_cifar100_mini --tasks 5 --held_out 0.2 \
        --model MODEL --dataset DATA

The adapters are those of runs with these arguments. Statistics are of all training images of all tasks, on the features of
the last prompts: an upper bound, which no continual learner has. The accuracy is that on the stream's test images; with
`--held_out` these are training images that no run has seen.
"""

import argparse
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor

from cl_prompts import PromptPoolModel
from cl_prompts.evaluation.report import machine
from cl_prompts.runs.arguments import read_arguments
from cl_prompts.runs.building import build_stream, load_backbone


def images(stream: Any, *, train: bool) -> tuple[Tensor, Tensor]:
    """Pixels and labels of all tasks."""
    pixels, labels = [], []
    for task in stream:
        for batch in stream.images(task.train_rows if train else task.test_rows, 64, train=train):
            real = batch["labels"] >= 0
            pixels.append(batch["pixel_values"][real])
            labels.append(batch["labels"][real])
    return torch.cat(pixels), torch.cat(labels)


@torch.no_grad()
def read(model: PromptPoolModel, blocks: list[torch.nn.Module], pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the head reads [n, D], and the CLS token and the mean of the patches after each block [n, blocks, D]."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: seen.append((out if torch.is_tensor(out) else out[0]).float()))
        for block in blocks
    ]
    features, tokens, means = [], [], []
    with torch.autocast("cpu", torch.bfloat16):
        for part in pixels.split(64):
            seen.clear()
            features.append(model.features_of({"pixel_values": part}).float())
            last = seen[-len(blocks) :]  # of the prompted pass, which follows the one without prompts
            tokens.append(torch.stack([hidden[:, 0] for hidden in last], 1))
            means.append(torch.stack([hidden[:, 1:].mean(1) for hidden in last], 1))
    for hook in hooks:
        hook.remove()
    return torch.cat(features), torch.cat(tokens), torch.cat(means)


def log_densities(known: Tensor, labels: Tensor, seen: Tensor) -> Tensor:
    """Logits [n, C] of linear discriminant analysis of `known` [m, D], for `seen` [n, D]."""
    center = known.double().mean(0)
    x, z = known.double() - center, seen.double() - center
    means = torch.stack([x[labels == c].mean(0) for c in range(int(labels.max()) + 1)])
    rest = x - means[labels]
    covariance = rest.T @ rest / len(rest)
    covariance.diagonal().mul_(1.1)  # the best of 1.001 to 1.3, on average
    weight = torch.linalg.solve(covariance, means.T)
    return z @ weight - 0.5 * (means * weight.T).sum(1)


def main() -> None:
    """Print a row for each adapter, and one for each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+")
    options, others = parser.parse_known_args()
    torch.set_num_threads(1)
    args, _ = read_arguments(others)
    stream = build_stream(args, AutoImageProcessor.from_pretrained(args.model), 0)
    (x, y), (seen_x, seen_y) = images(stream, train=True), images(stream, train=False)
    print(f"{machine()}\n")
    print("| accuracy | as the head reads | last 2 blocks | 3 | 4 | 6 | with the mean of the patches |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    logits: dict[str, Tensor] = {}
    for adapter in options.adapters:
        base = load_backbone(args.model, args.attention)
        blocks = [module for module in base.modules() if type(module).__name__ == "ViTLayer"]
        model = PromptPoolModel.from_pretrained(base, adapter).eval()
        known, seen = read(model, blocks, x), read(model, blocks, seen_x)
        name, cells = Path(adapter).parent.name, []
        logits[name] = log_densities(known[0], y, seen[0])
        cells.append(logits[name])
        for count in (2, 3, 4, 6):
            pair = [torch.cat([part[1][:, -count:-1].flatten(1), part[0]], 1) for part in (known, seen)]
            cells.append(log_densities(pair[0], y, pair[1]))
        pair = [torch.cat([part[2][:, -1], part[0]], 1) for part in (known, seen)]
        cells.append(log_densities(pair[0], y, pair[1]))
        print(f"| {name} | {' | '.join(f'{accuracy(cell, seen_y):.1f}' for cell in cells)} |", flush=True)
    for first, second in combinations(logits, 2):
        print(f"| {first} + {second} | {accuracy(logits[first] + logits[second], seen_y):.1f} | | | | | |")


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Of the largest logits, in percent."""
    return 100 * float((logits.argmax(1) == targets).double().mean())


if __name__ == "__main__":
    main()
