"""Tables over seeds, and the page of a run."""

import json
import math
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
from matplotlib import colormaps
from PIL import Image

from cl_prompts.continual import AccuracyMatrix, Evaluation
from cl_prompts.evaluation.plots import draw, draw_curves, draw_matrix
from cl_prompts.evaluation.report import (
    Result,
    comparison_table,
    half_width,
    headline,
    machine,
    matrix_table,
    mean_and_deviation,
    remarks,
    run_page,
    task_table,
)


def matrix_of(*columns: list[float], known: bool = False, images: int = 50) -> AccuracyMatrix:
    matrix = AccuracyMatrix()
    for column in columns:
        matrix.add(column, [images] * len(column), column if known else None)
    return matrix


def flat(faa: float, **options: Any) -> AccuracyMatrix:
    return matrix_of([faa], [faa, faa], **options)


def cells(table: str) -> list[dict[str, str]]:
    """Rows of a Markdown table by heading."""
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
    assert set(rows[1][0]) == {"-"}
    return [dict(zip(rows[0], row, strict=True)) for row in [rows[0], *rows[2:]]][1:]


def test_comparison_over_seeds() -> None:
    values = [60.0, 62.0, 67.0]
    results = [Result("L2P", flat(faa), seed, 1000 + seed, 10.0 * (seed + 1)) for seed, faa in enumerate(values)]
    results.insert(1, Result("probe", flat(58.0), 0, seconds=10.0))
    first, second = cells(comparison_table(results))
    spread = np.std(values, ddof=1)
    assert first["FAA"] == first["when just learned"] == f"63.0 ± {spread:.1f}" == "63.0 ± 3.6"
    assert (first["learner"], first["seeds"], first["forgetting"]) == ("L2P", "3", "0.0 ± 0.0")
    assert (first["trainable"], first["seconds"]) == ("1,000 to 1,002", "20")
    assert (second["seeds"], second["FAA"], second["trainable"], second["seconds"]) == ("1", "58.0", "", "10")
    assert "±" not in "".join(second.values())


def test_the_first_sentence_says_what_is_known() -> None:
    ours, naive = Result("Hash", flat(97.2), 0), Result("sequential linear probe", flat(41.7), 0)
    assert headline([ours, naive], 10) == (
        "After 2 tasks, Hash recognizes 97.2 % of the test images of all 10 classes; a classifier trained naively, "
        "task after task: 41.7 %."
    )
    assert headline([Result("a", matrix_of([50.0]), 0)]) == "After 1 task, a recognizes 50.0 % of the test images."
    assert headline([naive]) == "After 2 tasks, sequential linear probe recognizes 41.7 % of the test images."
    assert headline([ours, Result("Hash", flat(95.2), 1)], 10).startswith("After 2 tasks, Hash recognizes 96.2 %")


def test_columns_come_where_something_is_known() -> None:
    plain = cells(comparison_table([Result("a", flat(50), 0), Result("b | c", flat(60), 0)]))
    assert list(plain[0]) == ["learner", "FAA", "CAA", "forgetting", "when just learned"]
    assert [row["learner"] for row in plain] == ["a", "b \\| c"]
    sized = cells(comparison_table([Result("a", flat(50), 0), Result("b", flat(60), 0, 12345)]))
    assert [row["trainable"] for row in sized] == ["", "12,345"]
    with_transfer = flat(40, known=True)
    with_transfer.before[1], with_transfer.baseline[1] = 30.0, 10.0
    rows = cells(comparison_table([Result("a", with_transfer, 0), Result("b", flat(50), 0)]))
    assert [(row["FAA, task known"], row["FWT"]) for row in rows] == [("40.0", "20.0"), ("", "")]
    # a mean over some of the seeds only would be no mean over the seeds
    rows = cells(comparison_table([Result("a", with_transfer, 0), Result("a", flat(50), 1)]))
    assert rows[0]["FWT"] == ""


def test_results_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="no results to report"):
        comparison_table([])
    with pytest.raises(ValueError, match="'a' has seed 3 twice"):
        comparison_table([Result("a", flat(50), 3), Result("a", flat(60), 3)])
    with pytest.raises(ValueError, match=r"different numbers of tasks .*'b': \[1\]"):
        comparison_table([Result("a", flat(50), 0), Result("b", matrix_of([50.0]), 0)])


def test_mean_and_deviation() -> None:
    assert mean_and_deviation([57.32]) == "57.3"
    assert mean_and_deviation([1.0, 2.0]) == f"1.5 ± {math.sqrt(0.5):.1f}"


def test_matrix_table() -> None:
    rows = cells(matrix_table(matrix_of([90.0], [80.0, 70.0])))
    assert rows == [
        {"task": "1", "images": "50", "after 1": "90.0", "after 2": "80.0"},
        {"task": "2", "images": "50", "after 1": "", "after 2": "70.0"},
    ]


