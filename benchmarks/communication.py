"""Bytes that a process sends in a training step, on two processes.

    python benchmarks/communication.py
    python benchmarks/communication.py --methods hash l2p --batch 64

A row per method: trained numbers, bytes of their gradients, which DistributedDataParallel sums, and bytes of what the
process gives to other collective operations: in a step, and when the statistics of the task are gathered. ViT-Tiny's width
and depth with images of 32 pixels, whose size changes none of the numbers; a first task of ten classes.
"""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTConfig, ViTModel

from cl_prompts import PromptPoolConfig, get_prompt_pool_model
from cl_prompts.evaluation.report import machine
from cl_prompts.methods.registry import METHODS


CLASSES, PROCESSES = 10, 2
sent = 0


def counted(operation: Callable[..., Any], place: int) -> Callable[..., Any]:
    """A collective operation that also counts the bytes of its argument number `place`."""

    def call(*args: Any) -> Any:
        global sent
        sent += args[place].numel() * args[place].element_size()
        return operation(*args)

    return call


def row(method: str, batch: int) -> str:
    """The method's row, for this process's half of a `batch`."""
    global sent
    size = dict(hidden_size=192, num_attention_heads=3, intermediate_size=192, image_size=32)
    model = get_prompt_pool_model(ViTModel(ViTConfig(**size), add_pooling_layer=False), PromptPoolConfig(method=method))
    model.begin_task(range(CLASSES))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.attach_optimizer(torch.optim.SGD(model.parameter_groups(learning_rate=0.1)))
    wrapped = DistributedDataParallel(model)
    wrapped.train()
    own, rank = batch // PROCESSES, dist.get_rank()
    sent = 0
    images, numbers = torch.randn(own, 3, 32, 32), torch.arange(own) + rank * own
    wrapped(pixel_values=images, labels=numbers % CLASSES, sample_ids=numbers).loss.backward()
    step, sent = sent, 0
    model.gather_statistics()
    return f"| {method} | {trained:,} | {4 * trained:,} | {step:,} | {sent:,} |"


def process(rank: int, folder: str, args: argparse.Namespace) -> None:
    """One of two processes; the first one prints the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    dist.all_reduce, dist.all_gather = counted(dist.all_reduce, 0), counted(dist.all_gather, 1)
    for method in args.methods:
        torch.manual_seed(0)
        found = row(method, args.batch)
        if not rank:
            print(found, flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trained = sorted(set(METHODS) - {"none"})
    parser.add_argument("--methods", nargs="+", default=trained, help="default: all that train prompts")
    parser.add_argument("--batch", type=int, default=32, help="images of both processes together")
    args = parser.parse_args()
    print(machine())
    print("| method | trained numbers | gradients, bytes a step | other, bytes a step | gathered, bytes a task |")
    print("|---|---:|---:|---:|---:|")
    with TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(process, (str(Path(folder)), args), nprocs=PROCESSES, start_method="spawn")


if __name__ == "__main__":
    main()
