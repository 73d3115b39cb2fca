"""Cost of a whole run of `cl-prompts train`, in plain forwards of one image by the same model, and where it goes.

    python benchmarks/whole_run.py --model VIT_TINY --dataset CIFAR100_MINI --method l2p
    python benchmarks/whole_run.py --model VIT_TINY --dataset CIFAR100_MINI --method coda --fraction 0.1
    python benchmarks/whole_run.py ... --query_cache FOLDER      # a second run finds un-prompted features there
    python benchmarks/whole_run.py ... --precision bf16          # run and plain forward under autocast
    python benchmarks/whole_run.py ... --config layers=[4,5,6]   # any further argument of cl-prompts train

The settings are those of the recipe `l2p_cifar100_mini`: ten tasks of ten classes, batches of 64, three epochs, Adam; with
one thread, in float32 unless `--precision bf16` is given. The run is everything from the imports to the saved adapter,
given in CPU seconds of the process and in seconds on the wall clock. The plain forward is timed on both clocks in the same
process, in batches of 64: before the run, after its fifth task and behind it. The median is the unit; these forwards are
not counted.

With `--fraction` each class has that part of its images. Steps, un-prompted features, evaluation, reading, and the pass at
the end of a task, by which scores are calibrated, grow with the images; the rest is the same for any number. The last line
of the table is the run with all images: the former divided by the fraction, and the latter.
"""

# ruff: noqa: E402
import time


STARTED = time.perf_counter()

import argparse
import statistics
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor

from cl_prompts.continual import ContinualTrainer, TrainerCallback
from cl_prompts.continual.evaluator import Evaluator
from cl_prompts.continual.feature_cache.provider import FeatureProvider
from cl_prompts.continual.streams.indexed import require_indexed
from cl_prompts.continual.streams.indexed_images import IndexedImages
from cl_prompts.continual.streams.stream import Stream
from cl_prompts.evaluation.report import machine
from cl_prompts.runs import run as runs
from cl_prompts.runs.arguments import read_arguments
from cl_prompts.runs.building import build_learner, build_stream, load_backbone


PUBLISHED = {"l2p": 214_000, "dualprompt": 278_000, "coda": 193_000}  # plain forwards
GOALS = {"l2p": 107_000, "dualprompt": 139_000, "coda": 96_000}
OF_METHOD = {"coda": ["--max_grad_norm", "0"]}
PARTS: list[tuple[Any, str, str]] = [
    (ContinualTrainer, "_step", "steps"),
    (FeatureProvider, "_features_of", "un-prompted features"),
    (Evaluator, "on_task", "evaluation"),
    (IndexedImages, "__getitem__", "reading and resizing"),
    (ContinualTrainer, "_finish", "pass at the end of a task"),
    (ContinualTrainer, "_save", "checkpoints"),
    (runs, "references", "references"),
    (runs.Run, "report", "report and adapter"),
]
PER_IMAGE = ("steps", "un-prompted features", "evaluation", "reading and resizing", "pass at the end of a task")
BATCH = 64

Seconds = tuple[float, float]  # CPU, wall clock


def now() -> Seconds:
    """CPU seconds of this thread, and seconds on the wall clock."""
    return time.thread_time(), time.perf_counter()


class Clock:
    """Seconds of the parts of a run, of all threads. The time of a part within another counts for the inner one only."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._running = threading.local()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time until the end of the block for a part."""
        outer, since = getattr(self._running, "part", None), now()
        self._switch(name, since)
        try:
            yield
        finally:
            self._switch(outer, now())

    def _switch(self, name: str | None, at: Seconds) -> None:
        before = getattr(self._running, "part", None)
        if before is not None:
            sums = self.seconds.setdefault(before, [0.0, 0.0])
            for clock, since in enumerate(self._running.since):
                sums[clock] += at[clock] - since
        self._running.part, self._running.since = name, at

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Count the time of a function of a class or module for a part."""
        original: Callable[..., Any] = getattr(owner, function)

        @wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return original(*args, **kwargs)

        setattr(owner, function, watched)


class Unit(TrainerCallback):
    """Seconds of a plain forward of one image.

    Args:
        model: the backbone without prompts.
        clock: counts these forwards as a part of their own.
        bf16: whether they run under autocast to bf16, as those of the run.
    """

    def __init__(self, model: Any, clock: Clock, *, bf16: bool) -> None:
        self.model, self.clock, self.bf16 = model.eval(), clock, bf16
        self.images = torch.randn(BATCH, 3, model.config.image_size, model.config.image_size)
        self.found: list[list[float]] = []

    @torch.no_grad()
    def forward(self) -> None:
        """The plain forward of a batch."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            self.model(self.images)

    def measure(self) -> None:
        """Time two batches after one that is not timed."""
        with self.clock.part("unit"):
            self.forward()
            for _ in range(2):
                before = now()
                self.forward()
                self.found.append([(end - start) / BATCH for start, end in zip(before, now(), strict=True)])

    def on_task_end(self, state: Any, task: Any) -> None:
        """Measure after the fifth task."""
        if task.number == 4:
            self.measure()

    def seconds(self) -> Seconds:
        """Medians."""
        cpu, wall = (statistics.median(times) for times in zip(*self.found, strict=True))
        return cpu, wall


