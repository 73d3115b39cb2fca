"""Runs learners with several seeds and writes a table of means and standard deviations.

    cl-prompts compare compare_cifar100_mini --seeds 0 1 2 --jobs 2 --output results/cifar100-mini
    cl-prompts compare rows.yaml --seeds 0 --rows L2P EWC --model FOLDER --dataset FOLDER

The YAML file (a comparison of the package, or a path) has `settings`, the arguments of all runs, and `rows`, those of
each row by name, like `L2P: {recipe: l2p_cifar100_mini, max_grad_norm: 1.0}`. `sweep` adds a row for each combination of
values, like `{config: {prompt_length: [1, 5, 10], top_k: [1, 5]}}`, and a plot of the accuracy over the first of these
settings, with a curve for each value of the others. Arguments that this command does not know are
passed to every run and override those of the file. Each run has its own process and folder. Failed runs are listed below
the table and do not stop the others. When the script is called again, complete runs are read and killed ones are resumed.
Rows with another number of tasks than most are in separate tables.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from cl_prompts.continual import ContinualArguments
from cl_prompts.evaluation.plots import draw_curves, draw_sweep
from cl_prompts.evaluation.report import LEGEND, Result, comparison_table, machine
from cl_prompts.runs import RECIPES
from cl_prompts.runs.arguments import OPTIONS, Arguments, as_dict, as_word, read_arguments
from cl_prompts.runs.run_folder import described, differences, folder_of, is_complete, read_results
from cl_prompts.runs.sweep import Sweep, read_sweep
from cl_prompts.runtime.files import write_atomically


COMMAND = "cl-prompts compare"
PAGE, NUMBERS = "comparison.md", "comparison.json"


@dataclass
class Run:
    """One row with one seed.

    Args:
        row: name of the row in the table.
        words: arguments of `cl-prompts train`.
        arguments, training: the parsed arguments.
        error: why the run failed or cannot be read; "" without an error.
    """

    row: str
    words: list[str]
    arguments: Arguments
    training: ContinualArguments
    error: str = ""

    @property
    def folder(self) -> Path:
        """The results folder of the run."""
        return folder_of(self.training)

    @property
    def done(self) -> bool:
        """Whether the folder has the complete results of this run."""
        return is_complete(self.folder) and not differences(described(self.arguments, self.training), self.folder)


def read_rows(name: str) -> dict[str, dict[str, Any]]:
    """The arguments of each row, with those of all runs. Exits if the file does not exist or is invalid."""
    return read_comparison(name)[0]


def read_comparison(name: str) -> tuple[dict[str, dict[str, Any]], Sweep | None]:
    """`read_rows`, and the sweep whose rows are among them."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in RECIPES.glob("compare_*.yaml"))
        sys.exit(f"no comparison {name!r}: choose one of {known} or name a YAML file")
    content = yaml.safe_load(path.read_text())
    parts = {"rows", "settings", "sweep"}
    if not isinstance(content, dict) or set(content) - parts or not isinstance(content.get("rows") or {}, dict):
        content = {}
    if not {"rows", "sweep"} & set(content):
        sys.exit(
            f"{path} must have `rows`, a mapping of names to arguments, or a `sweep`, and may have `settings`; nothing else"
        )
    settings, rows = content.get("settings") or {}, content.get("rows") or {}
    for row, own in [("settings", settings), *rows.items()]:
        if not isinstance(row, str):
            sys.exit(f"{path}: {row!r} is not a text, as names of rows must be: put it in quotes")
        if not isinstance(own or {}, dict):
            sys.exit(f"{path}: {row!r} must have a mapping of arguments, not {own!r}")
    sweep = None
    if "sweep" in content:
        try:
            sweep = read_sweep(content["sweep"], settings)
        except ValueError as error:
            sys.exit(f"{path}: {error}")
    read = {row: {**settings, **(own or {})} for row, own in rows.items()} | (sweep.rows if sweep else {})
    if not read:
        sys.exit(f"{path} has no rows")
    return read, sweep


def as_line(settings: Mapping[str, Any]) -> list[str]:
    """{"seed": 1, "config": {"top_k": 2}} -> ["--seed", "1", "--config", "top_k=2"]; empty values are left out."""
    words = []
    for name, value in settings.items():
        entries = [f"{k}={as_word(v)}" for k, v in value.items()] if isinstance(value, dict) else value
        if isinstance(value, dict) and name != "config":
            entries = [",".join(entries)] if entries else []
        if entries is not None and entries != []:
            words += [f"--{name}", *(str(entry) for entry in (entries if isinstance(entries, list) else [entries]))]
    return words


