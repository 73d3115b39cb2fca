"""Plots of a run: accuracies and selected prompts. Needs matplotlib (extra `train`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cl_prompts.evaluation.calibration import Reliability
from cl_prompts.evaluation.metrics import AccuracyMatrix
from cl_prompts.runtime.files import write_atomically


ROWS_DRAWN = 6  # largest number of layers in the plot of a selection
NUMBERS_DRAWN = 12  # largest number of tasks for which a matrix shows its numbers
CURVES_NAMED_INSIDE = 8  # with more curves the legend is outside the axes
NAMES_BELOW_EACH_OTHER = 28  # largest number of rows of that legend
LEAST_SPAN = 10  # points of accuracy that the axis of the curves shows at least, so that noise does not fill it
SAME = 0.01  # curves that differ by less than this share of the axis cannot be told apart


def draw(results: Mapping[str, AccuracyMatrix], folder: Path) -> list[Path]:
    """Draw the accuracy curves of all `results`, and of the first the accuracy matrix and, if known, the reliability.

    The plots are written into `folder`. Returns the files.
    """
    name, matrix = next(iter(results.items()))
    curves = {learner: [learner_matrix] for learner, learner_matrix in results.items()}
    title = name + ", task known" * matrix.needs_task
    files = [draw_curves(curves, folder / "curves.png"), draw_matrix(matrix, folder / "matrix.png", title=title)]
    if matrix.reliability:
        files.append(draw_reliability(matrix.reliability[-1], folder / "reliability.png", title=name))
    return files


def draw_curves(results: Mapping[str, Sequence[AccuracyMatrix]], file: Path) -> Path:
    """Draw the mean accuracy over the tasks seen, after each task; `results` has the runs of each learner.

    The plot is written to `file`, which is returned. `draw_lines` says what it looks like.
    """
    curves = {
        name + ", task known" * runs[0].needs_task: [matrix.shown().curve() for matrix in runs]
        for name, runs in results.items()
    }
    return draw_lines(curves, file)


def draw_lines(results: Mapping[str, Sequence[Sequence[float]]], file: Path) -> Path:
    """Draw accuracies in percent after each task; for several runs of a learner, their mean and std.

    `results` has the accuracies of each run of each learner. The plot is written to `file`, which is returned. With many
    learners the legend is outside the axes, ordered by final accuracy. A curve that coincides with an earlier one is
    dashed, with rings around the points, so that both are seen. The axis fits the data.
    """
    curves = {name: np.array(runs) for name, runs in results.items()}
    many = len(curves) > CURVES_NAMED_INSIDE
    if many:
        curves = dict(sorted(curves.items(), key=lambda item: -item[1][:, -1].mean()))
    columns = -(-len(curves) // NAMES_BELOW_EACH_OTHER)
    figure = _figure(6 + 3 * columns, max(4, 0.19 * min(len(curves), NAMES_BELOW_EACH_OTHER))) if many else _figure(6, 4)
    axes = figure.subplots()
    means = [runs.mean(0) for runs in curves.values()]
    low, high = min(mean.min() for mean in means), max(mean.max() for mean in means)
    span = max(high - low, LEAST_SPAN)
    for number, (name, runs) in enumerate(curves.items()):
        tasks, mean = range(1, runs.shape[1] + 1), means[number]
        below = sum(len(mean) == len(other) and abs(mean - other).max() < SAME * span for other in means[:number])
        style: Any = ("-", "--", ":", "-.")[number // 10 % 4]  # ten colors
        if below:
            style = (0, (3, 3 * below))
        points = {"marker": "o", "markersize": 3 + 3 * below, "markerfacecolor": "none" if below else None}
        (line,) = axes.plot(tasks, mean, linestyle=style, label=name, **points)
        if len(runs) > 1:
            std = runs.std(0, ddof=1)
            axes.fill_between(tasks, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="tasks learned", ylabel="mean accuracy over them, %")
    shown = axes.get_ylim()
    missing = max(LEAST_SPAN - (shown[1] - shown[0]), 0) / 2
    axes.set(ylim=(shown[0] - missing, shown[1] + missing))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if many:
        figure.legend(loc="outside right upper", ncols=columns, fontsize="x-small")
    else:
        axes.legend(fontsize="small")
    return _save(figure, file)


def draw_sweep(names: Sequence[str], points: Sequence[tuple[Sequence[Any], Sequence[float]]], file: Path) -> Path:
    """Draw the final average accuracy over the first of some settings, with a curve for each choice of the others.

    Args:
        names: of the settings.
        points: the values of the settings at a point, and the accuracies in percent of its runs.
        file: the plot, which is returned.
    """
    firsts = [values[0] for values, _ in points]
    numbers = all(type(value) in (int, float) for value in firsts)
    known: list[Any] = sorted(set(firsts)) if numbers else list(dict.fromkeys(map(str, firsts)))
    curves: dict[str, list[tuple[float, Sequence[float]]]] = {}
    for (first, *others), runs in points:
        label = ", ".join(f"{name} {value}" for name, value in zip(names[1:], others, strict=True))
        curves.setdefault(label, []).append((first if numbers else known.index(str(first)), runs))
    figure = _figure(6, 4)
    axes = figure.subplots()
    for label, curve in curves.items():
        places, of_place = zip(*sorted(curve, key=lambda point: point[0]), strict=True)
        stds = [np.std(runs, ddof=1) if len(runs) > 1 else 0.0 for runs in of_place]
        axes.errorbar(places, [np.mean(runs) for runs in of_place], stds, marker="o", capsize=3, label=label)
    axes.set(xlabel=names[0], ylabel="final average accuracy, %")
    axes.set_xticks(known if numbers else range(len(known)), [str(value) for value in known])
    axes.grid(alpha=0.3)
    if len(names) > 1:
        axes.legend(fontsize="small")
    return _save(figure, file)


def draw_matrix(matrix: AccuracyMatrix, file: Path, *, title: str = "") -> Path:
    """Draw the accuracy `matrix` with a `title` and write it to `file`, which is returned."""
    table = matrix.shown().table()
    figure = _figure(5, 4)
    axes = figure.subplots()
    image = axes.imshow(table, vmin=0, vmax=100, cmap="viridis")
    numbers = range(len(table))
    axes.set(xlabel="after task", ylabel="accuracy on task", title=title)
    if len(table) <= NUMBERS_DRAWN:
        axes.set(xticks=numbers, yticks=numbers, xticklabels=[n + 1 for n in numbers], yticklabels=[n + 1 for n in numbers])
        for i in numbers:
            for j in range(i, len(table)):
                color = "white" if table[i, j] < 60 else "black"
                axes.text(j, i, f"{table[i, j]:.0f}", ha="center", va="center", fontsize="x-small", color=color)
    figure.colorbar(image, label="%")
    return _save(figure, file)


def draw_reliability(reliability: Reliability, file: Path, *, title: str = "") -> Path:
    """Draw the accuracy in each bin of the confidence with a `title` and write it to `file`, which is returned.

    Bars on the diagonal are calibrated; below the bars is the share of images in each bin of `reliability`.
    """
    images, hits = np.array(reliability.images), np.array(reliability.hits)
    edges = np.linspace(0, 1, len(images) + 1)
    figure = _figure(5, 5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.stairs(hits / np.maximum(images, 1), edges, fill=True, alpha=0.7, label="accuracy")
    above.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle=":", label="as confident as right")
    above.set(ylim=(0, 1), ylabel="accuracy", title=title)
    above.text(0.97, 0.05, f"calibration error {reliability.expected_calibration_error:.1f} %", ha="right")
    above.legend(fontsize="small", loc="upper left")
    below.stairs(images / images.sum(), edges, fill=True, color="gray")
    below.set(xlim=(0, 1), xlabel="confidence", ylabel="images")
    return _save(figure, file)


def draw_selection(counts: Tensor, similarity: Tensor | None, folder: Path) -> Path:
    """Draw how often each prompt was selected, colored by task, and the similarity of prompts. Returns the file.

    If layers (or heads) select separately, the plot has a row for each of the first ones.

    Args:
        counts: from `selection_counts` [tasks, ..., M].
        similarity: from `prompt_similarity` [groups, M, M]; groups is 1 if layers share prompts. None: left out.
        folder: folder of the plot, `selection.png`.
    """
    from matplotlib import colormaps  # an optional dependency

    table = counts.flatten(1, -2).cpu().numpy() if counts.dim() > 2 else counts[:, None].cpu().numpy()
    tasks, rows = len(table), min(table.shape[1], ROWS_DRAWN)
    columns = 1 if similarity is None else 2
    figure = _figure(5.5 * columns, 2.8 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    edges = [prompt - 0.5 for prompt in range(table.shape[2] + 1)]
    color = colormaps["viridis"].resampled(tasks)
    for row in range(rows):
        below = 0 * table[0, row]
        for task in range(tasks):
            above = below + table[task, row]
            axes[row, 0].stairs(above, edges, baseline=below, fill=True, color=color(task), label=f"task {task + 1}")
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
