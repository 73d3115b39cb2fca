"""Thousands of damaged, foreign and hostile adapters, drawn over all methods: each is refused in a line, or loads right."""

import contextlib
import json
import pickle
import struct
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.closed_form_models import answers
from support.hostile_bench import Bench, Change, check_told, contents, edited, in_state, original
from support.hostile_files import DAMAGES, REFUSED, SAME, WEIGHTS, Bomb, Case
from support.hostile_watch import PLANTED, Watch, bounded, peak_memory, planted
from support.make_adapter_fixtures import EVERY, NEWEST, base_of

from cl_prompts import PromptPoolModel, get_prompt_pool_model
from cl_prompts.storage.adapter_state import AdapterState


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


# ---- the two files of an adapter


def run_cases(count: int, room: Path, watch: Watch) -> Counter[str]:
    """Draw so many cases and try each; how often each damage, method and end occurred."""
    seen, benches, folder, mark = Counter[str](), [Bench()], room / "adapter", room / "mark"

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def one(data: st.DataObject) -> None:
        method = data.draw(st.sampled_from(list(EVERY)))
        other = data.draw(st.sampled_from([name for name in EVERY if name != method]))
        config, weights = contents(method)
        case = Case(json.loads(config), weights, json.loads(contents(other)[0]), mark)
        damage = data.draw(st.sampled_from(DAMAGES))
        must = damage(data.draw, case)
        case.write(folder)
        beside = case.verify and data.draw(st.integers(0, 3)) == 0
        seen.update([method, damage.__name__, "cases"])
        bench = benches.pop() if benches else Bench()  # a new one after a failure
        try:
            with warnings.catch_warnings(), bounded(), watch.armed(folder):
                warnings.simplefilter("ignore")
                found = bench.load(folder, beside=beside, verify=case.verify)
        except (ValueError, TypeError, OSError) as error:
            check_told(error)
            seen.update(["refused"])
        else:
            assert must != REFUSED
            assert must != SAME or found.same_as(original(method))
            seen.update(["loaded"])
        assert watch.seen == []
        assert not mark.exists()
        assert bench.seen() == bench.untouched
        benches.append(bench)

    with planted(room):
        one()
    assert torch.equal(answers(benches[0].model, benches[0].images), benches[0].answer)
    return seen


@pytest.mark.by_turns(3)
def test_some_hundred_cases(tmp_path: Path, watch: Watch) -> None:
    seen = run_cases(120, tmp_path, watch)
    assert seen["cases"] >= 120
    assert min(seen["refused"], seen["loaded"]) > 8


@pytest.mark.slow
def test_more_than_five_thousand_cases(tmp_path: Path, watch: Watch) -> None:
    seen = run_cases(6000, tmp_path, watch)
    print(dict(seen))
    assert seen["cases"] >= 5000
    assert min(seen[method] for method in EVERY) >= 50
    assert min(seen[damage.__name__] for damage in DAMAGES) >= 200
    assert min(seen["refused"], seen["loaded"]) > 500


def test_the_watch_would_see_it(tmp_path: Path, watch: Watch) -> None:
    (tmp_path / "outside").write_bytes(b"")
    with watch.armed(tmp_path / "adapter"):
        with contextlib.suppress(AttributeError):
            pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
        (tmp_path / "outside").open("rb").close()
        with contextlib.suppress(ImportError):
            __import__(PLANTED)
    told = " ".join(watch.seen)
    assert "pickle.find_class" in told
    assert "open" in told
    assert f"import ('{PLANTED}'" in told
    with pytest.raises((RuntimeError, MemoryError)), bounded():
        torch.empty(2**31)


# ---- large files


