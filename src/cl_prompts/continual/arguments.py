"""Settings of a run of the trainer."""

from __future__ import annotations

import ast
import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from cl_prompts.continual.optimization import Optimizer, Schedule


Precision = Literal["no", "bf16", "fp16"]


@dataclass
class ContinualArguments:
    """Settings of `ContinualTrainer`. `transformers.HfArgumentParser(ContinualArguments)` reads them from a command line.

    Args:
        output_dir: results folder; None: nothing is written, and the run cannot be resumed.
        num_train_epochs: epochs per task; 1 for a stream without task boundaries.
        max_steps: optimizer steps of each task at most, for a dry run; 0: those of all epochs, by which schedules go.
        batch_size: images of an optimizer step, over all processes.
        gradient_accumulation_steps: number of micro-batches that a batch is split into, with one forward and backward each.
            A step takes less memory and gives the same result, except for terms that compare or count the images of a
            batch, which then see one micro-batch: `class_mask="batch"`, `entropy_weight`, `batchwise_selection`,
            `key_loss="coupled"`, CPG's balance losses, and the contrastive term and class means of HiDe-Prompt and NoRGa
            (docs/methods/hide.md).
        optim: "adam", "adamw" or "sgd".
        learning_rate: learning rate. The backbone of a baseline has 0.0001, or this rate if it is smaller, unless
            `learning_rates` gives one for "base".
        learning_rates: learning rates of single parameter groups ("prompts", "keys", "routers", "head", "base"; HAT's
            "embeddings", SupSup's "scores"): a dict, or
            text for `key_values`, like "head=1e-3,prompts=1e-2". The attribute is a dict.
        optim_args: further options of the torch optimizer: a dict like {"weight_decay": 0.01}, or text like
            "weight_decay=0.01". The attribute is a dict.
        keep_optimizer: carry the optimizer's state from task to task instead of building a new one.
        max_grad_norm: largest gradient norm; 0: no clipping.
        lr_scheduler_type: "constant", "cosine", "linear" or "coda", restarted with every task.
        warmup_steps: steps of the linear warm-up at the start of every task.
        mixed_precision: "no", "bf16" or "fp16".
        seed: seed of orders, augmentations and initial values.
        dataloader_num_workers: number of data loader processes. 0: images are read in this process, one batch ahead in a
            thread if the transform is an image processor and torch computes on a GPU or leaves a core free.
        cache_queries: compute the un-prompted features of all images once instead of in every step, if the method uses them
            and images are not augmented. Takes 4 * D bytes per image.
        query_cache: folder for these features, shared by runs and methods on the same images and base; "": in memory only;
            None: `$CL_PROMPTS_CACHE/queries` if that variable is set, else in memory only.
        query_cache_bytes: limit on the size of the files in that folder; the least recently used ones are removed.
        pixel_cache_bytes: limit on the size of private files in `output_dir` with the resized images in 8 bits, so that
            each is decoded and resized once in a run. 0, or more images than fit: they are read again in every epoch.
        hidden_cache_bytes: limit on the size of private files in `output_dir` with the hidden states of images that are not
            augmented, in 16 bits, behind the blocks below the lowest prompt: steps and evaluations then begin above these
            blocks. Training images are kept if they fit, and test images if both do. 0: none. For one process. Their
            rounding changes results slightly (docs/training.md).
        memory_size: number of images kept for rehearsal, split evenly over the classes; 0: none.
        memory_per_class: number of images kept for rehearsal per class; 0: see `memory_size`.
        memory_batch_size: number of rehearsed images added to each batch; None: `batch_size`.
        calibration_share: share of each task's training images that no prompt is trained on, up to 0.5. The temperature of
            the scores and the threshold of novelty are then chosen on them; a classifier that is computed from features
            also uses them. Baselines leave them out as well. 0: none (docs/methods/classifiers.md).
        forward_transfer: also evaluate each task before it is trained, if its classes are known already.
        novelty: after each task, also evaluate how well the novelty score tells the test images of the tasks seen from
            those of tasks to come. It takes a pass over the test images of these.
        logging_steps: steps between two log entries.
        save_steps: steps between two checkpoints within a task; 0: only the checkpoint at the end of every task.

    Raises:
        ValueError: a setting is out of range or not one of the choices, or `output_dir` is a file.
    """

    output_dir: str | None = None
    num_train_epochs: int = 5
    max_steps: int = 0
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    optim: Optimizer = "adam"
    learning_rate: float = 5e-3
    # HfArgumentParser passes text to fields of this kind.
    learning_rates: dict[str, float] | str | None = field(default_factory=dict)
    optim_args: dict[str, Any] | str | None = field(default_factory=dict)
    keep_optimizer: bool = False
    max_grad_norm: float = 0.0
    lr_scheduler_type: Schedule = "constant"
    warmup_steps: int = 0
    mixed_precision: Precision = "no"
    seed: int = 0
    dataloader_num_workers: int = 0
    cache_queries: bool = True
    query_cache: str | None = None
    query_cache_bytes: int = 8 * 2**30
    pixel_cache_bytes: int = 2 * 2**30
    hidden_cache_bytes: int = 0
    memory_size: int = 0
    memory_per_class: int = 0
    memory_batch_size: int | None = None
    calibration_share: float = 0.0
    forward_transfer: bool = False
    novelty: bool = False
    logging_steps: int = 20
    save_steps: int = 100

    def __post_init__(self) -> None:
        rates = self.learning_rates = key_values("learning_rates", self.learning_rates)
        self.optim_args = key_values("optim_args", self.optim_args)
        for name, choices in (
            ("optim", Optimizer),
            ("lr_scheduler_type", Schedule),
            ("mixed_precision", Precision),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {sorted(get_args(choices))}")
        for name in ("num_train_epochs", "batch_size", "gradient_accumulation_steps", "logging_steps", "query_cache_bytes"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a positive integer")
        if self.memory_batch_size is not None and (type(self.memory_batch_size) is not int or self.memory_batch_size < 1):
            raise ValueError(f"memory_batch_size={self.memory_batch_size!r} must be a positive integer, or None")
        for name in (
            "warmup_steps",
            "seed",
            "dataloader_num_workers",
            "memory_size",
            "memory_per_class",
            "save_steps",
            "max_steps",
            "pixel_cache_bytes",
            "hidden_cache_bytes",
        ):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a non-negative integer")
        for name, rate in {
            "learning_rate": self.learning_rate,
            "max_grad_norm": self.max_grad_norm,
            **rates,
        }.items():
            if not isinstance(rate, (int, float)) or not 0 <= rate < math.inf:
                raise ValueError(f"{name}={rate!r} must be a non-negative number")
        if not isinstance(self.calibration_share, (int, float)) or not 0 <= self.calibration_share <= 0.5:
            raise ValueError(f"calibration_share={self.calibration_share!r} must be from 0 to 0.5")
        if self.memory_size and self.memory_per_class:
            raise ValueError("memory_size and memory_per_class exclude each other: give one of them")
        if self.output_dir is not None:
            existing = next((p for p in (Path(self.output_dir), *Path(self.output_dir).parents) if p.exists()), None)
            if existing is not None and not existing.is_dir():
                raise ValueError(f"output_dir={self.output_dir!r}: {str(existing)!r} is a file, give a folder")

    @property
    def rehearses(self) -> bool:
        """Whether images of earlier tasks are kept."""
        return bool(self.memory_size or self.memory_per_class)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return asdict(self)


def key_values(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    """The options of a setting that is a dict or text.

    Args:
        name: name of the setting, for the error.
        value: a dict; text with comma-separated `key=value`, or a JSON object; None or "": no options. Values that are text
            are read as JSON or Python literals if they are such: "1e-3", "true", "[0.9, 0.99]".

    Raises:
        ValueError: the text is neither.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{name}={value!r} is no JSON object ({error}): write like key=value,key=value") from None
    elif isinstance(value, str):
        # Commas within a value, as in betas=[0.9,0.99], separate nothing.
        items = [item.partition("=") for item in re.split(r",(?=\s*\w+\s*=)", value) if item.strip()]
        if not all(key.strip() and separator for key, separator, _ in items):
            raise ValueError(f"{name}={value!r}: write like key=value,key=value or as a JSON object")
        value = {key.strip(): text.strip() for key, _, text in items}
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} must be a dict, or text like key=value,key=value")
    return {key: _literal(entry) if isinstance(entry, str) else entry for key, entry in (value or {}).items()}


def _literal(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text
