"""Latency of one image: what a warm pipeline takes besides the passes through the network.

    python benchmarks/latency.py --model VIT_TINY
    python benchmarks/latency.py --model VIT_TINY --methods l2p hash --clock wall --attention eager

For every method, with ten tasks of ten classes learned, in turns: as many plain forwards of a copy of the base without
hooks as the method has passes; the model's answer; the pipeline's answer to a prepared image; preparing the image, a JPEG
file of 640x480 pixels; and a call of the pipeline with the file. Given are the median milliseconds of the plain forwards,
and the medians of the other times divided by them in the same turn. Without `--model`, a random ViT-Tiny/16.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from speed import build
from transformers import AutoImageProcessor, ViTImageProcessor

from cl_prompts import PromptPoolConfig, PromptPoolPipeline, get_prompt_pool_model
from cl_prompts.evaluation.report import machine
from cl_prompts.methods.registry import METHODS
from cl_prompts.runs.building import load_backbone


CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
COLUMNS = ("model", "pipeline without preparing", "preparing", "pipeline")


def in_turns(calls: dict[str, Callable[[], Any]], turns: int, clock: Callable[[], float]) -> list[dict[str, float]]:
    """Seconds of each call in each turn, after three turns that are not timed."""
    times = []
    for _ in range(turns + 3):
        taken = {}
        for name, call in calls.items():
            started = clock()
            call()
            taken[name] = clock() - started
        times.append(taken)
    return times[3:]


def measure(method: str, base: Any, processor: Any, file: Path, options: argparse.Namespace) -> tuple[float, list[float]]:
    """Median milliseconds of the plain forwards, and the median ratio of each of `COLUMNS` to them."""
    plain = copy.deepcopy(base)
    model = get_prompt_pool_model(base, PromptPoolConfig(method=method)).eval()
    for task in range(10):
        model.begin_task(range(10 * task, 10 * task + 10))
        model.end_task()
    pipe = PromptPoolPipeline(model, processor)
    prepared = pipe.preprocess(file)
    passes = 2 if model.needs_query else 1

    @torch.no_grad()
    def forwards() -> None:
        for _ in range(passes):
            plain(**prepared)

    @torch.no_grad()
    def answer() -> None:
        model(**prepared)

    calls: list[Callable[[], Any]] = [
        answer,
        lambda: pipe.classify([prepared]),
        lambda: pipe.preprocess(file),
        lambda: pipe(file),
    ]
    turns = in_turns({"plain": forwards} | dict(zip(COLUMNS, calls, strict=True)), options.turns, CLOCKS[options.clock])
    ratios = [statistics.median(turn[name] / turn["plain"] for turn in turns) for name in COLUMNS]
    model.unload()
    return 1e3 * statistics.median(turn["plain"] for turn in turns), ratios


def main() -> None:
    """Measure all methods, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the backbone")
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=sorted(METHODS))
    parser.add_argument(
        "--clock", choices=CLOCKS, default="cpu", help="cpu: seconds of the process, less changed by other jobs"
    )
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--turns", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    base = (
        load_backbone(options.model, options.attention).eval() if options.model else build("tiny", options.attention, "cpu")
    )
    processor = AutoImageProcessor.from_pretrained(options.model) if options.model else ViTImageProcessor()
    print(f"{machine()}; one thread, {options.clock} time, {options.turns} turns")
    print(f"| method | passes, ms | {' | '.join(COLUMNS)} |\n|---|---:|{'---:|' * len(COLUMNS)}")
    with TemporaryDirectory() as folder:
        file = Path(folder, "image.jpg")
        pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480)).save(file)
        for method in options.methods:
            plain, ratios = measure(method, base, processor, file, options)
            print(f"| {method} | {plain:.1f} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |", flush=True)


if __name__ == "__main__":
    main()
