"""Result tables, and a Markdown page per run with its settings, results and remarks on them."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from cl_prompts.evaluation.evaluate import Evaluation
from cl_prompts.evaluation.metrics import AccuracyMatrix
from cl_prompts.runtime.cpu import processor
from cl_prompts.runtime.files import write_atomically
from cl_prompts.runtime.text import markdown_block, markdown_code, markdown_text


# Headings of the measures of `AccuracyMatrix.summary` in tables; those of WHERE_KNOWN only if a learner has the measure.
ALWAYS = {"faa": "FAA", "caa": "CAA", "forgetting": "forgetting", "learning_accuracy": "when just learned"}
WHERE_KNOWN = {
    "faa_task_incremental": "FAA, task known",
    "fwt": "FWT",
    "ece": "calibration error",
    "nll": "NLL",
    "auroc": "AUROC, unknown",
    "fpr95": "FPR95, unknown",
    "drift_r2": "drift R²",
}
NEEDS_TASK = "needs the task"  # in place of measures over all classes
# Classifiers without prompts on the same frozen features, which prompts should beat.
FLOORS = ("sequential linear probe", "sequential cosine probe", "nearest class mean", "discriminant analysis")
PAGE = "results.md"
LEGEND = (
    "In percent; over several seeds mean ± sample standard deviation. FAA: mean accuracy over all tasks after the last. "
    "CAA: mean of that average over the stages. Forgetting: best accuracy ever minus final, mean over earlier tasks. "
    "Calibration error: mean difference of confidence and accuracy in 15 bins of the confidence; NLL: negative log "
    "likelihood, in nats; both after the last task. AUROC and FPR95, unknown: seen classes against those of tasks to come, "
    "by the novelty score, mean over the tasks. Drift R²: how well the map that moves old statistics explains held-out "
    "images of the current task, least over the tasks; 1: all of the change, 0: none."
)
# Under a table on a screen.
SHORT_LEGEND = (
    "FAA: accuracy in percent after the last task, mean over the tasks. CAA: mean of that average after each task.\n"
    "Forgetting: best accuracy ever on a task minus the final one, in points, mean over the earlier tasks."
)
# What a result is compared with in its first sentence: a classifier trained task after task and nothing done about it.
NAIVE = ("sequential linear probe", "sequential cosine probe", "finetune")


@dataclass(frozen=True)
class Result:
    """Results of one learner in one run.

    Args:
        learner: name of the learner, the same for all seeds.
        matrix: accuracies.
        seed: seed of the run.
        trainable: number of parameters trained in the last task; None: unknown.
        seconds: duration of the run; None: unknown.
    """

    learner: str
    matrix: AccuracyMatrix
    seed: int
    trainable: int | None = None
    seconds: float | None = None


def comparison_table(results: Sequence[Result]) -> str:
    """A Markdown table with a row per learner of `results`: mean over seeds ± sample standard deviation, in percent.

    For a single seed there is no deviation. The column with the number of seeds is left out if all learners have one seed.
    Parameters and seconds (mean over seeds) have columns if they are known.

    Raises:
        ValueError: no results, a learner has a seed twice, or the runs have different numbers of tasks.
    """
    learners = _by_learner(results)
    summaries = {name: [result.matrix.summary() for result in runs] for name, runs in learners.items()}
    known = [key for key in WHERE_KNOWN if any(key in summary for runs in summaries.values() for summary in runs)]
    columns = {**ALWAYS, **{key: WHERE_KNOWN[key] for key in known}}
    rows = []
    for name, runs in learners.items():
        row = {"learner": markdown_text(name), "seeds": str(len(runs))}
        for key, heading in columns.items():
            values = [summary[key] for summary in summaries[name] if key in summary]
            digits = 2 if key in ("nll", "drift_r2") else 1
            row[heading] = mean_and_deviation(values, digits) if len(values) == len(runs) else ""
            if runs[0].matrix.needs_task and key in ALWAYS:
                row[heading] = NEEDS_TASK
        sizes = sorted({run.trainable for run in runs if run.trainable is not None})
        row["trainable"] = " to ".join(f"{size:,}" for size in sizes[:: max(len(sizes) - 1, 1)])
        seconds = [run.seconds for run in runs if run.seconds is not None]
        row["seconds"] = f"{mean(seconds):,.0f}" if seconds else ""
        rows.append(row)
    left_out = [heading for heading in ("trainable", "seconds") if not any(row[heading] for row in rows)]
    if all(len(runs) == 1 for runs in learners.values()):
        left_out.append("seeds")
    return _table([{heading: cell for heading, cell in row.items() if heading not in left_out} for row in rows])


def mean_and_deviation(values: Sequence[float], digits: int = 1) -> str:
    """ "57.3 ± 0.7": mean and sample standard deviation, with a number of `digits`; a single value has no deviation."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def matrix_table(matrix: AccuracyMatrix) -> str:
    """A Markdown table of the accuracy `matrix`, tasks counted from 1; with the task known, if the learner needs it."""
    table = matrix.shown().table()
    rows = []
    for i, accuracies in enumerate(table):
        cells = {f"after {j + 1}": "" if math.isnan(a) else f"{a:.1f}" for j, a in enumerate(accuracies)}
        rows.append({"task": str(i + 1), "images": f"{matrix.sizes[i]:,}", **cells})
    return _table(rows)


