"""The results folder of a run: run.json describes the run and is written first, results.json, its record, last."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cl_prompts.continual import ContinualArguments
from cl_prompts.evaluation.report import PAGE, machine
from cl_prompts.runs.arguments import Arguments, as_dict
from cl_prompts.runtime.files import write_atomically
from cl_prompts.sharing.run_record import RESULTS_FILE, RunRecord


RUN = "run.json"
LOCK = ".run.lock"  # held during the run
# All files of a run. results.json is written last, so a folder with it is complete.
FILES = (
    RUN,
    RESULTS_FILE,
    PAGE,
    "matrix.csv",
    "log.jsonl",
    "checkpoints",
    "curves.png",
    "matrix.png",
    "reliability.png",
    "selection.png",
    "adapter",
)
# Arguments that do not change the results.
NOT_OF_THE_RUN = (
    *("output_dir", "recipe", "benchmark", "resume", "trackers", "dataloader_num_workers", "logging_steps", "save_steps"),
    *("query_cache", "query_cache_bytes", "pixel_cache_bytes", "shard_backbone"),
)
LIBRARIES = ("cl-prompts", "torch", "transformers", "peft", "accelerate", "datasets")


def folder_of(training: ContinualArguments) -> Path:
    """The results folder of a run whose settings were read with `read_arguments`."""
    return Path(str(training.output_dir))


def described(arguments: Arguments, training: ContinualArguments, **facts: Any) -> dict[str, Any]:
    """The content of run.json.

    Args:
        arguments: settings of the run.
        training: settings of its trainer.
        facts: further identification of the run: fingerprints of stream and learner, number of processes.
    """
    versions = {name: version(name) for name in LIBRARIES}
    return {"arguments": as_dict(arguments, training), **facts, "versions": versions, "machine": machine()}


def differences(run: dict[str, Any], folder: Path) -> list[str]:
    """Differences between a run and the run in the folder, as text.

    Empty if the folder has no run, or one that ended before its first checkpoint.

    Args:
        run: from `described`; facts that are not there are not compared.
        folder: the results folder.
    """
    try:
        known = json.loads((folder / RUN).read_text())
    except FileNotFoundError:
        return [f"there is no {RUN} beside {name}" for name in FILES if (folder / name).exists()]
    except ValueError:
        known = None
    if not isinstance(known, dict) or not isinstance(known.get("arguments"), dict):
        return [f"{RUN} cannot be read"]
    if not any((folder / name).exists() for name in (RESULTS_FILE, "checkpoints", "adapter")):
        return []
    new, old = run["arguments"], known["arguments"]
    differing = [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} here"
        for name in sorted({*new, *old} - set(NOT_OF_THE_RUN))
        if new.get(name) != old.get(name)
    ]
    facts = [name for name in run if name not in ("arguments", "versions", "machine")]
    return differing + [f"{name} differs" for name in facts if name in known and run[name] != known[name]]


def refuse_another_run(run: dict[str, Any], folder: Path) -> None:
    """Exit if the folder has another run."""
    differing = differences(run, folder)
    if differing:
        sys.exit(f"{folder} holds another run ({'; '.join(differing)}): choose another --output_dir, or remove that folder")


def begin(run: dict[str, Any], folder: Path, *, resume: bool) -> None:
    """Write run.json. Without `resume`, the results of an earlier run are removed first.

    The trainer removes the earlier log and checkpoints itself.
    """
    if (folder / RESULTS_FILE).exists() and not resume:
        (folder / RESULTS_FILE).unlink()
    if resume and (folder / RUN).exists():
        then, now = json.loads((folder / RUN).read_text()).get("versions", {}), run["versions"]
        changed = [f"{name} {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name]]
        if changed:
            print(f"resumed under other versions ({', '.join(changed)}): results may differ from an uninterrupted run's")
    write_atomically(folder / RUN, json.dumps(run, indent=1))


def is_complete(folder: Path) -> bool:
    """Whether the run in the folder is complete."""
    return (folder / RESULTS_FILE).is_file()


def read_results(folder: Path) -> RunRecord:
    """The record of a complete run. Its first learner is the one that was trained.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / RESULTS_FILE
    try:
        record = RunRecord.load(file)
        for matrix in record.results.values():
            matrix.summary()
        if record.seconds is None or next(iter(record.results)) not in record.trainable:
            raise ValueError("it has no seconds or no number of trained parameters")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({error}): remove it, the run then continues from its last checkpoint when it is resumed"
        ) from error
    return record