MANY = 10**5
KNOWN = [[4, 1], [0, 3]]
LARGE: dict[str, tuple[Change, str | None]] = {
    "revisits": (in_state(tasks=[*KNOWN, *[[0]] * MANY]), r"does not fit its config|the config implies"),
    "tasks": (in_state(tasks=[[c] for c in range(MANY)]), r"has 100000 classes, but no tensor in .* has more than"),
    "one task": (in_state(tasks=[list(range(3 * MANY))]), r"has 300000 classes, but no tensor in"),
    "num_labels": (
        lambda config: (config.update(num_labels=10**7, class_mask="none"), config["state"].update(tasks=[])),
        r"has 10000000 classes, but no tensor in|without tasks nobody says",
    ),
    "names": (in_state(class_names={str(c): "x" for c in range(2 * MANY)}), None),
    "fields": (lambda config: config.update({f"field {n}": n for n in range(2 * MANY)}), None),
    "text": (in_state(written_by="x" * 10**6), None),
    "8 MiB": (in_state(written_by="x" * 2**23), r"has 8,.* bytes, a config at most 8,388,608: shorten its class names"),
    "lists": (lambda config: config.update(lists=[[]] * 10**6), None),
}


# Methods that keep nothing for each task: for them the revisits are true.
NOTHING_BY_TASK = ("vpt", "vpt deep", "none", "none analytic")


def load_large(bench: Bench, method: str, name: str, room: Path) -> None:
    change, message = LARGE[name]
    folder = edited(method, room, change)
    with warnings.catch_warnings(), bounded():
        warnings.simplefilter("ignore")
        if message is None or (name == "revisits" and method in NOTHING_BY_TASK):
            assert bench.load(folder).same_as(original(method))
            return
        with pytest.raises(ValueError, match=message) as told:
            bench.load(folder)
    check_told(told.value)


@pytest.mark.by_turns(5, always=())
@pytest.mark.parametrize(
    ("method", "name"),
    [("vpt", "revisits"), ("hide", "revisits"), ("hash", "tasks"), ("l2p", "num_labels"), ("l2p", "8 MiB")],
)
def test_large_configs(bench: Bench, tmp_path: Path, method: str, name: str) -> None:
    load_large(bench, method, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", EVERY)
def test_large_configs_of_every_method(bench: Bench, tmp_path: Path, method: str) -> None:
    for name in LARGE:
        load_large(bench, method, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", EVERY)
def test_many_tasks_are_loaded_in_time(bench: Bench, tmp_path: Path, method: str) -> None:
    state = AdapterState(tasks=[[c] for c in range(10**4)])
    get_prompt_pool_model(base_of(NEWEST), EVERY[method](state=state)).save_pretrained(tmp_path)
    with bounded(room=2**32):
        PromptPoolModel.from_pretrained(bench.base, tmp_path).unload()


def huge(folder: Path, shape: list[int]) -> None:
    """A file with holes, which takes no room on the disk, of one tensor more."""
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, size = json.loads(content[8 : 8 + length]), len(content) - 8 - length
    header["huge"] = {"dtype": "F32", "shape": shape, "data_offsets": [size, size + 4 * shape[0]]}
    text = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + content[8 + length :])
        file.truncate(8 + len(text) + size + 4 * shape[0])


def crowded(folder: Path, tensors: int) -> None:
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(entry % number for number in range(tensors)) + "}").encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: huge(folder, [2**32]), r"unexpected \['huge'\]|bytes, more than the limit"),
        (lambda folder: huge(folder, [2**29]), r"unexpected \['huge'\]"),
        (lambda folder: crowded(folder, 10**5), r"has a header of 5,.* bytes, more than 1,048,576: it is no adapter's"),
        (lambda folder: crowded(folder, 10**4), r"has 4 classes, but no tensor in .* has more than 0 rows"),
    ],
)
def test_large_weights_are_refused_unread(bench: Bench, tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(folder := edited("l2p", tmp_path, lambda config: None))
    with peak_memory() as peak, pytest.raises(ValueError, match=message) as told:
        PromptPoolModel.from_pretrained(bench.base, folder)
    check_told(told.value)
    assert peak() < 64 * 2**20
    assert bench.seen() == bench.untouched