def measures_by_task(matrix: AccuracyMatrix) -> str:
    """A Markdown table of the novelty measures and the drift's R^2 after each task, tasks counted from 1."""
    rows = []
    for task in sorted({*matrix.novelty, *matrix.drift}):
        found, explained = matrix.novelty.get(task), matrix.drift.get(task)
        shares = {
            "AUROC": found and found.auroc,
            "FPR95": found and found.fpr95,
            "known images refused": found and found.false_alarms,
            "unknown images refused": found and found.found,
        }
        cells = {name: "" if share is None else f"{share:.1f}" for name, share in shares.items()}
        rows.append({"after task": str(task + 1), **cells, "drift R²": "" if explained is None else f"{explained:.2f}"})
    empty = {heading for heading in rows[0] if not any(row[heading] for row in rows)}
    return _table([{heading: cell for heading, cell in row.items() if heading not in empty} for row in rows])


def task_table(evaluations: Sequence[Evaluation], *, needs_task: bool = False) -> str:
    """A Markdown table of the last evaluation with a row per task: accuracies, and shares of right tasks.

    Args:
        evaluations: one per task, from `evaluate` with `task`.
        needs_task: leave out what was measured over all classes.
    """
    rows = []
    for number, evaluation in enumerate(evaluations, start=1):
        shares = {
            "accuracy": None if needs_task else evaluation.accuracy,
            "task known": evaluation.task_incremental,
            "class of the right task": None if needs_task else evaluation.task_of_class,
            "prompts of the right task": evaluation.task_identity,
            **evaluation.by_classifier,
        }
        rows.append({"task": str(number), **{name: "" if s is None else f"{s:.1f}" for name, s in shares.items()}})
    headings = list(rows[0])[1:] if rows else []
    average = {heading: [float(row[heading]) for row in rows if row[heading]] for heading in headings}
    rows.append({"task": "mean", **{name: f"{mean(shares):.1f}" if shares else "" for name, shares in average.items()}})
    empty = {heading for heading, shares in average.items() if not shares}
    return _table([{heading: cell for heading, cell in row.items() if heading not in empty} for row in rows])


def remarks(results: Sequence[Result], floors: Sequence[str] = FLOORS) -> str:
    """Remarks on how far the results of the first learner can be trusted, as Markdown lines.

    Args:
        results: all learners, all seeds.
        floors: learners without prompts to compare the first learner with.

    Raises:
        ValueError: no results.
    """
    learners = _by_learner(results)
    faa = {name: mean(run.matrix.shown().summary()["faa"] for run in runs) for name, runs in learners.items()}
    first, runs = next(iter(learners.items()))
    name = markdown_text(first)
    images = sum(runs[0].matrix.sizes)
    interval = half_width(faa[first] / 100, images)
    lines = [
        f"- {images:,} test images: an accuracy of {faa[first]:.1f} is known to about ± {interval:.1f} points (95 %); "
        "smaller differences say little."
    ]
    if runs[0].matrix.needs_task:
        lines.append(
            f"- {name} needs the task of an image and answers over its classes only: compare it with the column "
            '"FAA, task known" of other learners, not with their FAA.'
        )
    compared = [f for f in floors if f in faa and f != first and not runs[0].matrix.needs_task]
    for floor in compared:
        lead = faa[first] - faa[floor]
        numbers = f"{faa[first]:.1f} against {faa[floor]:.1f}"
        if lead <= 0:
            lines.append(f"- {name} does not beat the {floor} here ({numbers}): what it trains does not pay.")
        elif lead <= interval:
            lines.append(f"- {name} beats the {floor} by no more than that ({numbers}).")
    best = max(compared, key=faa.__getitem__, default=None)
    if best is not None and faa[first] - faa[best] > interval:
        numbers = f"{faa[first]:.1f} against {faa[best]:.1f}"
        lines.append(f"- {name} beats the {best} here ({numbers}): what it trains pays.")
    if not set(floors) & faa.keys():
        lines.append(f"- None of {', '.join(floors)} was run beside it, so nothing says whether its training pays.")
    if len(runs) == 1:
        lines.append("- One seed: how much another one would change is not known.")
    return "\n".join(lines)


def headline(results: Sequence[Result], classes: int | None = None) -> str:
    """What the first learner knows at the end, in one sentence, beside naive training if that is among the results.

    Args:
        results: all learners, all seeds.
        classes: number of classes of all tasks; None: unknown.

    Raises:
        ValueError: no results.
    """
    learners = _by_learner(results)
    faa = {name: mean(run.matrix.shown().summary()["faa"] for run in runs) for name, runs in learners.items()}
    first, runs = next(iter(learners.items()))
    tasks = len(runs[0].matrix.columns)
    of_all = "" if classes is None else f" of all {classes:,} classes"
    text = (
        f"After {tasks} task{'s' * (tasks != 1)}, {markdown_text(first)} recognizes {faa[first]:.1f} % of the test images"
        f"{of_all}"
    )
    if runs[0].matrix.needs_task:
        return f"{text}, if it is told which task each is from."
    naive = next((name for name in NAIVE if name in faa and name != first), None)
    return f"{text}; a classifier trained naively, task after task: {faa[naive]:.1f} %." if naive else f"{text}."


