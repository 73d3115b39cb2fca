"""The page of examples/space, without a browser: what it opens and refuses, what it shows as text, its own folder."""

import json
import struct
import time
import tomllib
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import answering
import opening
import pytest
import showing
import teaching
import torch
import uploads
import yaml
from huggingface_hub import HfApi
from packaging.requirements import Requirement
from PIL import Image
from push import assemble
from safetensors.torch import load_file
from support.families import build
from support.hub_server import Hub
from support.paths import ROOT
from support.space_pools import HOSTILE, logits, samples, tiny
from transformers import ViTImageProcessor, ViTModel

from cl_prompts import (
    DualPromptConfig,
    L2PConfig,
    get_prompt_pool_model,
)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def digits() -> opening.OpenPool:
    return opening.open_digits()


# ---- uploads


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    content = BytesIO()
    Image.new("RGB", size, "white").save(content, "PNG")
    return content.getvalue()


def test_bad_pictures_are_a_line_each_and_good_ones_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_IMAGE_BYTES", 20_000)
    monkeypatch.setattr(uploads, "MAX_PIXELS", 5_000_000)
    files = {
        "good.png": png(),
        "half.png": png((64, 64))[:-40],
        "text.png": b"no picture",
        "empty.png": b"",
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) print\n%%EOF\n",
        "large.png": bytes(20_001),
        "huge.png": png((3000, 2000))[:200],
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images, problems = uploads.take_images([tmp_path / name for name in files])
    assert list(images) == ["good.png"]
    assert len(problems) == len(files) - 1
    for name, told in zip(list(files)[1:], problems, strict=True):
        assert told.startswith(name)
        assert "\n" not in told
        assert str(tmp_path) not in told
    assert "3000x2000 pixels, more than 5,000,000 (max_pixels): scale it down" in problems[5]
    with pytest.raises(ValueError, match="21 files are too many: at most 20"):
        uploads.take_images([tmp_path / "good.png"] * 21)
    assert list(uploads.take_images([tmp_path / "good.png"] * 3)[0]) == ["good.png", "good.png (2)", "good.png (3)"]
    (tmp_path / "a (1).png").write_bytes(png())
    assert list(uploads.take_images([tmp_path / "a (1).png"] * 2)[0]) == ["a (1).png", "a (1).png (2)"]
    assert list(uploads.take_images([tmp_path / "good.png"], images)[0]) == ["good.png (2)"], (
        "phones call every photo alike"
    )
    (tmp_path / "wide.png").write_bytes(png((2048, 512)))
    assert uploads.take_images([tmp_path / "wide.png"])[0]["wide.png"].size == (1024, 256)


def test_uploaded_files_are_removed(tmp_path: Path) -> None:
    file = tmp_path / "hash" / "a.png"
    file.parent.mkdir()
    file.write_bytes(b"x")
    uploads.forget([file])
    uploads.forget([file])
    uploads.forget(None)
    assert not file.parent.exists()


def zipped(file: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file


def test_uploads_that_are_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(uploads.ADAPTER_FILES, CONFIG, 5000)
    room = tmp_path / "temporary"
    room.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(room))
    config, weights = ((opening.DIGITS / name).read_bytes() for name in (CONFIG, WEIGHTS))
    content = json.loads(config) | {"base_model_name_or_path": str(opening.MICRO_VIT)}
    content["state"]["base_fingerprint"] = "0" * 64
    cases: list[tuple[list[tuple[str, bytes]], str]] = [
        ([], f"{CONFIG} is missing: give"),
        ([(CONFIG, config)], f"{WEIGHTS} is missing"),
        ([(CONFIG, config), ("adapter_model.bin", b"\x80\x04.")], "adapter_model.bin is no file of an adapter"),
        ([(CONFIG, config + bytes(5000)), (WEIGHTS, weights)], "more than 5,000"),
        ([(CONFIG, b"{}"), (WEIGHTS, weights)], "peft_type|PROMPT_POOL"),
        ([(CONFIG, config), (WEIGHTS, weights[:-100])], "truncated|bytes"),
        ([(CONFIG, json.dumps(content).encode()), (WEIGHTS, weights)], "names no base model on the Hub"),
        ([("pool.zip", b"no zip")], "pool.zip is no zip that can be read"),
    ]
    bomb = zipped(tmp_path / "bomb.zip", {CONFIG: bytes(10**7)})
    foreign = zipped(tmp_path / "foreign.zip", {f"../../{CONFIG}": config, f"../../{WEIGHTS}": b"", "/etc/passwd": b"root"})
    whole = zipped(tmp_path / "whole.zip", {CONFIG: config, WEIGHTS: weights}).read_bytes()
    inside = whole.index(b"PK", 9) - 100  # in the deflated config
    small = zipped(tmp_path / "small.zip", {CONFIG: config}, zipfile.ZIP_LZMA)
    cases += [
        ([("bomb.zip", bomb.read_bytes())], "more than 5,000"),
        ([("foreign.zip", foreign.read_bytes())], "adapter_model"),
        ([("flipped.zip", whole[:inside] + bytes(64) + whole[inside + 64 :])], "flipped.zip is no zip that can be read"),
        ([("short.zip", whole[:-1])], "is no zip that can be read .it has no directory"),
        ([("lzma.zip", small.read_bytes())], "compressed in another way than by deflating"),
    ]
    for number, (files, told) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, data in files:
            (folder / name).write_bytes(data)
        with pytest.raises(ValueError, match=told) as caught:
            opening.open_files([folder / name for name, _ in files])
        assert "\n" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value), str(caught.value)
    assert not list(room.iterdir())
    assert not (tmp_path.parent / CONFIG).exists()


