"""Marked tables, figures and plots of README and docs/ are what docs/measured has, and that is what runs have."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from support.paths import DOCS

from cl_prompts.continual import AccuracyMatrix
from cl_prompts.sharing.run_record import RunRecord


sys.path.insert(0, str(DOCS / "figures"))

import measurements
import tables


MACHINE = "EPYC, 2 cores; torch 2.13.0"


def matrix_of(*columns: list[float], images: int = 100) -> AccuracyMatrix:
    matrix = AccuracyMatrix()
    for column in columns:
        matrix.add(column, [images // len(columns)] * len(column))
    return matrix


def run(
    folder: Path, final: float, *, seed: int = 0, method: str = "apt", rate: float = 0.02, tasks: int = 2, images: int = 100
) -> Path:
    """The results folder of a run: the method forgets ten points, with another classifier none."""
    columns = {
        method: [[final + 10], [final, final]],
        f"{method} + ridge": [[60.0], [60.0, 80.0]],
        "nearest class mean": [[50.0], [50.0, 50.0 + rate * 100]],
    }
    record = RunRecord(
        {name: matrix_of(*([[final]] if tasks == 1 else own), images=images) for name, own in columns.items()},
        command=f"cl-prompts train --method {method} --learning_rate {rate} --model /some/where/vit-tiny-patch16-224 "
        f"--dataset my/data/pacs-mini numbers me/birds --seed {seed} --output_dir {folder}",
        trainable={method: 1234},
        seed=seed,
        machine=MACHINE,
        written="2026-11-28 01:10 UTC",
    )
    folder.mkdir(parents=True)
    record.save(folder, None)
    return folder


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of measurements."""
    monkeypatch.setattr(measurements, "FOLDER", tmp_path / "measured")
    return tmp_path / "measured"


def add(*folders: Path, replace: bool = False, **renamed: str) -> None:
    measurements.add("ours", folders, renamed, replace=replace)


# ---- the pages --------------------------------------------------------------------------------------------------------


def test_the_pages_say_what_was_measured() -> None:
    for page in tables.pages():
        assert page.read_text() == tables.written(page), f"{page}: run python docs/figures/tables.py write"
    assert sum(len(tables.marks(page)) for page in tables.pages()) > 20


def test_the_pictures_show_what_was_measured() -> None:
    for picture, curves in tables.pictures().items():
        assert tables.curves_of(picture) == curves, f"{picture}: run python docs/figures/tables.py write"
    assert tables.pictures()


def test_the_files_are_small_and_name_no_place_of_a_machine() -> None:
    files = sorted(measurements.FOLDER.glob("*.json"))
    assert files
    for file in files:
        assert file.stat().st_size < 64_000, file
        assert measurements.Measured.read(file.stem).text() == file.read_text(), f"{file} was written by hand"
        assert re.findall(r"[\s\"'=](?:/|~|\.\.)[\w/]+", file.read_text()) == [], file


# ---- what is kept of runs ---------------------------------------------------------------------------------------------


def test_seeds_of_single_runs_come_together(kept: Path, tmp_path: Path) -> None:
    add(run(tmp_path / "b", 72.0, seed=1), apt="APT")
    add(run(tmp_path / "a", 70.0), apt="APT")
    measured = measurements.Measured.read("ours")
    assert (measured.images, measured.dates, measured.machines) == (100, ["2026-11-28"], [MACHINE])
    assert list(measured.learners) == ["APT", "APT + ridge", "nearest class mean"]
    apt = measured.learners["APT"]
    assert apt.command == (
        "cl-prompts train --method apt --learning_rate 0.02 --model ./vit-tiny --dataset ./pacs-mini numbers me/birds"
    )
    assert {seed: (of["faa"], of["forgetting"], of["trainable"], of["curve"]) for seed, of in apt.seeds.items()} == {
        0: (70.0, 10.0, 1234, [80.0, 70.0]),
        1: (72.0, 10.0, 1234, [82.0, 72.0]),
    }
    assert measured.learners["nearest class mean"].beside == "APT"


