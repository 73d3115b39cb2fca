"""Draws which files of cl_prompts one forward of L2P runs through, as a profiler records it.

    python docs/figures/reading_path.py

The recorded calls stand in the picture's metadata; tests/docs/test_figures.py records and draws again and compares.
"""

import json
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from transformers import ViTConfig, ViTModel

import cl_prompts
from cl_prompts import L2PConfig, get_prompt_pool_model


FILE = Path(__file__).parents[1] / "images" / "reading_path.svg"
PACKAGE = Path(cl_prompts.__file__).parent
# The files to read, in order; docs/development.md lists them.
READ = (
    "tuner/forward.py",
    "methods/l2p/pool.py",
    "methods/shared/selection.py",
    "backbones/prompted_backbone.py",
    "backbones/block_hooks.py",
    "heads/incremental.py",
)
INK, QUIET, FILL, OTHER = "#1f2937", "#9ca3af", "#fde8d0", "#f3f4f6"
SHOWN = 6  # functions of a file that are named


def record() -> dict[str, Any]:
    """Functions by file, in the order of their first call, in one forward; and the number of lines of each file."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = get_prompt_pool_model(ViTModel(ViTConfig(**size, image_size=32, patch_size=8)), L2PConfig())
    model.begin_task([0, 1])
    model.eval()
    images = torch.rand(2, 3, 32, 32)
    functions: dict[str, list[str]] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event != "call" or not path.is_relative_to(PACKAGE):
            return
        name, found = frame.f_code.co_name, functions.setdefault(path.relative_to(PACKAGE).as_posix(), [])
        if not name.startswith("<") and name not in found:
            found.append(name)

    with torch.no_grad():
        model(pixel_values=images)  # the first pass also tries whether the last block may be narrowed
        sys.setprofile(note)
        try:
            model(pixel_values=images)
        finally:
            sys.setprofile(None)
    lines = {name: (PACKAGE / name).read_text().count("\n") for name in READ}
    return {
        "read": {name: functions.get(name, []) for name in READ},
        "lines": lines,
        "others": sorted(set(functions) - set(READ)),
    }


def draw(found: dict[str, Any]) -> Figure:
    """The picture of a record: the files to read from top to bottom, with the functions that ran; the others below."""
    figure = Figure(figsize=(9.15, 6.6), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 9.15)
    axes.set_ylim(6.6, 0)
    axes.axis("off")

    def box(y: float, height: float, title: str, text: str, color: str) -> None:
        axes.add_patch(FancyBboxPatch((0.3, y), 8.5, height, "round,pad=0,rounding_size=0.06", fc=color, ec=QUIET, lw=0.8))
        axes.text(0.5, y + height / 2, title, size=8.6, va="center", color=INK, weight="bold")
        axes.text(3.05, y + height / 2, text, size=8.2, va="center", color=INK)

    for number, (name, functions) in enumerate(found["read"].items()):
        more = len(functions) - SHOWN
        text = ", ".join(functions[:SHOWN]) + (f" and {more} more" if more > 0 else "")
        box(0.2 + 0.82 * number, 0.62, f"{name}\n{found['lines'][name]} lines", text, FILL)
        if number:
            top = 0.2 + 0.82 * number
            arrow = FancyArrowPatch((1.0, top - 0.2), (1.0, top), arrowstyle="-|>", mutation_scale=8, color=QUIET, lw=1.0)
            axes.add_patch(arrow)
    names, rows = found["others"], []
    for start in range(0, len(names), 4):
        rows.append(", ".join(names[start : start + 4]))
    top = 0.2 + 0.82 * len(found["read"])
    axes.text(0.3, top + 0.12, "Their names tell what they do; they also ran:", size=8.2, color=INK, va="center")
    axes.text(0.3, top + 0.3, "\n".join(rows), size=8.2, color=INK, va="top")
    return figure


def save(file: Path = FILE) -> None:
    """Record, draw and write the file."""
    found = record()
    with matplotlib.rc_context(
        {"svg.hashsalt": "cl_prompts", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"]}
    ):
        draw(found).savefig(file, metadata={"Date": None, "Description": json.dumps(found)})


if __name__ == "__main__":
    save()
