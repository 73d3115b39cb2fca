"""Keeps measurements in docs/measured, and writes the tables, figures and plots of README and docs/ from them.

    python docs/figures/tables.py add NAME FOLDER [FOLDER ...] [--rename OLD=NEW ...] [--replace]
    python docs/figures/tables.py write

docs/development.md, "Figures of the docs", describes the marks between which `write` writes. tests/docs/test_measured.py
checks that there is nothing to write.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from measurements import MEASURES, Learner, Measured, add
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cl_prompts.evaluation.plots import draw_lines
from cl_prompts.evaluation.report import mean_and_deviation


ROOT = Path(__file__).parents[2]
MARK = re.compile(r"(<!-- measured:(?P<spec>.*?)-->)(?P<body>.*?)(<!-- /measured -->)", re.DOTALL)
DESCRIPTION = "Description"  # of a picture: what it was drawn from
KEYS = {heading: key for key, heading in MEASURES.items()} | {"trainable": "trainable"}  # by the words of a column
SEEDS, ARGUMENTS = "seeds", "arguments"  # further columns: number of seeds; what of a row's command not all rows have
LOWER_IS_BETTER = ("forgetting", "ece", "ece_largest", "nll", "fpr95")
TWO_DIGITS = ("nll", "drift_r2")
WIDTH = 110  # of a line of a command

Rows = Sequence[str] | Mapping[str, str | Mapping[str, str]]


@dataclass(frozen=True)
class Column:
    """What a column shows.

    Args:
        file: name of the measurements.
        classifier: is added to the name of a row's learner; "" for its own.
        first: the measure.
        second: a measure in brackets behind it; "" for none.
    """

    file: str
    classifier: str
    first: str
    second: str

    @classmethod
    def read(cls, words: str, file: str) -> "Column":
        """The column of words like "FAA", "+ ridge FAA (forgetting)" or "pacs: trainable"; `file` if they name none."""
        found = re.fullmatch(r"(?:([\w-]+): )?(?:\+ (\w+) )?(.+?)(?: \((.+)\))?", words)
        known = [*KEYS, SEEDS, ARGUMENTS]
        if not found or {found[3], found[4]} - {*known, None}:
            raise ValueError(f"column {words!r} shows none of {known}")
        return cls(found[1] or file, found[2] or "", found[3], found[4] or "")

    def learner(self, row: str) -> str:
        """The name of a row's learner in this column."""
        return f"{row} + {self.classifier}" if self.classifier else row

    def value(self, learner: Learner) -> float | None:
        """The mean over seeds of the first measure; None: not known."""
        values = [kept[KEYS[self.first]] for kept in learner.seeds.values() if KEYS.get(self.first) in kept]
        return mean(values) if values else None

    def text(self, learner: Learner) -> str:
        """The cell of a learner, "81.7 ± 0.3 (6.8 ± 0.2)"; "" if its measure is not known."""
        if self.first == SEEDS:
            return str(len(learner.seeds))
        first, second = (_measure(learner, name) for name in (self.first, self.second))
        return f"{first} ({second})" if first and second else first


def _measure(learner: Learner, heading: str) -> str:
    """Mean and standard deviation over the seeds that have the measure."""
    key = KEYS.get(heading)
    values = [kept[key] for kept in learner.seeds.values() if key in kept]
    if not values or key is None:
        return ""
    if key == "trainable":
        return " to ".join(f"{size:,}" for size in sorted({min(values), max(values)}))
    return mean_and_deviation(values, 2 if key in TWO_DIGITS else 1)


