"""Result tables and plots of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cl_prompts.continual.metrics import AccuracyMatrix


def result_table(results: Mapping[str, AccuracyMatrix], trainable: Mapping[str, int] | None = None) -> str:
    """A Markdown table of FAA, CAA, forgetting and accuracy when just learnt, a row per learner, in percent."""
    lines = [
        "| learner | FAA | CAA | forgetting | when just learnt | trainable |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, matrix in results.items():
        m = matrix.summary()
        size = f"{trainable[name]:,}" if trainable and name in trainable else ""
        numbers = " | ".join(f"{m[key]:.1f}" for key in ("faa", "caa", "forgetting", "learning_accuracy"))
        lines.append(f"| {name} | {numbers} | {size} |")
    return "\n".join(lines)


def draw(results: Mapping[str, AccuracyMatrix], folder: Path) -> list[Path]:
    """Draw the accuracy curves of all learners and the accuracy matrix of the first; returns the files.

    Needs matplotlib (extra `train`).
    """
    from matplotlib.figure import Figure  # an optional dependency

    curves = Figure(figsize=(6, 4), layout="constrained")
    axes = curves.subplots()
    for name, matrix in results.items():
        axes.plot(range(1, len(matrix.columns) + 1), matrix.curve(), marker="o", markersize=3, label=name)
    axes.set(xlabel="tasks learnt", ylabel="mean accuracy over them, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()

    name, matrix = next(iter(results.items()))
    heat = Figure(figsize=(5, 4), layout="constrained")
    axes = heat.subplots()
    image = axes.imshow(matrix.table(), vmin=0, vmax=100, cmap="viridis")
    axes.set(xlabel="after task", ylabel="accuracy on task", title=name)
    heat.colorbar(image, label="%")

    files = [folder / "curves.png", folder / "matrix.png"]
    for figure, file in zip((curves, heat), files, strict=True):
        figure.savefig(file, dpi=120)
    return files