def test_task_table() -> None:
    measured = [
        Evaluation(60.0, 10, None, 80.0, 70.0, 40.0, {"aligned": 65.0}),
        Evaluation(50.0, 10, None, 90.0, 60.0, 20.0, {"aligned": 75.0}),
    ]
    rows = cells(task_table(measured))
    assert rows[0]["prompts of the right task"] == "40.0"
    assert rows[2] == {
        "task": "mean",
        "accuracy": "55.0",
        "task known": "85.0",
        "class of the right task": "65.0",
        "prompts of the right task": "30.0",
        "aligned": "70.0",
    }
    assert list(cells(task_table([Evaluation(60.0, 10, None)]))[0]) == ["task", "accuracy"]


def test_interval() -> None:
    """Wilson's interval by its definition: the shares p with |found - p| = 1.96 * sqrt(p (1 - p) / n)."""
    for share, images in ((0.65, 2000), (1.0, 40), (0.0, 10)):
        candidates = np.linspace(0, 1, 200_001)
        inside = candidates[np.abs(share - candidates) <= 1.96 * np.sqrt(candidates * (1 - candidates) / images)]
        assert half_width(share, images) == pytest.approx(100 * (inside.max() - inside.min()) / 2, abs=1e-3)


def test_remarks_are_honest() -> None:
    def said(ours: float, **others: float) -> str:
        named = {"probe": "sequential linear probe", "mean": "nearest class mean", "joint": "joint linear probe"}
        rest = [Result(named[name], flat(faa), 0) for name, faa in others.items()]
        return remarks([Result("L2P", flat(ours), 0), *rest])

    text = said(57.0, probe=63.0, mean=68.0, joint=69.0)
    assert "L2P does not beat the sequential linear probe here (57.0 against 63.0)" in text
    assert "L2P does not beat the nearest class mean here (57.0 against 68.0)" in text
    assert "joint" not in text
    assert "One seed" in text
    assert "100 test images: an accuracy of 57.0 is known to about ± 9.5 points" in text
    assert "does not beat the nearest" in said(60.0, mean=60.0)
    assert "L2P beats the sequential linear probe by no more than that (60.0 against 55.0)" in said(60.0, probe=55.0)
    assert "pays" not in said(60.0, probe=30.0, mean=55.0), "the better one of the two is within the noise"
    text = said(80.0, probe=55.0, mean=60.0, joint=90.0)
    assert "L2P beats the nearest class mean here (80.0 against 60.0): what it trains pays" in text
    assert text.count("beat") == 1
    assert "nothing says whether its training pays" in said(80.0, joint=70.0)
    several = remarks([Result("L2P", flat(60.0), seed) for seed in range(2)])
    assert "One seed" not in several


def a_page(folder: Path, **changes: Any) -> Path:
    runs = [Result("L2P", matrix_of([90.0], [80.0, 70.0]), seed, 1234, 60.0) for seed in (4, 5)]
    options: dict[str, Any] = {
        "command": "accelerate launch examples/train_cil.py --seed 4",
        "model": "a/vit",
        "data": "some/images",
        "arguments": {"lr": 0.005, "layers": [0, 1], "recipe": None, "pipe": "a|b"},
        "seconds": 3723.4,
        "evaluations": [Evaluation(80.0, 50, None, 85.0, 90.0), Evaluation(70.0, 50, None, 75.0, 90.0)],
        "selection": "- routing entropy: 0.5",
        **changes,
    }
    return run_page(folder, [*runs, Result("nearest class mean", flat(77.0), 4)], **options)


def test_page(tmp_path: Path) -> None:
    plots = draw({"L2P": flat(50)}, tmp_path)
    page = a_page(tmp_path, plots=plots)
    text = page.read_text()
    assert page == tmp_path / "results.md"
    for wanted in (
        "# L2P\n",
        "- model: a/vit",
        "- data: some/images",
        "- tasks: 2",
        "- seeds: 4, 5",
        "- seconds: 3,723",
        f"- machine: {machine()}",
        "| L2P | 2 | 75.0 ± 0.0 |",
        "does not beat the nearest class mean here (75.0 against 77.0)",
        "## Accuracy on each task, seed 4",
        "- routing entropy: 0.5",
        "![curves](curves.png)",
        "![matrix](matrix.png)",
        "```sh\naccelerate launch examples/train_cil.py --seed 4\n```",
        "| `layers` | [0, 1] |",
        "| `recipe` | null |",
        '| `pipe` | "a\\|b" |',
    ):
        assert wanted in text, wanted
    assert re.search(r"- written: 20\d\d-\d\d-\d\d \d\d:\d\d UTC", text)
    assert "\n\n\n" not in text
    assert json.loads(re.search(r"`lr` \| (.*) \|", text)[1]) == 0.005  # type: ignore[index]
    assert {file.name for file in tmp_path.iterdir()} == {"results.md", "curves.png", "matrix.png"}


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = a_page(tmp_path)
    before = page.read_text()

    class Unprintable:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    with pytest.raises(RuntimeError, match="no text"):
        a_page(tmp_path, arguments={"broken": Unprintable()})
    with pytest.raises(ValueError, match=r"missing.png is no picture in"):
        a_page(tmp_path, plots=[tmp_path / "missing.png"])
    elsewhere = draw_matrix(flat(50), tmp_path / "elsewhere" / "matrix.png")
    with pytest.raises(ValueError, match="is no picture in"):
        a_page(tmp_path / "run", plots=[elsewhere])
    assert page.read_text() == before
    assert not (tmp_path / "run" / "results.md").exists()