@pytest.mark.parametrize("entries", [60_000, 1_000_000])
def test_a_zip_of_many_entries_is_refused_before_it_is_opened(tmp_path: Path, entries: int) -> None:
    """`zipfile` reads all entries when it opens a file, for ten seconds; more than 65,535 need a directory of 64 bits."""
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    size, many = len(entry) * entries, entries > 65_535
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, size, 0)
    end += struct.pack("<4sLQL", b"PK\6\7", 0, size, 1)
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *[0xFFFF if many else entries] * 2, 0xFFFFFFFF if many else size, 0, 0)
    file = tmp_path / "many.zip"
    file.write_bytes(entry * entries + (end if many else b"") + last)
    started = time.process_time()
    with pytest.raises(ValueError, match="its directory has more than 262,144 bytes"):
        uploads.take_adapter([file], tmp_path)
    assert time.process_time() - started < 0.5


def test_an_uploaded_adapter_is_read_from_its_files_or_a_zip(digits: opening.OpenPool, tmp_path: Path) -> None:
    files = [opening.DIGITS / name for name in (CONFIG, WEIGHTS)]
    flat = zipped(tmp_path / "flat.ZIP", {f"a/b/{file.name}": file.read_bytes() for file in files})
    for given in (files, [flat]):
        pool = opening.open_files(given)
        assert torch.equal(logits(pool), logits(digits))
        assert pool.record is None
        assert "accuracy is unknown" in showing.record(pool)
    with_record = opening.open_files([*files, opening.DIGITS / "results.json"])
    assert "98.6" in showing.record(with_record)


# ---- the Hub


def push_cats(repo: str, folder: Path) -> None:
    """An adapter of the class 3, with its base."""
    build("vit").save_pretrained(folder)
    model = get_prompt_pool_model(ViTModel.from_pretrained(folder), L2PConfig(pool_size=4, top_k=2))
    model.begin_task([3], class_names={3: "cat"})
    model.end_task()
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    model.push_to_hub(repo, include_base=True, image_processor=processor)


def test_a_pool_of_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_cats("me/cats", tmp_path)
    pool = opening.open_hub(" me/cats ")
    assert pool.model.classes == [3]
    assert not pool.on_micro_vit
    assert "me/cats" in showing.facts(pool)
    monkeypatch.setattr(opening, "MAX_BASE_BYTES", 1000)
    with pytest.raises(ValueError, match=r"its weights have [\d,]+ bytes, more than the 1,000 that are taken here"):
        opening.open_hub("me/cats")
    monkeypatch.undo()
    monkeypatch.setattr(opening, "MIN_FREE_BYTES", 2**60)
    with pytest.raises(ValueError, match="disk is full"):
        opening.open_hub("me/cats")


def test_a_base_whose_config_would_fill_the_memory(hub: Hub, tmp_path: Path) -> None:
    """Transformers builds what the config says before it compares the weights, which are small here."""
    push_cats("me/cats", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 8192, "intermediate_size": 32768}))
    HfApi().upload_file(repo_id="me/cats", path_or_fileobj=config, path_in_repo="base/config.json")
    with pytest.raises(ValueError, match=r"has shape \[1, 1, 32\] in its weights, its config implies \[1, 1, 8192\]"):
        opening.open_hub("me/cats")