def table(
    *,
    columns: Sequence[str] | Mapping[str, str],
    file: str = "",
    rows: Rows = (),
    heading: str = "learner",
    bold: bool = False,
) -> str:
    """A Markdown table.

    Args:
        columns: words of columns, which are also their headings; or words by heading.
        file: of the columns that name none.
        rows: names of learners; or by what is shown, the name of a learner, or the names by heading. Empty: all of `file`.
        heading: of the first column.
        bold: mark the best value of each column.
    """
    of_words = columns if isinstance(columns, Mapping) else {words: words for words in columns}
    chosen = {name: Column.read(words, file) for name, words in of_words.items()}
    files = {column.file: Measured.read(column.file) for column in chosen.values()}
    named: Rows = rows or list(files[file].learners)
    shown: dict[str, dict[str, Learner]] = {}
    for row, learner in named.items() if isinstance(named, Mapping) else ((row, row) for row in named):
        whole = isinstance(learner, str)
        wanted = {name: column.learner(learner) for name, column in chosen.items()} if isinstance(learner, str) else learner
        known = {name: files[chosen[name].file].learners for name in wanted}
        shown[row] = {name: known[name][one] for name, one in wanted.items() if one in known[name]}
        missing = [one for name, one in wanted.items() if one not in known[name]]
        if missing and not (whole and shown[row]):
            raise ValueError(f"row {row!r}: {missing} are none of {sorted({one for of in known.values() for one in of})}")
    most = max(len(learner.seeds) for cells in shown.values() for learner in cells.values())
    counted = SEEDS in [column.first for column in chosen.values()]

    def cell(name: str, row: str) -> str:
        learner, column = shown[row].get(name), chosen[name]
        text = "" if learner is None else column.text(learner)
        if learner is None or not text or KEYS.get(column.first, "trainable") == "trainable":
            return text
        if bold and column.value(learner) == best(name):
            text = re.sub(r"^[^(]*[^( ]", r"**\g<0>**", text)
        fewer = len(learner.seeds) < most and not counted
        return text + f", {len(learner.seeds)} seed{'s' * (len(learner.seeds) > 1)}" * fewer

    def best(name: str) -> float | None:
        values = [chosen[name].value(cells[name]) for cells in shown.values() if name in cells]
        known = [value for value in values if value is not None]
        choose = min if KEYS.get(chosen[name].first) in LOWER_IS_BETTER else max
        return choose(known, default=None)

    lines = [[heading, *chosen], ["---", *("---" if c.first == ARGUMENTS else "---:" for c in chosen.values())]]
    arguments = _arguments(shown)
    for row in shown:
        lines.append([row, *(arguments[row] if c.first == ARGUMENTS else cell(name, row) for name, c in chosen.items())])
    written = ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]
    written[1] = written[1].replace(" ", "")
    return "\n" + "\n".join(written) + "\n"


def _arguments(shown: Mapping[str, Mapping[str, Learner]]) -> dict[str, str]:
    """The options of each row's command that not all rows have."""
    options = {row: [o for learner in cells.values() for o in _options(learner.command)] for row, cells in shown.items()}
    of_runs = [set(found) for found in options.values() if found]
    shared = set.intersection(*of_runs) if of_runs else set()
    own = {row: list(dict.fromkeys(option for option in found if option not in shared)) for row, found in options.items()}
    return {row: f"`{' '.join(found)}`" if found else "" for row, found in own.items()}


def _options(command: str) -> list[str]:
    """The options of a command with their values: "cl-prompts train --a 1 2 --b" -> ["--a 1 2", "--b"]."""
    return re.split(r" (?=--)", command)[1:]


def value(*, file: str, value: str, measure: str = "FAA") -> str:
    """One figure in the text: the mean over seeds of a `measure` of a learner."""
    column = Column.read(measure, file)
    found = column.value(_learner(file, value))
    if found is None:
        raise ValueError(f"{value!r} of {file} has no {measure}")
    return f"{found:.{2 if KEYS[column.first] in TWO_DIGITS else 1}f}"


def _learner(file: str, name: str) -> Learner:
    learners = Measured.read(file).learners
    if name not in learners:
        raise ValueError(f"{name!r} is none of {list(learners)}")
    return learners[name]


def facts(*, facts: str) -> str:
    """When and on what was measured, in one sentence."""
    measured = Measured.read(facts)
    seeds = sorted({seed for learner in measured.learners.values() for seed in learner.seeds})
    numbers = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    days = " and ".join(dict.fromkeys((measured.dates[0], measured.dates[-1])))
    return f"\n\n{measured.images:,} images, {numbers}; {days}; {'; and '.join(measured.machines)}.\n\n"


def commands(*, commands: str, rows: Sequence[str] = ()) -> str:
    """The commands of the rows that were run, or of some `rows`, as a block of the shell."""
    learners = Measured.read(commands).learners
    lines = []
    for row in rows or [name for name, learner in learners.items() if learner.command]:
        command = _learner(commands, row).command
        if not command:
            raise ValueError(f"{row!r} of {commands} is no row that was run")
        first, *seeds = _learner(commands, row).seeds
        lines.append(command.split(" --")[0])
        for option in [*_options(command), f"--seed {first}"]:
            room = len(lines[-1].splitlines()[-1]) + len(option) < WIDTH
            lines[-1] += f" {option}" if room else f" \\\n    {option}"
        lines[-1] += f"  # and --seed {', '.join(map(str, seeds))}" * bool(seeds)
    return "\n\n```sh\n" + "\n".join(lines) + "\n```\n\n"


