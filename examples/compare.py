"""Runs learners with several seeds and writes one table with mean and standard deviation.

    python examples/compare.py compare_cifar100_mini --seeds 0 1 2 --jobs 2 --output results/cifar100-mini
    python examples/compare.py rows.yaml --seeds 0 --rows L2P EWC --model FOLDER --dataset FOLDER

The YAML (of examples/recipes, or a file) has `settings`, arguments of all runs, and `rows`: the name of a row in the table,
and its arguments, like `L2P: {recipe: l2p_cifar100_mini, clip: 1.0}`. Arguments that this script does not know go to every
run and have the last word. Each run is a process and a folder of its own: one that fails is named below the table
and loses no other; called again, complete runs are read and killed ones go on.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from arguments import HERE, RECIPES, Arguments, read_arguments
from run_folder import described, differences, is_complete, read_results

from cl_prompts.plots import draw_curves
from cl_prompts.report import LEGEND, Result, comparison_table, machine
from cl_prompts.saving import write_whole


PAGE, NUMBERS = "comparison.md", "comparison.json"


@dataclass
class Run:
    """One row with one seed.

    Args:
        row: its name in the table.
        words: of train_cil's command line.
        arguments: the same, read.
        error: why it failed; "" if it did not.
    """

    row: str
    words: list[str]
    arguments: Arguments
    error: str = ""

    @property
    def folder(self) -> Path:
        """Its results folder."""
        return self.arguments.folder

    @property
    def done(self) -> bool:
        """Whether its folder holds this run, complete."""
        return is_complete(self.folder) and not differences(described(self.arguments), self.folder)


def read_rows(name: str) -> dict[str, dict[str, Any]]:
    """The arguments of each row, those of all runs first. Exits if the file is none that lists rows."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in RECIPES.glob("compare_*.yaml"))
        sys.exit(f"no comparison {name!r}: choose one of {known} or name a YAML file")
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict) or not isinstance(content.get("rows"), dict) or set(content) - {"rows", "settings"}:
        sys.exit(f"{path} must have `rows`, a mapping of names to arguments, and may have `settings`; nothing else")
    return {row: {**(content.get("settings") or {}), **(own or {})} for row, own in content["rows"].items()}


def as_line(settings: Mapping[str, Any]) -> list[str]:
    """{"lr": 0.1, "config": {"top_k": 2}} -> ["--lr", "0.1", "--config", "top_k=2"]."""
    words = []
    for name, value in settings.items():
        entries = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
        words += [f"--{name}", *(str(entry) for entry in (entries if isinstance(entries, list) else [entries]))]
    return words


def plan(rows: Mapping[str, Mapping[str, Any]], seeds: list[int], output: Path, further: list[str]) -> list[Run]:
    """All runs, seed after seed, so that a comparison that is cut short has all rows. Exits on arguments that are none."""
    runs = []
    for seed in seeds:
        for row, settings in rows.items():
            folder = output / f"{re.sub(r'[^A-Za-z0-9]+', '-', row).strip('-').lower()}-seed{seed}"
            words = [*as_line(settings), *further, "--seed", str(seed), "--output", str(folder)]
            runs.append(Run(row, words, read_arguments(words)))
    folders = [run.folder for run in runs]
    twice = sorted({run.row for run in runs if folders.count(run.folder) > 1})
    if twice:
        sys.exit(f"rows {twice} or their seeds would share a results folder: give them names that differ in letters")
    return runs


def execute(run: Run, launcher: list[str], threads: int) -> None:
    """Run it in a process of its own; its output goes to a log beside its folder."""
    command = [*launcher, str(HERE / "train_cil.py"), *run.words, "--resume"]
    log = run.folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{run.folder.name}: {shlex.join(command)}", flush=True)
    with log.open("a") as file:
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    if ended.returncode:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        run.error = f"{said[-1].strip() if said else 'it said nothing'} (exit code {ended.returncode}, {log})"
        print(f"{run.folder.name} failed: {run.error}", flush=True)


