"""Checks that settings, learner and stream of a run fit each other. They run before training."""

from __future__ import annotations

import warnings
from collections.abc import Sized

import torch
from accelerate import Accelerator, DistributedType

from cl_prompts.continual.arguments import ContinualArguments
from cl_prompts.continual.streams.indexed import IndexedStream
from cl_prompts.continual.streams.scenarios import ClassIncrementalStream
from cl_prompts.continual.streams.stream import Stream
from cl_prompts.learner.protocol import Learner


def check_run(model: Learner, stream: Stream, args: ContinualArguments, classifiers: Sized) -> None:
    """Raise ValueError if settings, learner, stream and extra classifiers do not fit each other.

    Args:
        model: the learner.
        stream: the stream.
        args: settings.
        classifiers: the extra classifiers.
    """
    if args.rehearses and not isinstance(stream, IndexedStream):
        raise ValueError("rehearsal needs images by row number, which this stream cannot give: load the data set whole")
    if not isinstance(stream, IndexedStream) and (model.needs_consolidation or classifiers):
        raise ValueError(
            f"{type(model).__name__} or an extra classifier needs each task's images once more after its training, "
            "which this stream cannot read again: load the data set whole, or leave out head, alignment and classifiers"
        )
    leaves_out = isinstance(stream, IndexedStream) and not stream.task_free and model.replay != "memory_only"
    if args.calibration_share and not leaves_out:
        raise ValueError(
            f"calibration_share={args.calibration_share}: images are left out of a task's training, so the stream must "
            "have tasks and be loaded whole, and the learner must train on the task's images: leave it out"
        )
    if args.rehearses and model.replay == "none":
        raise ValueError(f"{type(model).__name__} rehearses nothing: leave out memory_size and memory_per_class")
    if not stream.task_free and any(len(task.classes) == 1 for task in stream.tasks):
        model.check_one_class()
    if args.rehearses and model.class_mask == "task":
        raise ValueError(
            'class_mask="task" hides the classes of rehearsed images from the loss: set class_mask="none" in the config'
        )
    known = sorted({c for task in stream.tasks for c in task.classes} & set(model.classes)) if model.num_tasks else []
    if known and isinstance(stream, ClassIncrementalStream):
        raise ValueError(f"the learner knows the classes {known[:10]} already: leave them out of the stream")
    if model.num_tasks and len(classifiers):
        raise ValueError("extra classifiers cannot be fitted to the classes of earlier runs: leave them out")
    if stream.task_free and classifiers:
        raise ValueError("extra classifiers are fitted after each task, and this stream has no tasks: leave them out")
    if stream.task_free and args.num_train_epochs != 1:
        raise ValueError(
            f"num_train_epochs={args.num_train_epochs}: a stream without task boundaries has one epoch, set it to 1"
        )
    if model.needs_memory and not args.rehearses:
        raise ValueError(f"{type(model).__name__} learns from remembered images: set memory_size or memory_per_class")
    if stream.task_free and model.replay == "memory_only":
        raise ValueError(f"{type(model).__name__} trains on the memory after each task: use a stream with tasks")


def check_engine(engine: DistributedType) -> None:
    """Raise ValueError if Accelerate's `engine` shards the complete model, including parameters that grow with tasks."""
    if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"Accelerate is set to {engine.value}, which shards the whole model, also prompts and heads that grow with the "
            "tasks: leave it out of `accelerate config`; cl_prompts.tuner.sharding.shard_frozen_blocks shards the backbone"
        )


def warn_of_slow_bf16(accelerator: Accelerator) -> None:
    """Warn if a run asks for bf16 on a processor without kernels for it, where a matrix product takes 20 times as long.

    Warns:
        UserWarning: `mixed_precision="bf16"` on a CPU for which oneDNN has no bf16 kernels (on x86: without AVX-512).
    """
    on_cpu = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
    if on_cpu and not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        warnings.warn(
            'mixed_precision="bf16" is many times slower than "no" on this processor, for which torch has no fast bf16 '
            'products: set mixed_precision="no" (--mixed_precision no)',
            stacklevel=3,
        )