def folder_name(row: str) -> str:
    """What the results folders of a row begin with: "APT 0.02" -> "apt-0-02"."""
    return re.sub(r"[^A-Za-z0-9]+", "-", row).strip("-").lower()


def plan(rows: Mapping[str, Mapping[str, Any]], seeds: list[int], output: Path, further: list[str]) -> list[Run]:
    """All runs, ordered by seed, so that an interrupted comparison has all rows. Exits on invalid arguments."""
    runs = []
    for seed in seeds:
        for row, settings in rows.items():
            folder = output / f"{folder_name(row)}-seed{seed}"
            words = [*as_line(settings), *further, "--seed", str(seed), "--output_dir", str(folder)]
            arguments, training = arguments_of(row, words)
            own = {name: value for name, value in settings.items() if f"--{name}" not in further}
            refuse_empty(row, own, as_dict(arguments, training))
            runs.append(Run(row, words, arguments, training))
    folders = [run.folder for run in runs]
    twice = sorted({run.row for run in runs if folders.count(run.folder) > 1})
    if twice:
        sys.exit(f"rows {twice} or their seeds would share a results folder: give them names that differ in letters")
    taken = {f"{run.row} + {classifier}" for run in runs for classifier in run.arguments.extra_classifiers} & set(rows)
    if taken:
        sys.exit(f"rows {sorted(taken)} are named like another row with an extra classifier: give them other names")
    return runs


def arguments_of(row: str, words: list[str]) -> tuple[Arguments, ContinualArguments]:
    """Parse the words of a row's command line. Exits with the row's name on invalid arguments."""
    try:
        return read_arguments(words)
    except SystemExit as stop:
        sys.exit(f"row {row!r}: {stop.code}")


