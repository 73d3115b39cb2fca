"""Mutation of seed files. A case follows from its number alone, so that it can be made again.

Seeds lie in `tests/seeds`, a folder for each entrance. A file that was once taken wrongly is put there.
"""

from __future__ import annotations

import json
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from support.hostile_values import NUMBERS, TEXTS
from support.paths import TESTS


SEEDS = TESTS / "seeds"
MOST = 2**18  # bytes of a mutated file
VALUES = [*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], float("nan"), float("inf"), 10**400, "9" * 400]
TOKENS = [
    *(text.encode(errors="surrogatepass") for text in TEXTS),
    *(struct.pack(form, number) for form in ("<I", ">I", "<Q") for number in (0, 1, 2**16 - 1, 2**31, 2**32 - 1)),
    b"\xef\xbb\xbf",
    b"<!-- End of what cl_prompts writes. -->",
    b"---\n",
    b"<script>alert(1)</script>",
    b"[" * 2000,
    b'{"a":' * 2000,
    b"&a [*a, *a]",
    b"1e999",
    b"PK\5\6",
    b"PK\1\2",
]

Edit = Callable[[Random, bytes], bytes]


class Seed(NamedTuple):
    """A file of the corpus."""

    name: str
    content: bytes


def seeds(entrance: str) -> list[Seed]:
    """The corpus of an entrance."""
    return [Seed(path.name, path.read_bytes()) for path in sorted((SEEDS / entrance).iterdir())]


def mutated(random: Random, seed: Seed, corpus: list[Seed]) -> bytes:
    """The content of a seed after one to four edits, some of which know its format."""
    content, of_format = seed.content, OF_FORMAT.get(Path(seed.name).suffix)
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        if of_format is not None and random.random() < 0.6:
            content = of_format(random, content)
        elif random.random() < 0.1:
            content = content[: _place(random, content)] + random.choice(corpus).content[_place(random, content) :]
        else:
            content = random.choice(EDITS)(random, content)
    return content[:MOST]


def _place(random: Random, content: bytes) -> int:
    """An index; every other one near the beginning, where headers are."""
    return random.randrange(min(len(content), 64) + 1) if random.random() < 0.5 else random.randrange(len(content) + 1)


def flip(random: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice([1, 1, 3, 20])):
        if changed:
            changed[_place(random, content) % len(changed)] ^= 1 << random.randrange(8)
    return bytes(changed)


def cut(random: Random, content: bytes) -> bytes:
    start, end = sorted((_place(random, content), _place(random, content)))
    return random.choice([content[:start], content[end:], content[:start] + content[end:]])


def put_in(random: Random, content: bytes) -> bytes:
    place = _place(random, content)
    token = random.choice(TOKENS) if random.random() < 0.8 else random.randbytes(random.randrange(1, 40))
    over = random.choice([0, len(token)])
    return content[:place] + token + content[place + over :]


def repeat(random: Random, content: bytes) -> bytes:
    start, end = sorted((_place(random, content), _place(random, content)))
    return content[:end] + content[start:end] * random.choice([1, 2, 100]) + content[end:]


def number(random: Random, content: bytes) -> bytes:
    """Another number in place of one that is written in digits."""
    found = list(re.finditer(rb"\d+", content))
    if not found:
        return flip(random, content)
    one = random.choice(found)
    return content[: one.start()] + str(random.choice(NUMBERS)).encode() + content[one.end() :]


EDITS: list[Edit] = [flip, cut, put_in, repeat, number]


def in_json(random: Random, content: bytes) -> bytes:
    """Another value, name or depth somewhere in a JSON tree."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return flip(random, content)
    places: list[tuple[Any, Any]] = []
    _walk(tree, places)
    if not places:
        return json.dumps(random.choice(VALUES)).encode()
    parent, key = random.choice(places)
    kind = random.choice(["value", "value", "value", "gone", "name", "deeper", "other", "twice"])
    if kind == "gone":
        del parent[key]
    elif kind == "name" and isinstance(parent, dict):
        parent[random.choice(TEXTS)] = parent.pop(key)
    elif kind == "deeper":
        parent[key] = json.loads("[" * 60 + json.dumps(parent[key]) + "]" * 60)
    elif kind == "other":
        other, at = random.choice(places)
        parent[key] = json.loads(json.dumps(other[at]))
    elif kind == "twice" and isinstance(parent[key], list):
        parent[key] = parent[key] * random.choice([2, 1000])
    else:
        parent[key] = random.choice(VALUES)
    return json.dumps(tree).encode()


def _walk(tree: Any, places: list[tuple[Any, Any]]) -> None:
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        places.append((tree, key))
        _walk(value, places)


def in_safetensors(random: Random, content: bytes) -> bytes:
    """Another entry in the header, whose length is right."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = in_json(random, content[8:end])
    return struct.pack("<Q", len(header)) + header + content[end:]


def in_zip(random: Random, content: bytes) -> bytes:
    """A zip file written anew with another name or content, or a file twice."""
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()[:20]]
    except Exception:
        return flip(random, content)
    if entries:
        place = random.randrange(len(entries))
        name, inside = entries[place]
        hostile = random.choice([*TEXTS, f"../{name}", f"/{name}", f"{name}/", f"a/b/{name}", name.upper()])
        edit = in_json if name.endswith(".json") else in_safetensors
        entries[place] = random.choice([(hostile, inside), (name, edit(random, inside)), (name, b"")])
        entries += entries[:1] * random.choice([0, 0, 1])
    made, kind = BytesIO(), random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    with warnings.catch_warnings(), zipfile.ZipFile(made, "w", kind) as archive:
        warnings.simplefilter("ignore")  # of names that stand twice
        for name, inside in entries:
            archive.writestr(zipfile.ZipInfo(name.encode(errors="replace").decode() or "x"), inside)
    return made.getvalue()


OF_FORMAT: dict[str, Edit] = {".json": in_json, ".safetensors": in_safetensors, ".zip": in_zip}
