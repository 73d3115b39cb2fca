"""Features along runs of prompt methods, once for all measurements of classifiers, calibration and novelty.

    python benchmarks/run_features.py --recipe l2p_cifar100_mini --method coda none --seeds 0 1 2 \
        --model MODEL --dataset DATA --output results/features

For each method and seed a file `RECIPE-METHOD-SEED.pt`; one that is there is left as it is. It has a dict for each task:
`targets` and `features` of its training images after its training, `before` of the same images before it (None for the
first task), `weight` and `bias` of the trained head, and `held` and `test`: features of held-out training images and of
test images of all tasks. Every fifth training image of a class is held out: it is for choosing settings. With `--bf16` the
backbone computes in bfloat16, as runs of the mini recipes do: four times as fast on a CPU that has its products
(`avx512_bf16` in /proc/cpuinfo), 20 times as slow on another one.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor

from cl_prompts import get_prompt_pool_model
from cl_prompts.methods import PromptPoolConfig
from cl_prompts.runs.arguments import pairs, read_arguments
from cl_prompts.runs.building import build_stream, load_backbone


BATCH = 64


def moves(tasks: list[dict[str, Any]]) -> bool:
    """Whether the training of the `tasks` of a file changes features."""
    return any(task["before"] is not None and not task["before"].equal(task["features"]) for task in tasks)


class Images:
    """Images of a stream's tasks as bytes, read once, and their features without prompts."""

    def __init__(self, stream: Any, processor: Any, limit: int, tests: int) -> None:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
        self.mean, self.std = mean, std
        pixels, labels, tasks, parts = [], [], [], []
        for task in stream:
            for part in ("train", "test"):
                rows = task.train_rows if part == "train" else task.test_rows
                for batch in stream.images(rows, BATCH, train=part == "train"):
                    real = batch["labels"] >= 0
                    values = (batch["pixel_values"][real] * std + mean) * 255
                    pixels.append(values.round().clamp(0, 255).byte())
                    labels.append(batch["labels"][real])
                    tasks.append(torch.full((int(real.sum()),), task.number))
                    parts.append(torch.full((int(real.sum()),), int(part == "test") * 2))
        self.pixels, self.labels = torch.cat(pixels), torch.cat(labels)
        self.tasks, self.parts = torch.cat(tasks), torch.cat(parts)  # parts: 0 training, 1 held out, 2 test
        for task in self.tasks.unique():
            for label in self.labels.unique():
                rows = ((self.tasks == task) & (self.labels == label) & (self.parts == 0)).nonzero().flatten()
                self.parts[rows[4::5]] = 1
                self.parts[rows[limit:]] = -1
                rows = ((self.tasks == task) & (self.labels == label) & (self.parts == 2)).nonzero().flatten()
                self.parts[rows[tests:]] = -1
        self.queries = torch.empty(0)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Inputs of a forward."""
        values = (self.pixels[rows].float() / 255 - self.mean) / self.std
        found = {"pixel_values": values, "labels": self.labels[rows]}
        return found | ({"query": self.queries[rows]} if len(self.queries) else {})

    def rows(self, part: int, task: int | None = None) -> Tensor:
        """Row numbers of a part, of all tasks or of one."""
        chosen = self.parts == part if task is None else (self.parts == part) & (self.tasks == task)
        return chosen.nonzero().flatten()


def features(model: Any, images: Images, rows: Tensor) -> Tensor:
    """Features of images [n, D]."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model.features_of(images.batch(part)) for part in rows.split(BATCH)])


def run(
    args: Any, images: Images, stream: Any, method: str, seed: int, epochs: int, rate: float, every: bool
) -> dict[str, Any]:
    """Train along the tasks and return what the file holds."""
    torch.manual_seed(seed)
    options = pairs(args.config) if method == args.method else {}
    if args.scenario == "domain":
        options["class_mask"] = "none"
    model = get_prompt_pool_model(load_backbone(args.model, args.attention), PromptPoolConfig(method=method, **options))
    if not len(images.queries):
        kept = (images.parts >= 0).nonzero().flatten()
        found = torch.cat([model.extract_features(images.batch(part)["pixel_values"]) for part in kept.split(BATCH)])
        images.queries = found.new_zeros(len(images.labels), found.shape[1])
        images.queries[kept] = found
    tasks: list[dict[str, Any]] = []
    held, test = images.rows(1), images.rows(2)
    begun = time.perf_counter()
    last = len(stream.tasks) - 1
    for task in stream:
        rows = images.rows(0, task.number)
        before = features(model, images, rows) if task.number else None
        model.begin_task(task.classes, revisit=task.revisit)
        optimizer = torch.optim.Adam(model.parameter_groups(rate))
        model.attach_optimizer(optimizer)
        model.train()
        for _ in range(epochs):
            for part in rows[torch.randperm(len(rows))].split(BATCH):
                model(**images.batch(part)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        indices = {c: i for i, c in enumerate(model.classes)}
        whole = every or task.number == last
        tasks.append(
            {
                "targets": torch.tensor([indices[int(c)] for c in images.labels[rows]]),
                "features": features(model, images, rows),
                "before": before,
                "weight": model.head.weight.detach().clone(),
                "bias": None if model.head.bias is None else model.head.bias.detach().clone(),
                "held": features(model, images, held) if whole else None,
                "test": features(model, images, test) if whole else None,
            }
        )
        model.end_task()
        print(method, seed, task.number, f"{time.perf_counter() - begun:.0f} s", flush=True)
    index = {c: i for i, c in enumerate(model.classes)}
    result: dict[str, Any] = {"tasks": tasks, "classes": model.classes}
    for name, rows in (("held", held), ("test", test)):
        result[f"{name}_targets"] = torch.tensor([index[int(c)] for c in images.labels[rows]])
        result[f"{name}_tasks"] = images.tasks[rows]
    return result


def main() -> None:
    """Write the files that are not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="l2p_cifar100_mini")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--method", nargs="+", default=["coda", "layer_grouped", "none"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=5e-3, help="of Adam")
    parser.add_argument(
        "--images", type=int, default=1_000_000, help="training images of a class in a task, held-out ones included"
    )
    parser.add_argument("--tests", type=int, default=1_000_000, help="test images of a class")
    parser.add_argument(
        "--only_last", action="store_true", help="features of held-out and test images after the last task only"
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    fixed = ["--recipe", options.recipe, "--model", options.model, "--dataset", options.dataset]
    args, _ = read_arguments(fixed)
    options.output.mkdir(parents=True, exist_ok=True)
    images = None
    for seed in options.seeds:
        for method in options.method:
            file = options.output / f"{options.recipe}-{method}-{seed}.pt"
            if file.exists():
                continue
            stream = build_stream(args, AutoImageProcessor.from_pretrained(args.model), 0)
            images = images or Images(stream, AutoImageProcessor.from_pretrained(args.model), options.images, options.tests)
            with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
                every = not options.only_last
                found = run(args, images, stream, method, seed, options.epochs, options.learning_rate, every)
            torch.save(found, file)


if __name__ == "__main__":
    main()