def plot(*, plot: str, file: str, rows: Sequence[str] | Mapping[str, str]) -> tuple[Path, dict[str, list[list[float]]]]:
    """A picture below docs/, and its curves: by what is shown, of each seed the mean accuracy after each task."""
    named = rows if isinstance(rows, Mapping) else {row: row for row in rows}
    curves = {shown: [kept["curve"] for kept in _learner(file, row).seeds.values()] for shown, row in named.items()}
    return ROOT / "docs" / plot, curves


WRITTEN: dict[str, Callable[..., str]] = {"columns": table, "value": value, "facts": facts, "commands": commands}


def marks(page: Path) -> list[dict[str, Any]]:
    """What stands in the marks of a page."""
    return [yaml.safe_load(found["spec"]) for found in MARK.finditer(page.read_text())]


def written(page: Path) -> str:
    """The text of a page with what its marks ask for.

    Raises:
        ValueError: a mark asks for something that there is not.
    """

    def fill(found: re.Match[str]) -> str:
        try:
            spec = yaml.safe_load(found["spec"])
            kinds = [kind for kind in (*WRITTEN, "plot") if isinstance(spec, dict) and kind in spec]
            if len(kinds) != 1:
                raise ValueError(f"a mark has one of {[*WRITTEN, 'plot']}")
            if kinds == ["value"] and found.string[: found.start()].rpartition("\n")[2].strip() == "":
                raise ValueError(
                    "the mark of a value must stand behind a word: at the start of a line it ends the paragraph"
                )
            body = found["body"]  # of a plot: the link to the picture, with its words
            if kinds == ["plot"]:
                plot(**spec)
            else:
                body = WRITTEN[kinds[0]](**spec)
        except (TypeError, ValueError, KeyError, yaml.YAMLError) as error:
            raise ValueError(f"{page.relative_to(ROOT)}: <!-- measured:{found['spec']}-->: {error}") from error
        return found[1] + body + found[4]

    text = page.read_text()
    ends = [len(re.findall(end, text)) for end in (r"<!-- measured:", r"<!-- /measured -->")]
    if ends != [len(MARK.findall(text))] * 2:
        raise ValueError(f"{page.relative_to(ROOT)}: {ends[0]} marks begin and {ends[1]} end: each must have both")
    return MARK.sub(fill, text)


def pages() -> list[Path]:
    """README and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def pictures() -> dict[Path, dict[str, list[list[float]]]]:
    """The curves of each picture that a page asks for."""
    return dict(plot(**spec) for page in pages() for spec in marks(page) if "plot" in spec)


def curves_of(picture: Path) -> Any:
    """The curves that a picture was drawn from; None: it is not there, or does not say."""
    if not picture.is_file():
        return None
    with Image.open(picture) as image:
        text = image.info.get(DESCRIPTION)
    return None if text is None else json.loads(text)


def draw(picture: Path, curves: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Draw curves, and write into the picture what they are."""
    draw_lines(curves, picture)
    info = PngInfo()
    info.add_text(DESCRIPTION, json.dumps(curves))
    with Image.open(picture) as image:
        image.load()
        image.save(picture, pnginfo=info, optimize=True)


def write() -> None:
    """Write all tables, and draw the pictures whose curves are others now."""
    for page in pages():
        text = written(page)
        if text != page.read_text():
            page.write_text(text)
            print(f"wrote {page.relative_to(ROOT)}")
    for picture, curves in pictures().items():
        if curves_of(picture) != curves:
            draw(picture, curves)
            print(f"drew {picture.relative_to(ROOT)}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="add runs to docs/measured/NAME.json")
    adding.add_argument("name", help="of the file, like cifar100_mini")
    adding.add_argument("folders", type=Path, nargs="+", help="of `cl-prompts compare`, or of one run")
    adding.add_argument("--rename", nargs="+", default=[], metavar="OLD=NEW", help="rows, or the method of one run")
    adding.add_argument("--replace", action="store_true", help="forget what is known of the rows that are added")
    commands.add_parser("write", help="write the tables and draw the plots")
    options = parser.parse_args()
    try:
        if options.command == "write":
            write()
        else:
            renamed = dict(pair.split("=", 1) for pair in options.rename)
            print(f"wrote {add(options.name, options.folders, renamed, replace=options.replace).relative_to(ROOT)}")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
