"""Time of forward and backward of linear layers and attention on a CPU, in bf16 and fp32.

python benchmarks/backward.py
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from speed import by_turns
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.evaluation.report import machine


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as transformers' eager function computes it."""
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


def forward_and_backward(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> None:
    """Run one attention function forward, and backward to its inputs."""
    attend(q, k, v).sum().backward()


def main() -> None:
    """Print milliseconds for 32 images of 197 tokens."""
    print(machine())
    for dtype in (torch.bfloat16, torch.float32):
        for inner, outer in ((192, 768), (768, 192), (768, 768)):
            x, weight, gradient = (torch.randn(*size).to(dtype) for size in ((6304, inner), (outer, inner), (6304, outer)))
            times = by_turns(
                {"forward": partial(F.linear, x, weight), "backward": partial(torch.mm, gradient, weight)}, 9, "cpu"
            )
            print(f"linear {inner} -> {outer}, {dtype}: " + ", ".join(f"{n} {1e3 * s:.1f} ms" for n, s in times.items()))
        q, k, v = (torch.randn(32, 3, 197, 64).to(dtype).requires_grad_() for _ in range(3))
        attention: dict[str, Any] = {"sdpa": F.scaled_dot_product_attention, "eager": eager}
        for name, attend in attention.items():
            times = by_turns(
                {
                    "forward": partial(attend, q, k, v),
                    "forward and backward": partial(forward_and_backward, attend, q, k, v),
                },
                9,
                "cpu",
            )
            print(f"attention {name}, {dtype}: " + ", ".join(f"{n} {1e3 * s:.1f} ms" for n, s in times.items()))


if __name__ == "__main__":
    main()
