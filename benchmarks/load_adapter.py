"""Time to load an adapter onto a loaded backbone, in units of the time to build that backbone.

    python benchmarks/load_adapter.py --repeats 5

For each method: an adapter with ten tasks of ten classes on a random ViT-B/16, loaded from a local folder with all checks.
Builds and loads are measured in turns in one process; the smallest time of each is used.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTModel

from cl_prompts import PromptPoolConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.evaluation.report import machine


METHODS = (
    "l2p",
    "dualprompt",
    "coda",
    "hash",
    "layer_grouped",
    "l2p_prefix",
    "vq_prompt",
    "smope",
    "hide",
    "norga",
    "vpt",
    "one_prompt",
    "apt",
    "vpt_nsp2",
    "cpg",
)


def build() -> ViTModel:
    """A random ViT-B/16."""
    return ViTModel(ViTConfig(), add_pooling_layer=False).eval()


def seconds(call: Callable[[], Any]) -> float:
    """Duration of a call in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Print a table with a row per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    vit = build()
    print(f"{machine()}\n\n| method | adapter, MB | build, s | load, s | load / build |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as temporary:
        for method in options.methods:
            model = get_prompt_pool_model(vit, PromptPoolConfig(method=method))
            for task in range(10):
                model.begin_task(range(10 * task, 10 * task + 10))
                model.end_task()
            folder = Path(temporary, method)
            model.save_pretrained(folder)
            vit = model.unload()
            built, loaded = [], []
            for _ in range(options.repeats):
                built.append(seconds(build))
                loaded.append(seconds(partial(PromptPoolModel.from_pretrained, vit, folder, strict_base=True)))
            size = (folder / "adapter_model.safetensors").stat().st_size / 1e6
            ratio = 100 * min(loaded) / min(built)
            print(f"| {method} | {size:.1f} | {min(built):.2f} | {min(loaded):.3f} | {ratio:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