def test_machine_names_what_ran() -> None:
    assert f"torch {torch.__version__}" in machine()
    assert f"transformers {transformers.__version__}" in machine()
    assert "\n" not in machine()


def pixels_of(file: Path) -> Any:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_curves_of_several_seeds_have_a_band(tmp_path: Path) -> None:
    """Between the outer runs lies colour only if there are several; lines end where the tasks end."""

    def colored(runs: list[AccuracyMatrix]) -> float:
        pixels = pixels_of(draw_curves({"L2P": runs}, tmp_path / "curves.png"))
        return float((pixels.max(2) - pixels.min(2) > 15).mean())

    alone, alike, apart = colored([flat(50)]), colored([flat(50), flat(50)]), colored([flat(30), flat(70)])
    assert alike < 1.5 * alone
    assert apart > 5 * alone


def hues(file: Path) -> set[tuple[int, int, int]]:
    """The colours of matplotlib's first lines that a picture has."""
    pixels = {tuple(color) for color in pixels_of(file).reshape(-1, 3).tolist()}
    return {color for color in FIRST_COLORS if color in pixels}


FIRST_COLORS = [tuple(round(255 * part) for part in colormaps["tab10"](n)[:3]) for n in range(3)]


@pytest.mark.slow
def test_curves_that_coincide_are_all_seen(tmp_path: Path) -> None:
    """Without the legend, whose lines have the colours in any case."""
    runs = {name: [matrix_of([90.0], [90.0, 90.0 + 1e-3 * n])] for n, name in enumerate("abc")}
    with patch("matplotlib.axes.Axes.legend"):
        assert hues(draw_curves(runs, tmp_path / "curves.png")) == set(FIRST_COLORS)


def test_the_axis_of_curves_fits_the_data(tmp_path: Path) -> None:
    """High curves use the height of the picture, and noise does not."""

    def height(*values: float) -> int:
        with patch("matplotlib.axes.Axes.legend"):
            pixels = pixels_of(draw_curves({"a": [matrix_of(*([v] * (n + 1) for n, v in enumerate(values)))]}, file))
        rows = np.flatnonzero((pixels.max(2) - pixels.min(2) > 15).any(1))
        return int(rows[-1] - rows[0])

    file = tmp_path / "curves.png"
    assert height(98.0, 80.0, 99.0) > 0.8 * height(0.0, 100.0, 50.0)
    assert height(98.0, 98.1, 98.0) < 0.1 * height(0.0, 100.0, 50.0)


def test_numbers_in_the_matrix_while_there_is_room(tmp_path: Path) -> None:
    """The first cell is of one colour where no number stands on it."""

    def colours(tasks: int) -> int:
        matrix = matrix_of(*([50.0] * (task + 1) for task in range(tasks)))
        pixels = pixels_of(draw_matrix(matrix, tmp_path / "matrix.png"))
        filled = np.argwhere(np.abs(pixels - pixels_of_fifty).max(2) == 0)
        top, left = filled.min(0)
        size = (filled[:, 0].max() - top) // tasks - 1
        return len(np.unique(pixels[top : top + size, left : left + size].reshape(-1, 3), axis=0))

    pixels_of_fifty = np.array(colormaps["viridis"](0.5, bytes=True)[:3]).astype(int)
    assert colours(13) == 1
    assert colours(12) > 1


@pytest.mark.slow
def test_many_curves_leave_room_for_the_picture(tmp_path: Path) -> None:
    """Their names lie beside it: the longest line along the tasks is as long as with few."""

    def widest(learners: int) -> int:
        runs = {f"learner {n} + discriminant": [flat(40 + n)] for n in range(learners)}
        pixels = pixels_of(draw_curves(runs, tmp_path / "curves.png"))
        return int((pixels.max(2) - pixels.min(2) > 15).sum(1).max())

    assert widest(60) > 0.8 * widest(3)