def test_all_rows_of_a_comparison(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those that its file has and a later call with --rows left out; references of one row, none of a joint one."""
    home = tmp_path / "compared"
    rows = {"all at once": {"joint": True}, "APT 0.02": {"method": "apt"}, "APT 0.04": {"method": "apt"}}
    (tmp_path / "mine.yaml").write_text(json.dumps({"rows": rows}))
    run(home / "all-at-once-seed0", 90.0, tasks=1)
    run(home / "apt-0-04-seed0", 71.0, rate=0.04)
    run(home / "apt-0-02-seed0", 70.0)
    run(home / "gone-seed0", 89.0)
    command = f"cl-prompts compare {tmp_path / 'mine.yaml'} --rows 'APT 0.04'"
    (home / "comparison.json").write_text(json.dumps({"command": command, "results": {"APT 0.04": {}}}))
    add(home)
    learners = measurements.Measured.read("ours").learners
    of_rows = [name for name in learners if "+" not in name]
    assert of_rows == ["all at once", "APT 0.02", "nearest class mean", "APT 0.04"]
    assert learners["nearest class mean"].seeds[0]["faa"] == 51.0, "of the first row with two tasks"
    assert "forgetting" not in learners["all at once"].seeds[0], "there is nothing to forget after one task"
    assert "gone-seed0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [({"final": 71.0}, "seed 0 is there with other values"), ({"rate": 0.04, "seed": 1}, "--rename")],
)
def test_a_row_is_one_setting_and_a_seed_one_run(
    changes: dict[str, Any], complaint: str, kept: Path, tmp_path: Path
) -> None:
    add(run(tmp_path / "a", 70.0))
    before = (kept / "ours.json").read_text()
    other = run(tmp_path / "b", **{"final": 70.0} | changes)
    with pytest.raises(SystemExit, match=complaint):
        add(other)
    assert (kept / "ours.json").read_text() == before
    add(other, replace=True)
    assert list(measurements.Measured.read("ours").learners["apt"].seeds) == [changes.get("seed", 0)]


def test_other_images_are_another_file(kept: Path, tmp_path: Path) -> None:
    add(run(tmp_path / "a", 70.0))
    with pytest.raises(SystemExit, match="'l2p' answered 99 images, ours has learners of 100"):
        add(run(tmp_path / "b", 70.0, method="l2p", images=99, tasks=1))


# ---- what is written of it --------------------------------------------------------------------------------------------


@pytest.fixture
def page(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A page with a mark, as it is written."""
    add(run(tmp_path / "a0", 70.0), run(tmp_path / "a1", 72.0, seed=1), apt="APT")
    add(run(tmp_path / "l", 65.0, method="l2p", rate=0.05), l2p="L2P")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()

    def fill(mark: str) -> str:
        (tmp_path / "page.md").write_text(f"so <!-- measured: {mark} -->old<!-- /measured -->.")
        text = tables.written(tmp_path / "page.md")
        return str(text.removeprefix(f"so <!-- measured: {mark} -->").removesuffix("<!-- /measured -->."))

    return fill


def test_a_table_of_all_learners(page: Any) -> None:
    assert page("{file: ours, columns: [seeds, FAA, trainable, arguments]}") == (
        "\n| learner | seeds | FAA | trainable | arguments |\n|---|---:|---:|---:|---|\n"
        "| APT | 2 | 71.0 ± 1.4 | 1,234 | `--method apt --learning_rate 0.02` |\n"
        "| APT + ridge | 2 | 70.0 ± 0.0 |  |  |\n"
        "| nearest class mean | 2 | 51.0 ± 0.0 |  |  |\n"
        "| L2P | 1 | 65.0 | 1,234 | `--method l2p --learning_rate 0.05` |\n"
        "| L2P + ridge | 1 | 70.0 |  |  |\n"
    )


def test_a_table_of_classifiers(page: Any) -> None:
    mark = """
file: ours
heading: FAA (forgetting)
bold: true
columns: {own head: FAA (forgetting), ridge: "ours: + ridge FAA"}
rows:
  the default: APT
  L2P: L2P
  no prompts: {own head: nearest class mean}"""
    assert page(mark) == (
        "\n| FAA (forgetting) | own head | ridge |\n|---|---:|---:|\n"
        "| the default | **71.0 ± 1.4** (10.0 ± 0.0) | **70.0 ± 0.0** |\n"
        "| L2P | 65.0 (10.0), 1 seed | **70.0**, 1 seed |\n"
        "| no prompts | 51.0 ± 0.0 (0.0 ± 0.0) |  |\n"
    )


def test_figures_facts_and_commands(page: Any) -> None:
    assert page("{file: ours, value: APT}") == "71.0"
    assert page("{file: ours, value: APT, measure: forgetting}") == "10.0"
    assert page("{facts: ours}") == f"\n\n100 images, seeds 0, 1; 2026-11-28; {MACHINE}.\n\n"
    assert page("{commands: ours, rows: [APT]}") == (
        "\n\n```sh\ncl-prompts train --method apt --learning_rate 0.02 --model ./vit-tiny "
        "--dataset ./pacs-mini numbers me/birds \\\n    --seed 0  # and --seed 1\n```\n\n"
    )


def test_a_plot_has_its_curves(page: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert page("{plot: curves.png, file: ours, rows: {ours: APT}}") == "old", "the link to the picture stays"
    (tmp_path / "page.md").rename(tmp_path / "README.md")
    tables.write()
    assert tables.curves_of(tmp_path / "docs" / "curves.png") == {"ours": [[80.0, 70.0], [82.0, 72.0]]}
    assert "drew docs/curves.png" in capsys.readouterr().out
    tables.write()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("mark", "complaint"),
    [
        ("{file: theirs, columns: [FAA]}", "no measurements 'theirs'.*ours"),
        ("{file: ours, columns: [accuracy]}", "column 'accuracy' shows none of"),
        ("{file: ours, columns: [FAA], rows: [L3P]}", "row 'L3P'.*L2P"),
        ("{file: ours, columns: [FAA], rows: {L2P: {FAA: L3P}}}", "row 'L2P'.*L3P"),
        ("{file: ours, columns: [FAA], sorted: true}", "sorted"),
        ("{file: ours, value: L2P, measure: NLL}", "has no NLL"),
        ("{file: ours}", "a mark has one of"),
        ("{file: ours, value: [}", "page.md"),
        ("{commands: ours, rows: [nearest class mean]}", "no row that was run"),
        ("{plot: a.png, file: ours, rows: [L3P]}", "'L3P' is none of"),
    ],
)
def test_marks_that_ask_for_what_there_is_not(mark: str, complaint: str, page: Any) -> None:
    with pytest.raises(ValueError, match=complaint):
        page(mark)


def test_a_figure_does_not_begin_a_line(page: Any, tmp_path: Path) -> None:
    """There a comment ends the paragraph, for Markdown."""
    (tmp_path / "page.md").write_text("so\n  <!-- measured: {file: ours, value: APT} -->1<!-- /measured --> points")
    with pytest.raises(ValueError, match="behind a word"):
        tables.written(tmp_path / "page.md")


def test_a_mark_has_an_end(page: Any, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "one <!-- measured: {facts: ours} --> two <!-- measured: {facts: ours} --><!-- /measured -->"
    )
    with pytest.raises(ValueError, match="2 marks begin and 1 end"):
        tables.written(tmp_path / "page.md")
