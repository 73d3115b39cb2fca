"""Costs along a long run: what each task adds to the time of a task's parts, to files and to memory.

    python benchmarks/growth.py --at 1 50 100 200
    python benchmarks/growth.py --methods hash coda --head discriminant

Tasks of five classes on a random ViT-Tiny for images of 112 pixels. A row per method and number of tasks: CPU milliseconds
of `begin_task`, a training step, `end_task` with the pass over the images, an answer, saving and loading the adapter;
its megabytes, and the process's resident memory. Parts are measured several times where they can be repeated, and the least
counts. All rows of a method come from one process; ratios between its rows are what the table is for.
"""

import argparse
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig, ViTModel

from cl_prompts import PromptPoolConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.continual import freed_memory_kept
from cl_prompts.evaluation.report import machine
from cl_prompts.methods.registry import METHODS


CLASSES = 5  # of a task
COLUMNS = ("begin_task", "step", "end_task", "answer", "save", "load", "MB", "resident MB")


def build() -> ViTModel:
    """A random ViT-Tiny/16 for images of 112 pixels."""
    size = dict(hidden_size=192, num_attention_heads=3, intermediate_size=768, image_size=112)
    return ViTModel(ViTConfig(**size), add_pooling_layer=False).eval()


def least(call: Callable[[], Any], repeats: int) -> float:
    """Least CPU time of a call, in milliseconds."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return 1e3 * min(times)


def resident() -> float:
    """Resident memory of the process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


class Run:
    """One method on a stream without end."""

    def __init__(self, method: str, head: str, batch: int, repeats: int) -> None:
        self.vit = build()
        fields: dict[str, Any] = {"head": head} if head else {}
        self.model = get_prompt_pool_model(self.vit, PromptPoolConfig(method=method, **fields))
        self.images = torch.randn(batch, 3, 112, 112, generator=torch.Generator().manual_seed(0))
        self.query = None
        if self.model.needs_query:
            with torch.no_grad():
                self.query = self.vit(self.images).last_hidden_state[:, 0]
        self.repeats = repeats

    def labels(self, task: int) -> Tensor:
        """Labels [B] of a task's images."""
        return torch.arange(len(self.images)) % CLASSES + CLASSES * task

    def pictures(self, task: int) -> list[dict[str, Tensor]]:
        """The task's images as one batch."""
        batch = {"pixel_values": self.images, "labels": self.labels(task), "sample_ids": torch.arange(len(self.images))}
        return [batch if self.query is None else batch | {"query": self.query}]

    def learn(self, task: int, measured: bool) -> dict[str, float]:
        """Go through a task; returns the times of its parts, without those of a step if it is not `measured`."""
        model, found = self.model, {}
        if task and model.needs_consolidation:
            model.eval()
            model.record_features(self.pictures(task))
        found["begin_task"] = least(lambda: model.begin_task(range(CLASSES * task, CLASSES * (task + 1))), 1)
        if measured:
            groups = model.parameter_groups(learning_rate=1e-4)
            found["step"] = self.step(task, torch.optim.Adam(groups)) if groups else 0.0
        found["end_task"] = least(lambda: self.end(task), 1)
        return found

    def step(self, task: int, optimizer: torch.optim.Optimizer) -> float:
        """Time of a training step."""
        model, labels = self.model, self.labels(task)
        model.attach_optimizer(optimizer)
        model.train()

        def step() -> None:
            model(pixel_values=self.images, labels=labels, query=self.query).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return least(step, self.repeats + 2)

    def end(self, task: int) -> None:
        """The end of a task, with the pass over its images where the classifier or the method needs one."""
        self.model.eval()
        if self.model.needs_consolidation:
            self.model.consolidate(self.pictures(task))
        self.model.end_task()

    def outside(self) -> dict[str, float]:
        """Times of what happens between tasks, the file's size and the process's memory."""

        @torch.no_grad()
        def answer() -> None:
            self.model.eval()
            self.model(pixel_values=self.images, query=self.query)

        found = {"answer": least(answer, self.repeats)}
        with TemporaryDirectory() as folder:
            found["save"] = least(lambda: self.model.save_pretrained(folder), 1)
            found["MB"] = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
            fresh = build()
            fresh.load_state_dict(self.vit_weights())
            found["load"] = least(lambda: PromptPoolModel.from_pretrained(fresh, folder), 1)
        gc.collect()
        return found | {"resident MB": resident()}

    def vit_weights(self) -> dict[str, Tensor]:
        """Weights of the backbone under its own names."""
        return self.model.get_base_model().state_dict()


@freed_memory_kept()
def rows(method: str, args: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Measurements of a method after each number of tasks in `args.at`."""
    run = Run(method, args.head, args.batch, args.repeats)
    for task in range(max(args.at)):
        found = run.learn(task, measured=task + 1 in args.at)
        if task + 1 in args.at:
            yield {"tasks": task + 1} | found | run.outside()


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=sorted(METHODS), help="default: all")
    parser.add_argument("--head", default="", help="kind of head; default: the method's own")
    parser.add_argument("--at", type=int, nargs="+", default=[1, 50, 100, 200], help="numbers of tasks at which to measure")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(machine())
    print(f"| method | tasks | {' | '.join(COLUMNS)} |\n|---|---:|{'---:|' * len(COLUMNS)}")
    for method in args.methods:
        torch.manual_seed(0)
        for row in rows(method, args):
            cells = [f"{row[name]:.1f}" for name in COLUMNS]
            print(f"| {method} | {row['tasks']:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
