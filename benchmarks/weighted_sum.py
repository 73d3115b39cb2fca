"""Why a step of CODA-Prompt grows: the weighted sum of the frozen components of five blocks, in the ways torch has.

    python benchmarks/weighted_sum.py --batch 4 16 64

For a few images the sum costs as much as reading the components (and packing them for the product), not its
multiplications. A row per number of images: CPU milliseconds for all five blocks, the least of several turns. "read" sums
the components alone, "product" is what the pool does, "other layout" has the components transposed in memory, "all blocks"
is one product for all, "image by image" a product of matrix and vector each. "bf16" changes the numbers and is here for
comparison. "scores" are the cosines with the keys, and "scores, kept" the same with norms and products of the frozen keys
computed before.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from growth import least
from torch.nn import functional as F

from cl_prompts.evaluation.report import machine
from cl_prompts.methods.coda.pool import cosines


BLOCKS, ROWS, WIDTH = 5, 8, 192


class Sums:
    """The frozen components of all blocks, and the ways to sum them.

    Args:
        count: components of a block.
    """

    def __init__(self, count: int) -> None:
        self.joined = torch.randn(BLOCKS, count, ROWS * WIDTH)
        self.transposed = [block.T.contiguous() for block in self.joined]
        self.half = self.joined.bfloat16()
        self.keys, self.attention = torch.randn(2, BLOCKS, count, WIDTH)
        self.products = self.attention * self.keys / self.keys.norm(dim=2, keepdim=True)
        self.squares = self.attention.square()

    def ways(self, batch: int) -> dict[str, Callable[[], Any]]:
        """Calls by name, for a number of images."""
        weights, query = torch.randn(BLOCKS, batch, self.joined.shape[1]), torch.randn(batch, WIDTH)
        half = weights.bfloat16()
        return {
            "read": lambda: [block.sum() for block in self.joined],
            "product": lambda: [a @ b for a, b in zip(weights, self.joined, strict=True)],
            "other layout": lambda: [F.linear(a, b) for a, b in zip(weights, self.transposed, strict=True)],
            "all blocks": lambda: weights @ self.joined,
            "image by image": lambda: [[b.T @ row for row in a] for a, b in zip(weights, self.joined, strict=True)],
            "bf16": lambda: [a @ b for a, b in zip(half, self.half, strict=True)],
            "scores": lambda: [cosines(query, a, k) for a, k in zip(self.attention, self.keys, strict=True)],
            "scores, kept": lambda: [
                (query @ p.T) / (query.square() @ s.T).clamp_min(1e-12).sqrt()
                for p, s in zip(self.products, self.squares, strict=True)
            ],
        }


def main() -> None:
    """Print a row for each number of images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--components", type=int, default=1990, help="of a block: 199 tasks of ten")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sums = Sums(options.components)
    print(machine())
    for number, batch in enumerate(options.batch):
        ways = sums.ways(batch)
        if not number:
            print(f"| images | {' | '.join(ways)} |\n|---:|{'---:|' * len(ways)}")
        print(f"| {batch} | {' | '.join(f'{each:.1f}' for each in least(options.repeats, *ways.values()))} |", flush=True)


if __name__ == "__main__":
    main()
