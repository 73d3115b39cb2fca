"""Costs along a long run: what each task adds to the time of a task's parts, to files and to memory.

    python benchmarks/growth.py --at 1 50 100 200
    python benchmarks/growth.py --methods hash coda --head discriminant

Tasks of five classes on a random ViT-Tiny for images of 112 pixels. A row per method and number of tasks: CPU milliseconds
of `begin_task`, a training step, `end_task` with the pass over the images, an answer, the evaluation of a task, saving and
loading the adapter, a checkpoint and resuming from it; megabytes of the adapter, and the process's resident memory. Parts
are measured several times where they can be repeated, and the least counts. All rows of a method come from one process;
ratios between its rows are what the table is for. Steps and answers are measured in turns with those of a model that stays
in its first task, since a machine that is busy with other things changes its speed: "step / first" is the ratio.
"""

import argparse
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig, ViTModel

from cl_prompts import PromptPoolConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.continual import freed_memory_kept
from cl_prompts.continual.checkpointing.checkpoint import Checkpoints
from cl_prompts.continual.checkpointing.parts import LearnerState, OptimizerState
from cl_prompts.continual.checkpointing.snapshot import capture, restore
from cl_prompts.evaluation.evaluate import evaluate
from cl_prompts.evaluation.report import machine
from cl_prompts.methods.registry import METHODS


CLASSES = 5  # of a task
COLUMNS = (
    *("begin_task", "step", "step / first", "end_task", "answer", "answer / first", "evaluate", "save", "load"),
    *("checkpoint", "resume", "MB", "resident MB"),
)


def build() -> ViTModel:
    """A random ViT-Tiny/16 for images of 112 pixels."""
    size = dict(hidden_size=192, num_attention_heads=3, intermediate_size=768, image_size=112)
    return ViTModel(ViTConfig(**size), add_pooling_layer=False).eval()


def least(repeats: int, *calls: Callable[[], Any]) -> list[float]:
    """Least CPU time of each of several calls, made in turns, in milliseconds."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, own in zip(calls, times, strict=True):
            started = time.process_time()
            call()
            own.append(1e3 * (time.process_time() - started))
    return [min(own) for own in times]


def resident() -> float:
    """Resident memory of the process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


class Run:
    """One method on a stream without end."""

    def __init__(self, method: str, head: str, batch: int, repeats: int) -> None:
        self.vit, self.method, self.head = build(), method, head
        self.model = get_prompt_pool_model(self.vit, self.config())
        self.optimizer: torch.optim.Optimizer | None = None
        self.images = torch.randn(batch, 3, 112, 112, generator=torch.Generator().manual_seed(0))
        self.query = None
        if self.model.needs_query:
            with torch.no_grad():
                self.query = self.vit(self.images).last_hidden_state[:, 0]
        self.repeats = repeats

    def config(self) -> PromptPoolConfig:
        """The method's config, with the chosen head."""
        fields: dict[str, Any] = {"head": self.head} if self.head else {}
        return PromptPoolConfig(method=self.method, **fields)

    def labels(self, task: int) -> Tensor:
        """Labels [B] of a task's images."""
        return torch.arange(len(self.images)) % CLASSES + CLASSES * task

    def pictures(self, task: int) -> list[dict[str, Tensor]]:
        """The task's images as one batch."""
        batch = {"pixel_values": self.images, "labels": self.labels(task), "sample_ids": torch.arange(len(self.images))}
        return [batch if self.query is None else batch | {"query": self.query}]

    def begin(self, task: int) -> float:
        """Begin a task; returns the time of `begin_task`."""
        if task and self.model.needs_consolidation:
            self.model.eval()
            self.model.record_features(self.pictures(task))
        (milliseconds,) = least(1, lambda: self.model.begin_task(range(CLASSES * task, CLASSES * (task + 1))))
        groups = self.model.parameter_groups(learning_rate=1e-4)
        self.optimizer = torch.optim.Adam(groups) if groups else None
        if self.optimizer is not None:
            self.model.attach_optimizer(self.optimizer)
        return milliseconds

    def step(self) -> None:
        """A training step; nothing for a method that trains nothing."""
        if self.optimizer is not None:
            labels = self.labels(self.model.num_tasks - 1)
            self.model.train()
            self.model(pixel_values=self.images, labels=labels, query=self.query).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def answer(self) -> None:
        """Logits of the images."""
        self.model.eval()
        self.model(pixel_values=self.images, query=self.query)

    def end(self, task: int) -> None:
        """The end of a task, with the pass over its images where the classifier or the method needs one."""
        self.model.eval()
        if self.model.needs_consolidation:
            self.model.consolidate(self.pictures(task))
        self.model.end_task()

    def checkpoint(self, folder: str) -> dict[str, float]:
        """Times of a checkpoint within a task, and of resuming from it."""
        checkpoints = Checkpoints(folder)
        parts: dict[str, Any] = {"learner": LearnerState(self.model)}
        if self.optimizer is not None:
            parts["optimizer"] = OptimizerState(self.optimizer)
        (saved,) = least(1, lambda: checkpoints.save(1, capture(parts, {})))
        other = get_prompt_pool_model(self.vit_copy(), self.config())

        def resume() -> None:
            state = checkpoints.latest()
            assert state is not None
            restore({"learner": LearnerState(other)}, state, None)
            if "optimizer" in state["parts"]:
                optimizer = torch.optim.Adam(other.parameter_groups(learning_rate=1e-4))
                restore({"optimizer": OptimizerState(optimizer)}, state, None)

        (resumed,) = least(1, resume)
        return {"checkpoint": saved, "resume": resumed}

    def between_tasks(self, task: int) -> dict[str, float]:
        """Times of what happens between tasks, the file's size and the process's memory."""
        model = self.model.eval()
        (seconds,) = least(self.repeats, lambda: evaluate(model, self.pictures(task), model.classes, "cpu"))
        found = {"evaluate": seconds}
        with TemporaryDirectory() as folder:
            (found["save"],) = least(1, lambda: model.save_pretrained(folder))
            found["MB"] = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
            fresh = self.vit_copy()
            (found["load"],) = least(1, lambda: PromptPoolModel.from_pretrained(fresh, folder))
        gc.collect()
        return found | {"resident MB": resident()}

    def vit_copy(self) -> ViTModel:
        """A backbone with the same weights."""
        fresh = build()
        fresh.load_state_dict(self.vit_weights())
        return fresh

    def vit_weights(self) -> dict[str, Tensor]:
        """Weights of the backbone under its own names."""
        return self.model.get_base_model().state_dict()


@freed_memory_kept()
def rows(method: str, args: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Measurements of a method after each number of tasks in `args.at`."""
    run, first = (Run(method, args.head, args.batch, args.repeats) for _ in range(2))
    first.begin(0)
    for task in range(max(args.at)):
        found = {"begin_task": run.begin(task)}
        if measured := task + 1 in args.at:
            found["step"], one = least(args.repeats, run.step, first.step)
            found["step / first"] = found["step"] / max(one, 1e-9)
            found["answer"], one = least(args.repeats, run.answer, first.answer)
            found["answer / first"] = found["answer"] / one
            with TemporaryDirectory() as folder:
                found |= run.checkpoint(folder)
        (found["end_task"],) = least(1, partial(run.end, task))
        if measured:
            yield {"tasks": task + 1} | found | run.between_tasks(task)


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
            cells = [f"{row[name]:.2f}" if "/" in name else f"{row[name]:.1f}" for name in COLUMNS]
            print(f"| {method} | {row['tasks']:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
