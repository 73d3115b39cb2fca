"""The results folder of a run: run.json describes the run and is written first, results.json, its record, last."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from arguments import Arguments, as_dict

from cl_prompts.evaluation.report import PAGE, machine
from cl_prompts.runtime.files import write_atomically
from cl_prompts.sharing.run_record import RESULTS_FILE, RunRecord


RUN = "run.json"
# All that a run writes; results.json last, so that a folder that has it is complete.
FILES = (
    RUN,
    RESULTS_FILE,
    PAGE,
    "matrix.csv",
    "log.jsonl",
    "checkpoints",
    "curves.png",
    "matrix.png",
    "selection.png",
    "adapter",
)
# Arguments that change nothing about the results.
NOT_OF_THE_RUN = (
    *("output", "recipe", "resume", "trackers", "dataloader_num_workers", "logging_steps", "save_steps"),
    *("query_cache", "query_cache_bytes", "shard_backbone"),
)
LIBRARIES = ("cl-prompts", "torch", "transformers", "peft", "accelerate", "datasets")


def described(arguments: Arguments, **facts: Any) -> dict[str, Any]:
    """What run.json says.

    Args:
        arguments: of the run.
        facts: what else makes it this run: the stream's fingerprint, the learner's, the number of processes.
    """
    versions = {name: version(name) for name in LIBRARIES}
    return {"arguments": as_dict(arguments), **facts, "versions": versions, "machine": machine()}


def differences(run: dict[str, Any], folder: Path) -> list[str]:
    """What differs between a run and the one that the folder is of, in words; nothing if the folder is free.

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
    mine, theirs = run["arguments"], known["arguments"]
    found = [
        f"{name}: {theirs.get(name)!r} there, {mine.get(name)!r} here"
        for name in sorted({*mine, *theirs} - set(NOT_OF_THE_RUN))
        if mine.get(name) != theirs.get(name)
    ]
    facts = [name for name in run if name not in ("arguments", "versions", "machine")]
    return found + [f"{name} differs" for name in facts if name in known and run[name] != known[name]]


def refuse_another_run(run: dict[str, Any], folder: Path) -> None:
    """Exit if the folder is of another run."""
    found = differences(run, folder)
    if found:
        sys.exit(f"{folder} holds another run ({'; '.join(found)}): choose another --output, or remove that folder")


def begin(run: dict[str, Any], folder: Path, *, resume: bool) -> None:
    """Write run.json. A run that starts over first removes what the last one left.

    The log and the checkpoints are the trainer's, who clears them itself.
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
    """Whether the run in the folder has come to its end."""
    return (folder / RESULTS_FILE).is_file()


def read_results(folder: Path) -> RunRecord:
    """The record of a complete run; the first of its learners is the one that was trained.

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
