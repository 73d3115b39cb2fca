"""Result tables and plots of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from cl_prompts.continual.metrics import AccuracyMatrix


ROWS_DRAWN = 6


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


def draw_selection(counts: Tensor, similarity: Tensor | None, folder: Path) -> Path:
    """Draw how often each prompt was chosen, coloured by task, beside how alike prompts are; returns the file.

    A row for each of the first layers (or heads) that choose by themselves. Needs matplotlib (extra `train`).

    Args:
        counts: `selection_counts` [tasks, ..., M].
        similarity: `prompt_similarity` [groups, M, M]; groups is 1 where layers share prompts. None: leave it out.
        folder: where `selection.png` goes.
    """
    from matplotlib import colormaps  # an optional dependency
    from matplotlib.figure import Figure

    table = counts.flatten(1, -2).cpu().numpy() if counts.dim() > 2 else counts[:, None].cpu().numpy()
    tasks, rows = len(table), min(table.shape[1], ROWS_DRAWN)
    columns = 1 if similarity is None else 2
    figure = Figure(figsize=(5.5 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    edges = [prompt - 0.5 for prompt in range(table.shape[2] + 1)]
    colour = colormaps["viridis"].resampled(tasks)
    for row in range(rows):
        below = 0 * table[0, row]
        for task in range(tasks):
            above = below + table[task, row]
            axes[row, 0].stairs(above, edges, baseline=below, fill=True, color=colour(task), label=f"task {task + 1}")
            below = above
        axes[row, 0].set(xlabel="prompt", ylabel="times chosen", title="" if rows == 1 else f"group {row + 1}")
        axes[row, 0].xaxis.get_major_locator().set_params(integer=True)
        if similarity is not None:
            group = similarity[row if len(similarity) > 1 else 0].cpu().numpy()
            image = axes[row, 1].imshow(group, vmin=-1, vmax=1, cmap="coolwarm")
            axes[row, 1].set(xlabel="prompt", ylabel="prompt")
    if similarity is not None:
        figure.colorbar(image, ax=axes[:, 1], label="cosine", shrink=0.8 / rows, anchor=(0, 1))
    axes[0, 0].legend(fontsize="x-small", ncols=1 + tasks // 10)
    file = folder / "selection.png"
    figure.savefig(file, dpi=120)
    return file
