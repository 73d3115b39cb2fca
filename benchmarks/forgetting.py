"""Known images beyond the novelty threshold after classes are forgotten, with the threshold of before and the moved one.

    python benchmarks/forgetting.py results/features/*-coda-0.pt

The files are those of `benchmarks/run_features.py`. After the last task a share of the classes is forgotten, drawn with
each seed. Test images of the others are counted, in percent: before, after with the threshold of before, and after with the
moved one. Means over the seeds.
"""

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig, ViTModel

from cl_prompts import L2PConfig, get_prompt_pool_model
from cl_prompts.evaluation.report import machine
from cl_prompts.learner.features import Recorded
from cl_prompts.tuner.novelty_threshold import novelty_of


HEADS: dict[str, dict[str, Any]] = {
    "discriminant": {"head": "discriminant"},
    "ridge (M = 2,000)": {"head": "ridge", "projection_size": 2000},
    "aligned": {"alignment": "covariance", "save_statistics": True},
    "trained": {},
}


def learnt(found: dict[str, Any], options: dict[str, Any]) -> Any:
    """A model whose adapter has learned the features of the run."""
    width = found["tasks"][0]["features"].shape[1]
    cosine = found["tasks"][0]["bias"] is None
    if cosine and "head" not in options:
        options = {"head": "layer_norm", **options}
    tiny = ViTConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4, image_size=16)
    model = get_prompt_pool_model(ViTModel(tiny), L2PConfig(**options))
    for task in found["tasks"]:
        own = sorted(set(task["targets"].tolist()))
        adapter, numbers = model.adapter, torch.arange(len(task["targets"]))
        if task["before"] is not None:
            adapter.recorded = Recorded(task["before"], task["targets"], numbers)
        adapter.begin_task(own)
        adapter.head.weight.data = task["weight"].clone()
        if adapter.head.bias is not None:
            adapter.head.bias.data = torch.zeros(len(task["weight"])) if cosine else task["bias"].clone()
        if adapter.running_gaussians is not None:
            for rows in torch.randperm(len(numbers)).repeat(3).split(64):
                adapter.running_gaussians.update(adapter.head, task["features"][rows], task["targets"][rows])
        adapter.consolidate(Recorded(task["features"], task["targets"], numbers))
        adapter.end_task()
    return model


def beyond(model: Any, features: Tensor, threshold: float) -> float:
    """Images beyond the threshold, in percent."""
    return 100 * float((novelty_of(model.adapter, features) > threshold).float().mean())


def main() -> None:
    """Print a row for each file, head and share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.5, 0.8], help="of the classes, to forget")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    print(f"| run, head | {' | '.join(f'{share:.0%} forgotten' for share in args.shares)} |")
    print(f"|---|{'---:|' * len(args.shares)}")
    for file in args.files:
        found = torch.load(file)
        features, targets = found["tasks"][-1]["test"], found["test_targets"]
        for name, options in HEADS.items():
            torch.manual_seed(0)
            taught, cells = learnt(found, options), []
            adapter, classes, threshold = taught.adapter, taught.classes, taught.novelty_threshold
            for share in args.shares:
                numbers: list[list[float]] = []
                for seed in args.seeds:
                    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed)).tolist()
                    gone = order[: round(share * len(classes))]
                    left = features[~torch.isin(targets, torch.tensor(gone))]
                    before = beyond(taught, left, threshold)
                    taught.forget_classes([classes[index] for index in gone])
                    numbers.append([before, *(beyond(taught, left, t) for t in (threshold, taught.novelty_threshold))])
                    taught._swap(adapter)  # all classes again
                cells.append(" > ".join(f"{mean(each):.1f}" for each in zip(*numbers, strict=True)))
            print(f"| {file.stem}, {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
