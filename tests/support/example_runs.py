"""Runs of examples/train_cil.py on a few of scikit-learn's digits, in this process or in one of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel
from safetensors.torch import load_file
from torch import Tensor

from cl_prompts.runs.images import digits
from support.paths import EXAMPLES


CLASSES, TRAIN, TEST = 4, 8, 4  # images of a class
TINY = [
    "--tasks",
    "2",
    "--num_train_epochs",
    "2",
    "--batch_size",
    "8",
    "--logging_steps",
    "1",
    "--save_steps",
    "1",
    "--dataloader_num_workers",
    "0",
]


def few_digits(folder: Path) -> Path:
    """A folder of parquet files: the first images of the first classes."""
    for split, count in (("train", TRAIN), ("test", TEST)):
        rows = digits()[split]
        labels = np.asarray(rows["label"])
        chosen = np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(CLASSES)])
        few = rows.select(chosen).cast_column("label", ClassLabel(names=[str(c) for c in range(CLASSES)]))
        few.to_parquet(str(folder / f"{split}.parquet"))
    return folder


def process(data: Path, output: Path, *line: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen[str]:
    """A run in a process of its own that has just been started."""
    command = [*launcher, str(EXAMPLES / "train_cil.py"), "--dataset", str(data), *TINY, "--output_dir", str(output), *line]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(data: Path, output: Path, *line: str, launcher: tuple[str, ...] = (sys.executable,)) -> str:
    """What a run in a process of its own prints; it must not fail."""
    run = process(data, output, *line, launcher=launcher)
    said, errors = run.communicate()
    assert run.returncode == 0, errors[-3000:]
    return said


def matrices(output: Path) -> dict[str, Any]:
    """The accuracy matrices of a complete run."""
    found: dict[str, Any] = json.loads((output / "results.json").read_text())["results"]
    return found


def tensors(output: Path, name: str = "adapter_model.safetensors") -> dict[str, Tensor]:
    """The saved adapter, or the baseline."""
    return load_file(output / "adapter" / name)
