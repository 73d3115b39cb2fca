"""Peak memory of a training step on the CPU, compared with published code, which keeps a second copy of the backbone.

    python benchmarks/memory.py --model base --batch 16

Each variant runs in its own process. The result is the largest resident set size minus that after the imports.
"""

import argparse
import json
import resource
import subprocess
import sys
import warnings

import torch
from speed import METHODS, SIZES, build

from cl_prompts import PromptPoolConfig, extract_features, get_prompt_pool_model
from cl_prompts.evaluation.report import machine


VARIANTS = ("two backbones", "one backbone", "one, bf16 weights", "one, checkpointed", "one, bf16 and checkpointed")


def peak() -> int:
    """Largest resident set size of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def step(variant: str, options: argparse.Namespace) -> int:
    """Run two training steps and return the growth of the peak memory, in bytes."""
    before = peak()
    vit = build(options.model, options.attention, "cpu")
    other = build(options.model, options.attention, "cpu") if variant == "two backbones" else None
    if "bf16" in variant:
        vit.to(torch.bfloat16)
    if "checkpointed" in variant:
        vit.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_prompt_pool_model(vit, PromptPoolConfig(method=options.method, **METHODS[options.method]))
    model.begin_task(range(10))
    optimizer = torch.optim.Adam(model.parameter_groups(learning_rate=1e-3))
    model.attach_optimizer(optimizer)
    images, labels = torch.randn(options.batch, 3, 224, 224), torch.arange(options.batch) % 10
    query = None
    query_model = get_prompt_pool_model(other, PromptPoolConfig(method=options.method)) if other is not None else None
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            if query_model is not None and model.needs_query:
                query = extract_features(query_model, images)
            loss = model.train()(pixel_values=images, labels=labels, query=query).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return peak() - before


def main() -> None:
    """Run each variant in its own process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="base")
    parser.add_argument("--method", choices=METHODS, default="l2p")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    if options.variant:
        print(step(options.variant, options))
        return
    print(f"{machine()}\n{json.dumps(vars(options))}\n\n| variant | MB | of two backbones |\n|---|---:|---:|")
    first = 0
    for variant in VARIANTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
        size = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        first = first or size
        print(f"| {variant} | {size / 1e6:,.0f} | {size / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
