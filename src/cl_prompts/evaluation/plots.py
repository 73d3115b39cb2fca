"""Pictures of a run: accuracies, and what was selected. Needs matplotlib (extra `train`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cl_prompts.evaluation.metrics import AccuracyMatrix
from cl_prompts.runtime.files import write_atomically


ROWS_DRAWN = 6  # layers of a selection
NUMBERS_DRAWN = 12  # a matrix of more tasks has no room for them
CURVES_NAMED_INSIDE = 8  # more names go beside the picture
NAMES_BELOW_EACH_OTHER = 28


def draw(results: Mapping[str, AccuracyMatrix], folder: Path) -> list[Path]:
    """Draw into `folder` the accuracy curves of all `results` and the accuracy matrix of the first; returns the files."""
    name, matrix = next(iter(results.items()))
    curves = {learner: [found] for learner, found in results.items()}
    return [draw_curves(curves, folder / "curves.png"), draw_matrix(matrix, folder / "matrix.png", title=name)]


def draw_curves(results: Mapping[str, Sequence[AccuracyMatrix]], file: Path) -> Path:
    """Draw the mean accuracy over the tasks seen, after each task; with several runs of a learner, mean and std of them.

    `results` has the runs of each learner; the picture goes to `file`, which is returned.
    Many learners are named beside the picture, the best at the end first.
    """
    curves = {name: np.array([matrix.curve() for matrix in runs]) for name, runs in results.items()}
    many = len(curves) > CURVES_NAMED_INSIDE
    if many:
        curves = dict(sorted(curves.items(), key=lambda item: -item[1][:, -1].mean()))
    columns = -(-len(curves) // NAMES_BELOW_EACH_OTHER)
    figure = _figure(6 + 3 * columns, max(4, 0.19 * min(len(curves), NAMES_BELOW_EACH_OTHER))) if many else _figure(6, 4)
    axes = figure.subplots()
    for number, (name, found) in enumerate(curves.items()):
        tasks, mean = range(1, found.shape[1] + 1), found.mean(0)
        style = ("-", "--", ":", "-.")[number // 10 % 4]  # ten colours
        (line,) = axes.plot(tasks, mean, marker="o", markersize=3, linestyle=style, label=name)
        if len(found) > 1:
            std = found.std(0, ddof=1)
            axes.fill_between(tasks, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="tasks learnt", ylabel="mean accuracy over them, %")
    if not many:  # from 0 on, dozens of curves are one
        axes.set(ylim=(0, 100))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if many:
        figure.legend(loc="outside right upper", ncols=columns, fontsize="x-small")
    else:
        axes.legend(fontsize="small")
    return _save(figure, file)


def draw_matrix(matrix: AccuracyMatrix, file: Path, *, title: str = "") -> Path:
    """Draw the accuracy `matrix` under `title` into `file`, which is returned."""
    table = matrix.table()
    figure = _figure(5, 4)
    axes = figure.subplots()
    image = axes.imshow(table, vmin=0, vmax=100, cmap="viridis")
    numbers = range(len(table))
    axes.set(xlabel="after task", ylabel="accuracy on task", title=title)
    if len(table) <= NUMBERS_DRAWN:
        axes.set(xticks=numbers, yticks=numbers, xticklabels=[n + 1 for n in numbers], yticklabels=[n + 1 for n in numbers])
        for i in numbers:
            for j in range(i, len(table)):
                colour = "white" if table[i, j] < 60 else "black"
                axes.text(j, i, f"{table[i, j]:.0f}", ha="center", va="center", fontsize="x-small", color=colour)
    figure.colorbar(image, label="%")
    return _save(figure, file)


def draw_selection(counts: Tensor, similarity: Tensor | None, folder: Path) -> Path:
    """Draw how often each prompt was chosen, coloured by task, beside how alike prompts are; returns the file.

    A row for each of the first layers (or heads) that choose by themselves.

    Args:
        counts: `selection_counts` [tasks, ..., M].
        similarity: `prompt_similarity` [groups, M, M]; groups is 1 where layers share prompts. None: leave it out.
        folder: where `selection.png` goes.
    """
    from matplotlib import colormaps  # an optional dependency

    table = counts.flatten(1, -2).cpu().numpy() if counts.dim() > 2 else counts[:, None].cpu().numpy()
    tasks, rows = len(table), min(table.shape[1], ROWS_DRAWN)
    columns = 1 if similarity is None else 2
    figure = _figure(5.5 * columns, 2.8 * rows)
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
    return _save(figure, folder / "selection.png")


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # an optional dependency

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, file: Path) -> Path:
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    write_atomically(file, content.getvalue())
    return file