def test_private_repositories_and_folders_of_the_machine_stay_closed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_TOKEN of this process could read the first; the page opens it for nobody."""
    api = HfApi()
    api.create_repo("me/secret", private=True)
    api.upload_folder(repo_id="me/secret", folder_path=opening.DIGITS)
    with pytest.raises(OSError, match="there is no me/secret for you"):
        opening.open_hub("me/secret")
    monkeypatch.chdir(opening.HERE.parent)
    for name in (
        "space/digits",
        "/etc/passwd",
        "../space/digits",
        str(opening.DIGITS),
        "digits",
        "",
        "https://x.org/a",
        HOSTILE,
    ):
        with pytest.raises(ValueError, match="is no Hub id: write it like name/pool"):
            opening.open_hub(name)


# ---- what is shown


def test_names_are_shown_as_text() -> None:
    pool = opening.open_digits()
    teaching.teach(pool, HOSTILE[:40], list(samples("teach-9").values()), teaching.CLOSED_FORM)
    pool.name = HOSTILE
    pool.facts = pool.facts | {"title": HOSTILE, "head": HOSTILE, "readout": HOSTILE}
    pool.facts["base_model"] = {**pool.facts["base_model"], "class": HOSTILE, "name": HOSTILE}
    pool.facts["tasks"].append([{"id": 8, "name": HOSTILE}])
    assert pool.record is not None
    pool.record.data = HOSTILE
    pool.record.results = {HOSTILE: next(iter(pool.record.results.values()))}
    pool.notes = [HOSTILE]
    image = samples("digits")["digit-9.png"]
    shown = [
        showing.facts(pool),
        showing.record(pool),
        showing.answers(pool, [(HOSTILE, image, answering.answer(pool, image))]),
        showing.waiting({HOSTILE: image}),
        showing.message(f"a\n{HOSTILE}\x1b[31m", "bad"),
    ]
    for part in shown:
        assert "&lt;img src=x" in part
        assert "<img src=x" not in part
        assert '"alert(' not in part
        assert "\x1b" not in part


def test_a_record_picture_of_a_stranger() -> None:
    pool = tiny(DualPromptConfig(g_layers=[0], e_layers=[1]))
    make: dict[str, Callable[[], bytes]] = {
        "cannot be read": lambda: b"<script>alert(1)</script>",
        "data:image/png;base64": lambda: png((20, 10)),
        "histogram cannot": lambda: png((2100, 2000)),
    }
    for told, content in make.items():
        pool.picture = content()
        assert told in showing.record(pool)


# ---- the folder as a Space


def test_the_space_needs_what_the_library_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {r.name.lower().replace("_", "-"): r for r in map(Requirement, lines(ROOT / "constraints.txt"))}
    own = {r.name.lower(): r for r in map(Requirement, lines(opening.HERE / "requirements.txt"))}
    needed = [*project["dependencies"], *project["optional-dependencies"]["space"]]
    assert sorted(own) == sorted(Requirement(line).name.lower() for line in needed)
    for name, requirement in own.items():
        assert str(requirement.specifier) == str(pins[name].specifier), name
    head = yaml.safe_load((opening.HERE / "README.md").read_text().split("---")[1])
    assert f"=={head['sdk_version']}" == str(own["gradio"].specifier)
    assert (opening.HERE / head["app_file"]).is_file()


def lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith(("#", "--"))]


def test_a_space_is_whole(tmp_path: Path) -> None:
    folder = assemble(tmp_path / "space")
    for name in (
        "app.py",
        "README.md",
        "requirements.txt",
        f"digits/{WEIGHTS}",
        "cl_prompts/__init__.py",
        "cl_prompts/runs/recipes/digits.yaml",
    ):
        assert (folder / name).is_file(), name
    assert (
        load_file(folder / "cl_prompts/runs/micro_vit/model.safetensors").keys()
        == load_file(opening.MICRO_VIT / "model.safetensors").keys()
    )
    library = ROOT / "src" / "cl_prompts"
    copied, own = ({p.relative_to(top) for p in top.rglob("*.py")} for top in (folder / "cl_prompts", library))
    assert copied == own
    assert not list(folder.rglob("__pycache__"))
    assert not (folder / "push.py").exists()