def keep_part(stream: Stream, fraction: float) -> None:
    """Keep this part of the images of each class of a stream, those first in the data set."""

    def first(rows: Any, labels: Any) -> Any:
        own = [rows[labels[rows] == label] for label in np.unique(labels[rows])]
        return np.sort(np.concatenate([of_class[: max(1, round(fraction * len(of_class)))] for of_class in own]))

    indexed = require_indexed(stream, "a part of the images")
    indexed.tasks = [
        replace(
            task,
            train_rows=first(task.train_rows, indexed.train_labels),
            test_rows=first(task.test_rows, indexed.test_labels),
        )
        for task in indexed.tasks
    ]


def measure(options: argparse.Namespace, clock: Clock) -> Unit:
    """Run the method from settings to saved adapter; returns the unit."""
    with TemporaryDirectory() as folder:
        words = ["--recipe", "l2p_cifar100_mini", "--method", options.method, *OF_METHOD.get(options.method, [])]
        words += ["--model", options.model, "--dataset", options.dataset, "--attention", options.attention]
        words += ["--mixed_precision", "bf16" if options.precision == "bf16" else "no"]
        words += ["--output_dir", f"{folder}/run", *options.further]
        args, training = read_arguments(words)
        with runs.open_run(args, training, "") as run:
            processor = AutoImageProcessor.from_pretrained(args.model)
            stream = build_stream(args, processor, training.seed)
            keep_part(stream, options.fraction)
            unit = Unit(load_backbone(args.model, args.attention), clock, bf16=training.mixed_precision == "bf16")
            unit.measure()
            trainer = run.prepare(build_learner(args, stream, training.seed), stream)
            trainer.callbacks.append(unit)
            run.train(trainer, stream)
            run.report(trainer, stream, processor)
            unit.measure()
    return unit


def table(clock: Clock, unit: Seconds, total: Seconds, options: argparse.Namespace) -> Iterator[str]:
    """Rows of the parts, the sum, and the sum for all images, in seconds and units of both clocks."""

    def row(name: str, seconds: list[float]) -> str:
        cpu, wall = seconds
        return f"| {name} | {cpu:.1f} | {cpu / unit[0]:,.0f} | {wall:.1f} | {wall / unit[1]:,.0f} |"

    measured = {name: clock.seconds.pop(name) for name in ("imports", *(p[2] for p in PARTS)) if name in clock.seconds}
    apart = clock.seconds.pop("unit")
    run = [total[0] - apart[0], total[1] - apart[1]]
    # Parts in other threads take CPU time, and none on the wall clock of the run.
    measured["other"] = [run[i] - sum(seconds[i] for seconds in measured.values()) for i in (0, 1)]
    yield "| | CPU s | units | wall s | units |\n|---|---:|---:|---:|---:|"
    for name, seconds in measured.items():
        yield row(name, seconds)
    yield row(f"**run, {options.fraction:g} of the images**", run)
    if options.fraction < 1:
        grows = [sum(measured[name][i] for name in PER_IMAGE if name in measured) for i in (0, 1)]
        whole = [part / options.fraction + (all_ - part) for part, all_ in zip(grows, run, strict=True)]
        yield row("**run, all images, from this**", whole)


def main() -> None:
    """Measure, and print the unit and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the backbone")
    parser.add_argument("--dataset", required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--method", default="l2p")
    parser.add_argument("--fraction", type=float, default=1.0, help="part of the images of each class")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--attention", default="eager")
    options, further = parser.parse_known_args()
    options.further = further
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    clock = Clock()
    clock.seconds["imports"] = [time.process_time(), time.perf_counter() - STARTED]
    for owner, function, name in PARTS:
        clock.watch(owner, function, name)
    unit = measure(options, clock)
    total = time.process_time(), time.perf_counter() - STARTED
    cpu, wall = unit.seconds()
    print(machine())
    print(f"{options.method}, {options.precision}, {options.fraction:g} of the images; a plain forward of one image takes")
    in_turn = ", ".join(f"{1e3 * each:.2f}" for each, _ in unit.found)
    print(f"{1e3 * cpu:.2f} ms of CPU (in turn: {in_turn}), {1e3 * wall:.2f} ms on the wall clock")
    if options.method in GOALS:
        print(f"goal {GOALS[options.method]:,} units; the published code took {PUBLISHED[options.method]:,}")
    print("\n".join(table(clock, (cpu, wall), total, options)))


if __name__ == "__main__":
    main()