def collect(runs: list[Run]) -> list[Result]:
    """What complete runs reached; references, which stand in many runs, are those of the first row that has them."""
    results = []
    owner: dict[str, str] = {}
    rank: dict[str, int] = {}
    order = list(dict.fromkeys(run.row for run in runs))
    for run in runs:
        if not run.done:
            continue
        content, matrices = read_results(run.folder)
        method, seed = run.arguments.method, run.arguments.seed
        for name, matrix in matrices.items():
            own = name == method or name.startswith(f"{method} + ")
            learner = run.row + name.removeprefix(method) if own else name
            rank.setdefault(learner, order.index(run.row) if own else len(order))
            if owner.setdefault(learner, run.row) == run.row:
                seconds = content["arguments"]["seconds"] if name == method else None
                results.append(Result(learner, matrix, seed, content["trainable"].get(name), seconds))
    return sorted(results, key=lambda result: rank[result.learner])


def write(runs: list[Run], output: Path, command: str, drawn: list[str] | None = None) -> None:
    """Write the table, the picture (of the learners in `drawn`; None: of all), and every run's numbers."""
    results = collect(runs)
    by_learner: dict[str, list[Result]] = {}
    for result in results:
        by_learner.setdefault(result.learner, []).append(result)
    numbers = {name: {str(r.seed): r.matrix.to_dict() for r in found} for name, found in by_learner.items()}
    write_whole(output / NUMBERS, json.dumps({"command": command, "results": numbers}, indent=1))
    failed = [f"- {run.row}, seed {run.arguments.seed}: {run.error}" for run in runs if run.error]
    missing = [f"- {run.row}, seed {run.arguments.seed}" for run in runs if not run.done and not run.error]
    seconds = sum(result.seconds or 0 for result in results)
    commands = {
        run.row: shlex.join(["accelerate", "launch", "examples/train_cil.py", *run.words]) for run in reversed(runs)
    }
    sections = [
        f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC on {machine()}. {seconds:,.0f} seconds for all runs.",
        LEGEND,
        comparison_table(results) if results else "No run is complete.",
        "Failed:\n\n" + "\n".join(failed) if failed else "",
        "Not complete yet:\n\n" + "\n".join(missing) if missing else "",
    ]
    if results:
        names = [name for name in drawn or by_learner if name in by_learner]
        draw_curves({name: [r.matrix for r in by_learner[name]] for name in names or by_learner}, output / "curves.png")
        sections.append("![curves](curves.png)")
    sections.append(f"## Repeat it\n\n```sh\n{command}\n```\n\nA run of each row:")
    sections.append("```sh\n" + "\n".join(list(commands.values())[::-1]) + "\n```")
    write_whole(output / PAGE, "\n\n".join(filter(None, sections)) + "\n")


def main() -> None:
    """Run what is not complete yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", help="name in examples/recipes, or a YAML file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", help="names of the rows to run; default: all")
    parser.add_argument("--draw", nargs="+", help="learners, as the table names them, for the picture; default: all")
    parser.add_argument("--output", type=Path, help="default: results/<comparison>")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--launcher", default=sys.executable, help='like "accelerate launch --num_processes 2"')
    options, further = parser.parse_known_args()
    rows = read_rows(options.comparison)
    strange = sorted(set(options.rows or []) - set(rows))
    if strange or options.jobs < 1:
        sys.exit(f"--rows {strange} are none of {list(rows)}" if strange else f"--jobs {options.jobs} must be positive")
    output = options.output or Path("results") / Path(options.comparison).stem
    runs = plan({row: rows[row] for row in options.rows or rows}, options.seeds, output, further)
    command = f"python examples/compare.py {shlex.join(sys.argv[1:])}"
    threads = max(1, (os.cpu_count() or 1) // options.jobs)

    def complete(run: Run) -> None:
        if not run.done:
            execute(run, shlex.split(options.launcher), threads)

    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in pool.map(complete, runs):
            write(runs, output, command, options.draw)  # as far as it is
    print((output / PAGE).read_text())
    learners = list(dict.fromkeys(result.learner for result in collect(runs)))
    unknown = [name for name in options.draw or () if name not in learners]
    if unknown:
        sys.exit(f"--draw {unknown} are none of {learners}")
    if any(run.error for run in runs):
        sys.exit("some runs failed, see above")


if __name__ == "__main__":
    main()
