"""Cost of a training step with prompt tokens without this library: a lower bound for prompt methods.

    python benchmarks/floor.py --tokens 1 5 25

A Hugging Face ViT is run block by block with learned tokens after the class token, forward and backward to the tokens. It
has no pool, no query pass and no classifier. Times are in units of a forward without prompts, measured in turns in one run.
The forward with prompts is also measured alone.
"""

import argparse
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from speed import SIZES, build, by_turns

from cl_prompts.evaluation.report import machine


def main() -> None:
    """Print a row for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 5, 25])
    parser.add_argument("--model", choices=SIZES, default="tiny")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--attention", default="eager")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    vit: Any = build(options.model, options.attention, "cpu").requires_grad_(False)
    images = torch.randn(options.batch, 3, 224, 224)

    def precision() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16")

    def plain() -> None:
        with torch.no_grad(), precision():
            vit(pixel_values=images)

    def prompted(prompts: torch.Tensor) -> torch.Tensor:
        with precision():
            hidden = vit.embeddings(images)
            hidden = torch.cat([hidden[:, :1], prompts.expand(len(images), -1, -1), hidden[:, 1:]], 1)
            for block in vit.layers:
                hidden = block(hidden)
            total: torch.Tensor = vit.layernorm(hidden)[:, 0].sum()
        return total

    def functions(prompts: torch.Tensor) -> dict[str, Callable[[], None]]:
        def forward() -> None:
            with torch.no_grad():
                prompted(prompts)

        def step() -> None:
            prompted(prompts).backward()

        return {"plain": plain, "forward": forward, "step": step}

    print(machine())
    print("| tokens | forward | forward and backward |\n|---:|---:|---:|", flush=True)
    for tokens in options.tokens:
        prompts = torch.zeros(1, tokens, vit.config.hidden_size, requires_grad=True)
        times = by_turns(functions(prompts), options.repeats, "cpu")
        print(f"| {tokens} | {times['forward'] / times['plain']:.2f} | {times['step'] / times['plain']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