def half_width(share: float, images: int) -> float:
    """Half the width of Wilson's 95 % interval, in percent, of an accuracy `share` (0 to 1) on a number of `images`."""
    z = 1.96
    spread = math.sqrt(share * (1 - share) / images + (z / images) ** 2 / 4)
    return 100 * z * spread / (1 + z * z / images)


def run_page(
    folder: str | os.PathLike[str],
    results: Sequence[Result],
    *,
    command: str,
    model: str,
    data: str,
    arguments: Mapping[str, Any],
    seconds: float,
    classes: int | None = None,
    evaluations: Sequence[Evaluation] = (),
    selection: str = "",
    plots: Sequence[Path] = (),
    floors: Sequence[str] = FLOORS,
) -> Path:
    """Write `results.md` into a run's folder, atomically. Returns the file.

    Args:
        folder: the run's folder.
        results: all learners, all seeds; the page is about the first learner.
        command: command line that repeats the run.
        model: the backbone, as text or Hub id.
        data: the data, as text or Hub id.
        arguments: all settings by name.
        seconds: duration of the run.
        classes: number of classes of all tasks; None: unknown.
        evaluations: results of the last evaluation, one per task, from `evaluate` with `task`.
        selection: text from `selection_summary`.
        plots: PNG files in the folder.
        floors: as in `remarks`.

    Raises:
        ValueError: there are no results, or a plot is not in the folder.
    """
    home = Path(folder)
    for plot in plots:
        if not plot.is_file() or not plot.resolve().is_relative_to(home.resolve()):
            raise ValueError(f"{plot} is no picture in {home}: draw it there first")
    learners = _by_learner(results)
    first, runs = next(iter(learners.items()))
    seeds = ", ".join(str(run.seed) for run in runs)
    facts = {
        "model": model,
        "data": data,
        "tasks": str(len(runs[0].matrix.columns)),
        "seeds": seeds,
        "seconds": f"{seconds:,.0f}",
        "machine": machine(),
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    settings = [
        {"argument": markdown_code(name), "value": markdown_text(json.dumps(value, default=str), 300)}
        for name, value in arguments.items()
    ]
    links = [f"![{plot.stem}]({plot.resolve().relative_to(home.resolve()).as_posix()})" for plot in plots]
    matrix = runs[0].matrix
    of_seed = f", seed {runs[0].seed}" if len(runs) > 1 else ""
    sections = [
        f"# {markdown_text(first)}",
        headline(results, classes),
        "\n".join(f"- {name}: {markdown_text(value, 300)}" for name, value in facts.items()),
        LEGEND,
        comparison_table(results),
        remarks(results, floors),
        f"## Accuracy on each task{', task known' * matrix.needs_task}{of_seed}\n\n{matrix_table(matrix)}",
        f"## After the last task{of_seed}\n\n{task_table(evaluations, needs_task=matrix.needs_task)}" * bool(evaluations),
        f"## Unknown classes and drift{of_seed}\n\n{measures_by_task(matrix)}" if matrix.novelty or matrix.drift else "",
        f"## What was selected{of_seed}\n\n{selection}" if selection else "",
        "\n".join(links),
        "## Repeat it\n\n" + markdown_block(command, "sh"),
        _table(settings) if settings else "",
    ]
    write_atomically(home / PAGE, "\n\n".join(filter(None, sections)) + "\n")
    return home / PAGE


def machine() -> str:
    """CPU, number of cores, GPUs, and versions of Python and libraries, in one line."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] or ["no GPU"]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "cl-prompts"))
    return f"{processor()}, {os.cpu_count()} cores, {', '.join(gpus)}; Python {platform.python_version()}, {libraries}"


def _by_learner(results: Sequence[Result]) -> dict[str, list[Result]]:
    if not results:
        raise ValueError("there are no results to report")
    learners: dict[str, list[Result]] = {}
    for result in results:
        known = learners.setdefault(result.learner, [])
        if result.seed in [other.seed for other in known]:
            raise ValueError(f"{result.learner!r} has seed {result.seed} twice: a mean over seeds counts each once")
        known.append(result)
    tasks = {name: sorted({len(run.matrix.columns) for run in runs}) for name, runs in learners.items()}
    if len({number for numbers in tasks.values() for number in numbers}) > 1:
        raise ValueError(f"runs with different numbers of tasks cannot stand in one table: {tasks}")
    return learners


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table. The first column is aligned left, the others right."""
    headings = list(rows[0])

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(headings) - 1)
    return "\n".join([line(headings), rule, *(line([row[heading] for heading in headings]) for row in rows)])
