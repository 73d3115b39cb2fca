"""Operations of torch in the answer for one image, beside those of the plain forward of the same model.

    python benchmarks/operations.py --methods hash smope coda_layer_argmax vpt cpg

A random ViT-Tiny, 224 pixels, ten tasks of ten classes, one thread, torch's profiler. A row has the number of operations
that a method adds, those that take most of the added CPU time, and the microseconds that they take more than in the plain
forward.
"""

import argparse
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import ViTConfig, ViTModel

from cl_prompts import get_prompt_pool_model
from cl_prompts.evaluation.report import machine
from cl_prompts.methods import METHODS, PromptPoolConfig


REPEATS = 10
SHOWN = 4


@torch.no_grad()
def operations(call: Callable[[], object]) -> dict[str, tuple[float, float]]:
    """Microseconds and number of each operation in a call, by name; means of some calls after three."""
    for _ in range(3):
        call()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(REPEATS):
            call()
    return {each.key: (each.self_cpu_time_total / REPEATS, each.count / REPEATS) for each in found.key_averages()}


def main() -> None:
    """Print a row for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=sorted(METHODS), choices=sorted(METHODS))
    torch.set_num_threads(1)
    config = ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768)
    vit, image = ViTModel(config, add_pooling_layer=False).eval(), torch.randn(1, 3, 224, 224)
    plain = operations(lambda: vit(image))
    print(f"{machine()}\n\nplain forward: {sum(count for _, count in plain.values()):.0f} operations\n")
    print("| method | further operations | that take most, microseconds |\n|---|---:|---|")
    for method in parser.parse_args().methods:
        model = get_prompt_pool_model(vit, PromptPoolConfig(method=method))
        for task in range(10):
            model.begin_task(range(10 * task, 10 * task + 10))
            model.end_task()
        model.eval()
        found = operations(lambda model=model: model(pixel_values=image))  # type: ignore[misc]
        more = {name: time - plain.get(name, (0.0, 0.0))[0] for name, (time, _) in found.items()}
        most = sorted(more.items(), key=lambda item: -item[1])[:SHOWN]
        added = sum(count for _, count in found.values()) - sum(count for _, count in plain.values())
        told = ", ".join(f"{name.removeprefix('aten::')} {time:.0f}" for name, time in most)
        print(f"| {method} | {added:.0f} | {told} |", flush=True)
        model.unload()


if __name__ == "__main__":
    main()
