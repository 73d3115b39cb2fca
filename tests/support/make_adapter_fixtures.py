"""Adapters as today's code saves them, kept in tests/adapters_v<format version> for test_compatibility.py.

    python tests/support/make_adapter_fixtures.py

makes what is missing: the folder of a new format version, with a base model and images of its own, or the fixture of a
new method in the newest folder. What is there is never written again: it stands for files that others have.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import ViTModel

from cl_prompts import get_prompt_pool_model
from cl_prompts.storage.adapter_state import FORMAT_VERSION
from support.closed_form_models import SEEN, answers, learn_task
from support.families import build
from support.methods import METHODS, WITH_CLASSIFIER
from support.paths import TESTS


NEWEST = TESTS / f"adapters_v{FORMAT_VERSION}"
TASKS = [[4, 1], [0, 3]]
NAMES = {4: "Löwe", 1: "cat", 0: "dog", 3: "zebra"}
EVERY = METHODS | WITH_CLASSIFIER
KEPT = ("adapter_config.json", "adapter_model.safetensors")


def fixture_of(folder: Path, method: str) -> Path:
    """Where a version's folder has a method's adapter."""
    return folder / method.replace(" ", "_")


def base_of(folder: Path) -> Any:
    """The base model of a version's adapters: from its file, for no generator draws the same numbers for ever."""
    base = ViTModel.from_pretrained(folder / "base")
    base.name_or_path = ""  # a place on one machine
    return base.eval()


def images_of(folder: Path) -> torch.Tensor:
    """The images that a version's logits are of."""
    return load_file(folder / "images.safetensors")["pixel_values"]


def make_base(folder: Path) -> None:
    """A base model and images."""
    folder.mkdir()
    base = build("vit")
    base.save_pretrained(folder / "base")
    save_file({"pixel_values": SEEN}, folder / "images.safetensors")


def make(folder: Path, method: str) -> None:
    """A method's adapter after two tasks, and what it answers."""
    base = base_of(folder)
    torch.manual_seed(3)
    model = get_prompt_pool_model(base, EVERY[method]())
    for number, task in enumerate(TASKS):
        names = {c: NAMES[c] for c in task}
        learn_task(model, task, train=model.trains_task(number), class_names=names)
    fixture = fixture_of(folder, method)
    with tempfile.TemporaryDirectory(dir=folder) as room:
        model.save_pretrained(room)
        save_file({"logits": answers(model, images_of(folder))}, Path(room, "logits.safetensors"))
        fixture.mkdir()
        for name in (*KEPT, "logits.safetensors"):
            shutil.copy(Path(room, name), fixture / name)


def main() -> None:
    """Make what is missing."""
    if not NEWEST.exists():
        make_base(NEWEST)
    for method in EVERY:
        if not fixture_of(NEWEST, method).exists():
            make(NEWEST, method)
            print(f"made {fixture_of(NEWEST, method)}")


if __name__ == "__main__":
    main()
