"""Time of a training step and of inference, in units of a forward without prompts (same model, batch and precision).

    python benchmarks/speed.py --output results/speed-tiny
    python benchmarks/speed.py --model base --batch 16 --precision fp32
    python benchmarks/speed.py --device cuda --batch 64 --attention sdpa

For every method: the step with a given query and without, and inference; for prompts from block 4 on also the step with a
given query and given hidden states behind the blocks below, kept in 16 bits. They are measured in turns with the plain
forward, several times; the smallest time is used. Beside them images per second and, on CUDA, the peak of the memory of the
device. Writes speed.json and speed.md. The model is a random ViT.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTModel

from cl_prompts import PromptPoolConfig, get_prompt_pool_model
from cl_prompts.continual import freed_memory_kept
from cl_prompts.evaluation.report import machine
from cl_prompts.runtime.files import write_atomically


SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(hidden_size=192, num_attention_heads=3, intermediate_size=768),
    "small": dict(hidden_size=384, num_attention_heads=6, intermediate_size=1536),
    "base": {},
}
GIVEN = ("step, query at hand", "step, lower blocks too")
METHODS: dict[str, dict[str, Any]] = {
    "l2p": {},
    "l2p_prefix": {},
    "l2p_prefix one-stage": {"one_stage": True},
    "dualprompt": {},
    "dualprompt one-stage": {"one_stage": True},
    "coda": {},
    "coda one-stage": {"one_stage": True},
    "coda from block 4": {"layers": [4, 5, 6, 7, 8]},
    "hash": {},
    "layer_grouped": {},
    "vq_prompt": {},
    "smope": {},
    "hide": {},
    "norga": {},
    "vpt": {},
    "vpt deep": {"deep": True},
    "one_prompt": {},
    "apt": {},
    "vpt_nsp2": {},
    "cpg": {},
}


def build(size: str, attention: str, device: str) -> ViTModel:
    """A random ViT/16 for images of 224 pixels."""
    config = ViTConfig(**SIZES[size])
    config._attn_implementation = attention
    return ViTModel(config, add_pooling_layer=False).eval().to(device)


def timed(call: Callable[[], Any], device: str) -> float:
    """Duration of a call in seconds."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


@freed_memory_kept()  # as in the trainer
def by_turns(calls: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """Smallest duration of each call in seconds, over `repeats` rounds after one warm-up call of each."""
    for call in calls.values():
        call()
    times = {name: [timed(call, device)] for name, call in calls.items()}
    for _ in range(repeats - 1):
        for name, call in calls.items():
            times[name].append(timed(call, device))
    return {name: min(durations) for name, durations in times.items()}


def measure(
    method: str, vit: ViTModel, images: torch.Tensor, options: argparse.Namespace, tasks: int, pool_size: int
) -> tuple[dict[str, float], int | None]:
    """Seconds of the plain forward, the training steps and inference, for a model with `tasks` tasks of ten classes.

    Also the most bytes that were in use on a CUDA device; None on others.
    """

    def precision() -> AbstractContextManager[Any]:
        return torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.precision == "bf16")

    fields = METHODS[method] | ({"pool_size": pool_size} if pool_size else {})
    model = get_prompt_pool_model(vit, PromptPoolConfig(method=method.split()[0], **fields))
    for task in range(tasks):
        model.begin_task(range(10 * task, 10 * task + 10))
        if task < tasks - 1:
            model.end_task()
    labels = (torch.arange(len(images)) % 10 + 10 * (tasks - 1)).to(options.device)
    optimizer = torch.optim.Adam(model.parameter_groups(learning_rate=1e-3))
    model.attach_optimizer(optimizer)
    query = torch.randn(len(images), vit.config.hidden_size, device=options.device) if model.needs_query else None

    def plain() -> None:
        with torch.no_grad(), precision(), model.disable_adapter():
            model(pixel_values=images)

    def step(query: torch.Tensor | None = None, hidden: torch.Tensor | None = None) -> None:
        model.train()
        with precision():
            kept = {} if hidden is None else {"lower_blocks": hidden.float()}
            loss = model(pixel_values=images, labels=labels, query=query, **kept).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def inference() -> None:
        model.eval()
        with torch.no_grad(), precision():
            model(pixel_values=images)

    calls: dict[str, Callable[[], Any]] = {"plain forward": plain, "step": step, "inference": inference}
    if query is not None:
        calls[GIVEN[0]] = lambda: step(query)
    hidden = model.extract_lower_blocks(images)[1] if model.num_lower_blocks else None
    if hidden is not None:
        calls[GIVEN[1]] = lambda: step(query, hidden.half())
    on_cuda = options.device.startswith("cuda")
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    times = by_turns(calls, options.repeats, options.device)
    peak = torch.cuda.max_memory_allocated() if on_cuda else None
    model.end_task()
    model.unload()
    return times, peak


def as_row(method: str, times: dict[str, float], peak: int | None, batch: int) -> str:
    """A row of the table."""
    unit = times["plain forward"]
    cells = [f"{times[name] / unit:.2f}" if name in times else "" for name in (*GIVEN, "step", "inference")]
    cells += [f"{batch / times[name]:,.0f}" for name in ("step", "inference")]
    cells += ["" if peak is None else f"{peak / 1e6:,.0f}"]
    return f"| {method} | {batch} | {1e3 * unit / batch:.2f} | " + " | ".join(cells) + " |"


def main() -> None:
    """Measure all methods, print a row for each, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="tiny")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--tasks", type=int, nargs="+", default=[1], help="tasks begun: shows how cost grows")
    parser.add_argument("--pool_size", type=int, nargs="+", default=[0], help="for methods that have one; 0: its default")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--attention", default="eager", help="eager or sdpa; on CPUs the backward of sdpa is slow in bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    vit = build(options.model, options.attention, options.device)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "methods")}
    head = [
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}; {torch.get_num_threads()} threads. {json.dumps(settings)}",
        "",
        f"| method | batch | plain forward, ms an image | {' | '.join(GIVEN)} | step | inference "
        "| images/s, step | inference | peak MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(head), flush=True)
    rows, numbers = [], []
    for batch in options.batch:
        images = torch.randn(batch, 3, 224, 224, device=options.device)
        for method, tasks, pool_size in product(options.methods, options.tasks, options.pool_size):
            times, peak = measure(method, vit, images, options, tasks, pool_size)
            name = method + (f", {tasks} tasks" if options.tasks != [1] else "")
            name += f", pool of {pool_size:,}" if pool_size else ""
            rows.append(as_row(name, times, peak, batch))
            numbers.append({"method": name, "batch": batch, "seconds": times, "peak": peak})
            print(rows[-1], flush=True)
    if options.output:
        write_atomically(options.output / "speed.md", "\n".join([*head, *rows]) + "\n")
        write_atomically(options.output / "speed.json", json.dumps({"settings": settings, "found": numbers}, indent=1))


if __name__ == "__main__":
    main()
