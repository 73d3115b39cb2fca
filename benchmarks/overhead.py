"""Overhead of the library in a training step: time outside backbone, prompts, head and optimizer.

    python benchmarks/overhead.py --batch 16

Visual prompt tuning (shallow, CLS token) is measured without this library, in twenty lines, and with it (PEFT, hooks,
checks, pool, losses), on a ViT of width 16 with 12 blocks, whose arithmetic takes little time. The difference is compared
with the time of a step of ViT-Tiny/16.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from speed import build, by_turns
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from cl_prompts import VPTConfig, get_prompt_pool_model
from cl_prompts.evaluation.report import machine


def by_hand(vit: Any, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """A training step of visual prompt tuning without this library."""
    width = vit.config.hidden_size
    prompts = nn.Parameter(torch.zeros(1, 5, width))
    head = nn.Linear(width, 10)
    optimizer = torch.optim.Adam([prompts, *head.parameters()], lr=1e-3)

    def step() -> None:
        hidden = vit.embeddings(images)
        hidden = torch.cat([hidden[:, :1], prompts.expand(len(images), -1, -1), hidden[:, 1:]], 1)
        for block in vit.layers:
            hidden = block(hidden)
        loss = F.cross_entropy(head(vit.layernorm(hidden[:, 0])), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def through_the_library(vit: Any, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """The same training step with this library."""
    model = get_prompt_pool_model(vit, VPTConfig(prompt_length=5)).train()
    model.begin_task(range(10))
    optimizer = torch.optim.Adam(model.parameter_groups(learning_rate=1e-3))
    model.attach_optimizer(optimizer)

    def step() -> None:
        model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Print both times, and the overhead as a share of a step of ViT-Tiny/16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    labels = torch.arange(options.batch) % 10
    small = torch.randn(options.batch, 3, 32, 32)
    sizes: Any = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, image_size=32)
    hand, library = (ViTModel(ViTConfig(**sizes), add_pooling_layer=False).eval().requires_grad_(False) for _ in range(2))
    times = by_turns(
        {"by hand": by_hand(hand, small, labels), "library": through_the_library(library, small, labels)},
        options.repeats,
        "cpu",
    )
    images = torch.randn(options.batch, 3, 224, 224)
    step = through_the_library(build("tiny", "eager", "cpu"), images, labels)
    step()
    start = time.perf_counter()
    step()
    real = time.perf_counter() - start
    cost = times["library"] - times["by hand"]
    print(machine())
    hand_ms, library_ms = 1e3 * times["by hand"], 1e3 * times["library"]
    print(f"12 blocks of width 16: by hand {hand_ms:.1f} ms, through the library {library_ms:.1f} ms")
    print(f"overhead {1e3 * cost:.1f} ms: {100 * cost / real:.1f} % of a step of ViT-Tiny/16, batch {options.batch}, fp32")


if __name__ == "__main__":
    main()