def refuse_empty(row: str, settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Exit if a setting has no value in the file, so that the default or the recipe's value would be used."""
    for name, value in settings.items():
        stays_empty = name in OPTIONS or arguments.get(name, name) in (None, [])
        if (value in (None, [], {}) and not stays_empty) or (isinstance(value, list) and None in value):
            sys.exit(f"row {row!r}: {name} has no value in {value!r}: give it one, or leave it out for the recipe's")


def execute(run: Run, launcher: list[str], threads: int) -> None:
    """Run in a separate process. The output is written to a log next to the run's folder."""
    command = [*launcher, "-m", "cl_prompts", "train", *run.words, "--resume"]
    log = run.folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{run.folder.name}: {shlex.join(command)}", flush=True)
    with log.open("a") as file:
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    if ended.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        message = lines[-1].strip().removeprefix("cl-prompts: ") if lines else "no output"
        run.error = f"{message} (exit code {ended.returncode}, {log})"
        print(f"{run.folder.name} failed: {run.error}", flush=True)


def read_run(run: Run) -> dict[str, Result]:
    """Results of a complete run, by the names in results.json. If that is damaged: no results, and `run.error` is set."""
    try:
        record = read_results(run.folder)
    except ValueError as error:
        run.error = str(error)
        return {}
    method, seed = run.arguments.method, run.training.seed
    return {
        name: Result(name, matrix, seed, record.trainable.get(name), record.seconds if name == method else None)
        for name, matrix in record.results.items()
    }


def collect(runs: list[Run]) -> tuple[list[Result], list[Result]]:
    """Results of complete runs: those of the table, and those with another number of tasks.

    The table has the rows with the most common number of tasks, followed by the references. A reference is in the results
    of many runs; it is taken from the row that has it with most seeds.
    """
    order = list(dict.fromkeys(run.row for run in runs))
    own: list[Result] = []
    tasks_of: dict[str, int] = {}
    references: dict[str, dict[str, list[Result]]] = {}
    for run in sorted(runs, key=lambda run: order.index(run.row)):
        method = run.arguments.method
        for name, result in read_run(run).items() if run.done else ():
            if name == method or name.startswith(f"{method} + "):
                own.append(replace(result, learner=run.row + name.removeprefix(method)))
                tasks_of.setdefault(run.row, len(result.matrix.columns))
            else:
                references.setdefault(name, {}).setdefault(run.row, []).append(result)
    if not own:
        return [], []
    tasks = Counter(tasks_of.values()).most_common(1)[0][0]
    learners = {result.learner for result in own}
    shared: list[Result] = []
    for name in [name for name in references if name not in learners]:
        fitting = [[r for r in of_row if len(r.matrix.columns) == tasks] for of_row in references[name].values()]
        shared += sorted(fitting, key=len, reverse=True)[0]
    others = [result for result in own if len(result.matrix.columns) != tasks]
    return [result for result in own if len(result.matrix.columns) == tasks] + shared, others


def write(runs: list[Run], output: Path, command: str, drawn: list[str] | None = None, sweep: Sweep | None = None) -> None:
    """Write the table, the plots (curves of the learners in `drawn`; None: all), and the accuracies of all runs."""
    results, others = collect(runs)
    by_learner: dict[str, list[Result]] = {}
    for result in results:
        by_learner.setdefault(result.learner, []).append(result)
    numbers: dict[str, dict[str, Any]] = {}
    for result in [*results, *others]:
        numbers.setdefault(result.learner, {})[str(result.seed)] = result.matrix.to_dict()
    write_atomically(output / NUMBERS, json.dumps({"command": command, "results": numbers}, indent=1))
    failed = [f"- {run.row}, seed {run.training.seed}: {run.error}" for run in runs if run.error]
    missing = [f"- {run.row}, seed {run.training.seed}" for run in runs if not run.done and not run.error]
    seconds = sum(result.seconds or 0 for result in [*results, *others])
    commands = {run.row: shlex.join(["cl-prompts", "train", *run.words]) for run in reversed(runs)}
    sections = [
        f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC on {machine()}. {seconds:,.0f} seconds for all runs.",
        LEGEND,
        comparison_table(results) if results else "No run is complete.",
        *other_tables(others),
        "Failed:\n\n" + "\n".join(failed) if failed else "",
        "Not complete yet:\n\n" + "\n".join(missing) if missing else "",
    ]
    if results:
        names = [name for name in drawn or by_learner if name in by_learner]
        draw_curves({name: [r.matrix for r in by_learner[name]] for name in names or by_learner}, output / "curves.png")
        sections.append("![curves](curves.png)")
    if sweep is not None:
        swept = {name: own for name, own in by_learner.items() if name in sweep.points}
        final = [(sweep.points[name], [run.matrix.summary()["faa"] for run in own]) for name, own in swept.items()]
        if final:
            draw_sweep(list(sweep.values), final, output / "sweep.png")
            sections.append("![final average accuracy over the sweep](sweep.png)")
    sections.append(f"## Repeat it\n\n```sh\n{command}\n```\n\nA run of each row:")
    sections.append("```sh\n" + "\n".join(list(commands.values())[::-1]) + "\n```")
    write_atomically(output / PAGE, "\n\n".join(filter(None, sections)) + "\n")


def other_tables(others: list[Result]) -> list[str]:
    """A table for each number of tasks other than that of the main table."""
    groups: dict[int, list[Result]] = {}
    for result in others:
        groups.setdefault(len(result.matrix.columns), []).append(result)
    return [
        f"With {number} task{'s' * (number > 1)}, so not in the table above:\n\n{comparison_table(group)}"
        for number, group in sorted(groups.items())
    ]


def main(words: Sequence[str] | None = None) -> None:
    """Run all runs that are not complete, and write the table after each.

    Args:
        words: of the command line; None: those of this process. Mistakes in them exit with a message.
    """
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", help="name of a comparison, or a YAML file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", help="names of the rows to run; default: all")
    parser.add_argument("--draw", nargs="+", help="learners, as the table names them, for the picture; default: all")
    parser.add_argument("--output", type=Path, help="default: results/<comparison>")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--launcher", default=sys.executable, help='like "accelerate launch --num_processes 2"')
    options, further = parser.parse_known_args(words)
    rows, sweep = read_comparison(options.comparison)
    absent = sorted(set(options.rows or []) - set(rows))
    if absent or options.jobs < 1:
        sys.exit(f"--rows {absent} are none of {list(rows)}" if absent else f"--jobs {options.jobs} must be positive")
    output = options.output or Path("results") / Path(options.comparison).stem
    runs = plan({row: rows[row] for row in options.rows or rows}, options.seeds, output, further)
    command = shlex.join([*COMMAND.split(), *words])
    threads = max(1, (os.cpu_count() or 1) // options.jobs)

    def complete(run: Run) -> None:
        if not run.done:
            execute(run, shlex.split(options.launcher), threads)

    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in pool.map(complete, runs):
            write(runs, output, command, options.draw, sweep)  # with the runs that are complete so far
    print((output / PAGE).read_text())
    learners = list(dict.fromkeys(result.learner for result in collect(runs)[0]))
    unknown = [name for name in options.draw or () if name not in learners]
    if unknown:
        sys.exit(f"--draw {unknown} are none of {learners}")
    if any(run.error for run in runs):
        sys.exit("some runs failed, see above")
