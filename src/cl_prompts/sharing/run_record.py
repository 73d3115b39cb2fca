"""The record of a training run, `results.json` in its folder and beside the adapter; the model card is written from it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_prompts.evaluation.metrics import AccuracyMatrix
from cl_prompts.runtime.files import write_atomically
from cl_prompts.runtime.text import first_line
from cl_prompts.storage.bounded_read import MAX_RESULTS_BYTES, read_json_object


if TYPE_CHECKING:
    from cl_prompts.evaluation.results import TrainingResult


RESULTS_FILE = "results.json"


def _machine() -> str:
    from cl_prompts.evaluation.report import machine  # imports torch, which a record that is read does not need

    return machine()


@dataclass
class RunRecord:
    """The record of a training run. Paths of the machine are shortened in it: see `without_places`.

    Args:
        results: accuracy matrix of each learner; the first is the trained one, the others are compared with it.
        data: the training data in words.
        datasets: Hub ids of the data, if it is on the Hub.
        command: repeats the run.
        settings: of the run, JSON-able.
        trainable: parameters trained in the last task, by learner.
        seed: of the run.
        seconds: duration of the run.
        machine: hardware and library versions.
        written: when the run ended.
        weights_sha256: checksum of the weights that the record belongs to; None if it is saved without them.

    Raises:
        ValueError: `results` is empty.
    """

    results: dict[str, AccuracyMatrix]
    data: str = ""
    datasets: list[str] = field(default_factory=list)
    command: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    trainable: dict[str, int] = field(default_factory=dict)
    seed: int | None = None
    seconds: float | None = None
    machine: str = field(default_factory=_machine)
    written: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    weights_sha256: str | None = None

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("a record needs the accuracy matrix of the adapter: RunRecord({'hash': matrix})")
        self.command, self.settings = without_places(self.command), without_places(self.settings)
        self.data, self.datasets = without_places(self.data), list(self.datasets)

    @classmethod
    def of(cls, result: TrainingResult, name: str, **facts: Any) -> RunRecord:
        """The record of a run.

        Args:
            result: of the run, `trainer.result()` after `trainer.train()`.
            name: the learner's name in tables.
            facts: further fields (`data`, `datasets`, `command`), or fields that replace those of the result.
        """
        known: dict[str, Any] = {
            "results": {name: result.matrix}
            | {f"{name} + {extra}": matrix for extra, matrix in result.extra_matrices.items()},
            "trainable": {name: result.trainable_parameters},
            "settings": result.settings,
            "seed": result.settings.get("seed"),
            "seconds": round(result.seconds, 1),
        }
        return cls(**known | facts)

    def save(self, folder: str | os.PathLike[str], weights_sha256: str | None) -> None:
        """Write `results.json` into `folder`.

        Args:
            folder: of the run or of the adapter.
            weights_sha256: checksum of the adapter's weights; None for the folder of a run.
        """
        values = {name: value for name, value in vars(self).items() if name != "results"}
        results = {name: matrix.to_dict() for name, matrix in self.results.items()}
        content = values | {"weights_sha256": weights_sha256, "results": results}
        write_atomically(Path(folder, RESULTS_FILE), json.dumps(content, indent=1, default=str))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunRecord:
        """Read the `results.json` at `path`.

        Raises:
            ValueError: it is none, is damaged, or is larger than any record.
        """
        try:
            content = read_json_object(Path(path), MAX_RESULTS_BYTES)
            results = {str(name): AccuracyMatrix.from_dict(values) for name, values in content.pop("results").items()}
            known = {name: value for name, value in content.items() if name in _KINDS and value is not None}
            wrong = [name for name, value in known.items() if not _is_of_its_kind(name, value)]
            if wrong:
                raise ValueError(f"{wrong} have values of another kind or size")
            # A file that names no machine and no time is not of this machine and of now.
            return cls(results, **{"machine": "", "written": ""} | known)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError, OverflowError) as error:
            raise ValueError(f"{path} holds no results ({first_line(error)}): remove it, or write it again") from error


_KINDS: dict[str, Any] = {
    "data": str,
    "datasets": list,
    "command": str,
    "settings": dict,
    "trainable": dict,
    "seed": int,
    "seconds": (int, float),
    "machine": str,
    "written": str,
    "weights_sha256": str,
}
LARGEST_NUMBER = 2**63 - 1


def _is_of_its_kind(name: str, value: Any) -> bool:
    """Whether a value can be shown: of its field's type, and numbers from 0 to `LARGEST_NUMBER`."""
    if isinstance(value, bool) or not isinstance(value, _KINDS[name]):
        return False
    if isinstance(value, (int, float)):
        return 0 <= value <= LARGEST_NUMBER
    if name == "trainable":
        return all(type(part) is int and 0 <= part <= LARGEST_NUMBER for part in value.values())
    return name != "datasets" or all(isinstance(part, str) for part in value)


def without_places(value: Any) -> Any:
    """The same with every absolute path, home folder and network share cut to its last part; containers are gone through.

    "--dataset /home/me/birds" becomes "--dataset birds": what repeats a run elsewhere, and says nothing of one's machine.
    """
    if isinstance(value, Mapping):
        return {key: without_places(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_places(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return Path(value).name
    return _PLACE.sub(_last_part, value) if isinstance(value, str) else value


def _last_part(found: re.Match[str]) -> str:
    return Path(found[0].replace("\\", "/")).name


# /a/b, ~/a, ../a, C:\a, \\server\a; no URL, whose slashes stand behind a colon or a word.
_PLACE = re.compile(r"(?<![\w:/.~\\-])(?:[A-Za-z]:[\\/]|~[\w-]*/|\.{1,2}/|/|\\\\)[^\s'\",;]+")
