"""Mutated files at every entrance for files of strangers: each is answered, or refused in one line."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random

import pytest
import uploads
from support.fuzzing import Seed, mutated, seeds
from support.hostile_bench import Bench, check_told
from support.hostile_files import CONFIG, WEIGHTS
from support.hostile_watch import bounded
from support.make_adapter_fixtures import NEWEST
from transformers.utils import logging

from cl_prompts import L2PConfig, PromptPoolConfig
from cl_prompts.runtime.images import read_rgb
from cl_prompts.sharing.base_files import BASE_WEIGHTS
from cl_prompts.sharing.base_models import load_base
from cl_prompts.sharing.card import CARD_FILE, MAX_CARD_BYTES, write_card
from cl_prompts.sharing.image_processor import BASE_CONFIG, PROCESSOR_FILE, check_processor, load_processor
from cl_prompts.sharing.inspect import describe_adapter
from cl_prompts.sharing.run_record import RESULTS_FILE, RunRecord
from cl_prompts.storage.adapter_files import find_adapter
from cl_prompts.storage.file_source import FileSource


# An entrance takes the name of a seed, its mutated content, an empty folder and random numbers.
Entrance = Callable[[str, bytes, Path, Random], object]


@cache
def bench() -> Bench:
    return Bench()


def adapter(folder: Path, method: str = "l2p") -> Path:
    """A sound adapter; seeds are called after the method that their other files come from."""
    source = NEWEST / method if (NEWEST / method).is_dir() else NEWEST / "l2p"
    for name in (CONFIG, WEIGHTS):
        shutil.copy(source / name, folder)
    return folder


def config(name: str, content: bytes, folder: Path, random: Random) -> None:
    (adapter(folder, Path(name).stem) / CONFIG).write_bytes(content)
    bench().load(folder, beside=random.random() < 0.2)


def header(name: str, content: bytes, folder: Path, random: Random) -> None:
    (adapter(folder, Path(name).stem) / WEIGHTS).write_bytes(content)
    bench().load(folder, verify=random.random() < 0.5)


def results(name: str, content: bytes, folder: Path, random: Random) -> None:
    path = adapter(folder) / RESULTS_FILE
    path.write_bytes(content)
    record = RunRecord.load(path)
    record.save(folder, json.loads((folder / CONFIG).read_text())["state"]["weights_sha256"])
    write_card(folder)


def processor(name: str, content: bytes, folder: Path, random: Random) -> None:
    (folder / PROCESSOR_FILE).write_bytes(content)
    (folder / BASE_CONFIG).write_text(json.dumps({"model_type": "vit"}))
    check_processor(load_processor(FileSource("pool", folder)), [8, 8])


def base(name: str, content: bytes, folder: Path, random: Random) -> None:
    sound = {Path(seed.name).suffix: seed.content for seed in seeds("base") if seed.name.startswith("vit.")}
    for suffix, file in ((".json", BASE_CONFIG), (".safetensors", BASE_WEIGHTS)):
        (folder / file).write_bytes(content if name.endswith(suffix) else sound[suffix])
    load_base(L2PConfig(base_model_name_or_path=str(folder)))


def picture(name: str, content: bytes, folder: Path, random: Random) -> None:
    image = read_rgb(content)
    assert image.mode == "RGB"
    assert image.width * image.height <= 50_000_000


def card(name: str, content: bytes, folder: Path, random: Random) -> None:
    """A card that is there, or words that it takes over from a config; the next save changes nothing."""
    path = adapter(folder) / CARD_FILE
    if random.random() < 0.7:
        path.write_bytes(content)
    else:
        words = content.decode(errors="replace")
        values = json.loads((folder / CONFIG).read_text())
        values["state"]["class_names"] = {"4": words, "1": words[::-1]}
        values["base_model_name_or_path"] = words
        (folder / CONFIG).write_text(json.dumps(values))
    write_card(folder, name="me/pool")
    once = path.read_bytes()
    assert len(once) <= MAX_CARD_BYTES
    write_card(folder, name="me/pool")
    assert path.read_bytes() == once


def upload(name: str, content: bytes, folder: Path, random: Random) -> None:
    (folder / name).write_bytes(content)
    (room := folder / "room").mkdir()
    try:
        uploads.take_adapter([folder / name], room)
        files = find_adapter(room)
        PromptPoolConfig.from_pretrained(files)
        describe_adapter(files)
    finally:
        assert {file.name for file in room.iterdir()} <= uploads.ADAPTER_FILES.keys()
        assert {file.name for file in folder.iterdir()} == {name, "room"}


ENTRANCES: dict[str, Entrance] = {
    made.__name__: made for made in (config, header, results, processor, base, picture, card, upload)
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def run_cases(entrance: str, count: int, room: Path) -> Counter[str]:
    """Try the seeds as they are, then mutated ones; how many were answered and refused."""
    corpus, seen = seeds(entrance), Counter[str]()
    for number in range(-len(corpus), count):
        random = Random(f"{entrance} {number}")
        seed = random.choice(corpus) if number >= 0 else corpus[number]
        content = mutated(random, seed, corpus) if number >= 0 else seed.content
        try:
            seen.update([run_case(entrance, seed, content, room, random)])
        except BaseException:
            print(f"case {number} of {entrance}, from {seed.name}: {content[:300]!r}")
            raise
    return seen


def run_case(entrance: str, seed: Seed, content: bytes, room: Path, random: Random) -> str:
    folder = room / entrance
    folder.mkdir()
    try:
        with warnings.catch_warnings(), bounded():
            warnings.simplefilter("ignore")
            ENTRANCES[entrance](seed.name, content, folder, random)
        return "answered"
    except (ValueError, TypeError, OSError) as error:
        check_told(error)
        return "refused"
    finally:
        shutil.rmtree(folder)


@pytest.mark.by_turns(3)
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_some_hundred_cases(entrance: str, tmp_path: Path) -> None:
    started = time.process_time()
    seen = run_cases(entrance, 300, tmp_path)
    print(f"{entrance}: {dict(seen)} in {time.process_time() - started:.1f} s")
    assert min(seen["answered"], seen["refused"]) > 1


@pytest.mark.slow
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_ten_thousand_cases(entrance: str, tmp_path: Path) -> None:
    started = time.process_time()
    seen = run_cases(entrance, 10_000, tmp_path)
    print(f"\n{entrance}: {dict(seen)} in {time.process_time() - started:.0f} s")
    assert min(seen["answered"], seen["refused"]) > 30
