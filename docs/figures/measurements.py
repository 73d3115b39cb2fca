"""The measurements that docs/ tells of, docs/measured/NAME.json: what is kept of the results folders of runs.

`docs/figures/tables.py` adds runs to these files and writes tables from them.
"""

import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cl_prompts.evaluation.metrics import AccuracyMatrix
from cl_prompts.evaluation.report import ALWAYS, WHERE_KNOWN
from cl_prompts.runs.comparison import NUMBERS, folder_name, read_rows
from cl_prompts.runs.images import EMBEDDED
from cl_prompts.runtime.files import write_atomically
from cl_prompts.sharing.run_record import RESULTS_FILE, RunRecord


FOLDER = Path(__file__).parents[1] / "measured"
# Measures of `AccuracyMatrix.summary` that are kept, and their names in tables.
MEASURES = {**ALWAYS, **WHERE_KNOWN, "ece_largest": "largest calibration error", "faa_micro": "accuracy of all images"}
WITHOUT_TASK = (*ALWAYS, "faa_micro")  # measures that mean nothing for a learner that needs the task of an image
ONCE = ("--output_dir", "--seed", "--resume")  # words of a command that differ between the seeds of a row
LOCAL = {"vit-tiny-patch16-224": "vit-tiny"}  # folders that docs/results.md calls otherwise
SHIPPED = (*EMBEDDED, "micro_vit")  # data and backbone of the package, which are no folders


@dataclass
class Learner:
    """A learner, or one with another classifier, or a reference.

    Args:
        command: of the run of one seed, without the seed; "" for what another row's run measured too.
        beside: of a reference: the row whose runs it comes from.
        seeds: measures, trained parameters and curve by seed.
    """

    command: str = ""
    beside: str = ""
    seeds: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Measured:
    """The content of a file: learners that answered the same images.

    Args:
        images: number of images that accuracies are of.
        dates: days on which runs ended.
        machines: hardware and versions of libraries.
        learners: by name.
    """

    images: int = 0
    dates: list[str] = field(default_factory=list)
    machines: list[str] = field(default_factory=list)
    learners: dict[str, Learner] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str) -> "Measured":
        """The content of docs/measured/NAME.json.

        Raises:
            ValueError: there is no such file.
        """
        file = FOLDER / f"{name}.json"
        if not file.is_file():
            raise ValueError(f"no measurements {name!r}: docs/measured has {sorted(f.stem for f in FOLDER.glob('*.json'))}")
        content = json.loads(file.read_text())
        learners = {
            learner: Learner(**values | {"seeds": {int(seed): kept for seed, kept in values["seeds"].items()}})
            for learner, values in content["learners"].items()
        }
        return cls(**content | {"learners": learners})

    def text(self) -> str:
        """The file's text, with lists of numbers in one line each."""
        content = asdict(self)
        for learner in content["learners"].values():
            for name in ("command", "beside"):
                if not learner[name]:
                    del learner[name]
        lists = re.compile(r"\[\s*([-\d.,\s]+?)\s*\]")
        return lists.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(content, indent=1)) + "\n"

    def put(self, learner: str, seed: int, measures: Mapping[str, Any]) -> None:
        """Keep the measures of a seed. Exits if the seed has others."""
        seeds = self.learners.setdefault(learner, Learner()).seeds
        if seeds.setdefault(seed, dict(measures)) != measures:
            sys.exit(
                f"{learner!r}, seed {seed} is there with other values: {seeds[seed]}, now {measures}. Give the row another "
                "name (--rename), or replace what is there (--replace)"
            )
        self.learners[learner].seeds = dict(sorted(seeds.items()))


def add(name: str, folders: Sequence[Path], renamed: Mapping[str, str], *, replace: bool) -> Path:
    """Add the complete runs of results folders to docs/measured/NAME.json, which is made if it is not there.

    Args:
        name: of the file.
        folders: of comparisons or of single runs.
        renamed: new names by those of rows, or by the method of a single run.
        replace: forget what is known of the rows that are added; otherwise the same row with other settings or other
            values for a seed is refused.
    """
    file = FOLDER / f"{name}.json"
    measured = Measured.read(name) if file.is_file() else Measured()
    runs = [run for folder in folders for run in _runs(folder, renamed)]
    for row in {row for row, _ in runs} if replace else ():
        for learner, known in list(measured.learners.items()):
            if learner == row or learner.startswith(f"{row} + ") or known.beside == row:
                del measured.learners[learner]
    beside = _references(measured, runs)
    for row, record in runs:
        _add_run(measured, name, row, record, beside)
    FOLDER.mkdir(exist_ok=True)
    write_atomically(file, measured.text())
    return file


def _runs(folder: Path, renamed: Mapping[str, str]) -> list[tuple[str, RunRecord]]:
    """Name of the row and record of each complete run, in the order of the rows."""
    if (folder / RESULTS_FILE).is_file():
        record = RunRecord.load(folder / RESULTS_FILE)
        method = next(iter(record.results))
        return [(renamed.get(method, method), record)]
    if not (folder / NUMBERS).is_file():
        sys.exit(f"{folder} has neither {NUMBERS} of a comparison nor {RESULTS_FILE} of a run")
    known = json.loads((folder / NUMBERS).read_text())
    # A comparison that was continued with --rows has the last rows only, so its file is asked for all.
    rows = [*read_rows(shlex.split(known["command"])[2]), *known["results"]]
    order = {folder_name(row): row for row in reversed(rows)}
    places = {row: place for place, row in enumerate(rows)}
    found = []
    for file in folder.glob(f"*/{RESULTS_FILE}"):
        row = order.get(re.sub(r"-seed\d+$", "", file.parent.name))
        if row is None:
            print(f"left out: {file.parent}, which is of no row of the comparison; as a folder of its own it can be added")
        else:
            found.append((row, RunRecord.load(file)))
    found.sort(key=lambda run: (places[run[0]], run[1].seed or 0))
    return [(renamed.get(row, row), record) for row, record in found]


def _references(measured: Measured, runs: Sequence[tuple[str, RunRecord]]) -> dict[str, str]:
    """The row from whose runs each reference is taken, as `cl-prompts compare` does it.

    A reference is in the results of all rows, and depends on their batches and learning rates. It stays with the row that
    it is known from; a new one is taken from the row with most seeds among those with the most common number of tasks.
    """
    tasks = [(row, record, len(next(iter(record.results.values())).columns)) for row, record in runs]
    most = Counter(number for _, _, number in tasks).most_common(1)[0][0] if tasks else 0
    rows: dict[str, Counter[str]] = {}
    for row, record, number in tasks:
        for name in record.results if number == most else ():
            rows.setdefault(name, Counter())[row] += 1
    known = {name: learner.beside for name, learner in measured.learners.items() if learner.beside}
    return {name: counted.most_common(1)[0][0] for name, counted in rows.items()} | known


def _add_run(measured: Measured, name: str, row: str, record: RunRecord, beside: Mapping[str, str]) -> None:
    """Add a run of a row: its method, that with other classifiers, and the references that are taken from the row."""
    method, matrix = next(iter(record.results.items()))
    images, command = sum(matrix.sizes), settled(record.command)
    if measured.images not in (0, images):
        sys.exit(f"{row!r} answered {images:,} images, {name} has learners of {measured.images:,}: choose another NAME")
    measured.images = images
    known = measured.learners.setdefault(row, Learner(command))
    if known.command != command:
        sys.exit(
            f"{row!r} is there from\n{known.command}\nand now from\n{command}\nGive it another name (--rename), or replace "
            "what is there (--replace)"
        )
    for learner, own in record.results.items():
        is_row = learner == method or learner.startswith(f"{method} + ")
        if is_row or beside.get(learner) == row:
            shown = row + learner.removeprefix(method) if is_row else learner
            measured.put(shown, record.seed or 0, kept(own, record.trainable.get(learner)))
            measured.learners[shown].beside = "" if is_row else row
    measured.dates = sorted({*measured.dates, record.written[:10]})
    measured.machines = sorted({*measured.machines, record.machine})


def kept(matrix: AccuracyMatrix, trainable: int | None) -> dict[str, Any]:
    """What is kept of a seed: measures, parameters trained in the last task, and mean accuracy after each task."""
    summary = matrix.summary()
    left_out = WITHOUT_TASK if matrix.needs_task else ("forgetting",) if len(matrix.columns) == 1 else ()
    measures = {name: round(summary[name], 4) for name in MEASURES if name in summary and name not in left_out}
    size = {} if trainable is None else {"trainable": trainable}
    return measures | size | {"curve": [round(accuracy, 4) for accuracy in matrix.shown().curve()]}


def settled(command: str) -> str:
    """The command of a run without its seed and folder, with local data and models as folders of the reader's.

    "cl-prompts train --model results/models/vit-tiny-112 --seed 1" becomes "cl-prompts train --model ./vit-tiny-112".
    """
    words: list[str] = []
    option = ""
    for word in shlex.split(command):
        option = word if word.startswith("--") else option
        if option in ONCE:
            continue
        local = option in ("--model", "--dataset") and word != option and word not in SHIPPED
        if local and word.count("/") != 1:  # with one it is a name on the Hub
            word = "./" + LOCAL.get(Path(word).name, Path(word).name)
        words.append(word)
    return shlex.join(words)
