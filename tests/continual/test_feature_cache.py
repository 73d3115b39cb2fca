"""Queries kept over runs: found when nothing changed, never when something did, and no run is the worse for any of it."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from safetensors.torch import save_file
from support.families import build
from support.methods import METHODS, WITH_CLASSIFIER
from support.query_images import (
    LABELS,
    Unsaid,
    counted_passes,
    picture_stream,
    provider_of,
)
from support.small_runs import Stop, StopAt, tensors
from support.stream_data import birds

from cl_prompts import get_prompt_pool_model
from cl_prompts.baselines import get_baseline
from cl_prompts.continual import (
    ContinualArguments,
    ContinualTrainer,
    CropAndFlip,
    TrainerCallback,
)
from cl_prompts.continual.feature_cache.cache import VARIABLE, QueryCache, folder_of_queries
from cl_prompts.storage.staging import ALIVE, PREFIX, STAGING


pytestmark = pytest.mark.by_turns(3, always=())


# ---- what is kept, and what is not -------------------------------------------------------------------------------------


def test_what_has_no_key_is_kept_in_memory_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    provider = provider_of(tmp_path, stream=picture_stream(transform=Unsaid()))
    with counted_passes() as passes:
        assert provider.frozen_features(train=True) is provider.frozen_features(train=True)
    assert passes == [26]
    assert not list(tmp_path.iterdir())
    told = capsys.readouterr().out
    assert told.startswith("query cache: 26 training images computed once, in memory only: settings of the transform")
    assert told.count("\n") == 1


def test_a_pass_with_images_that_cannot_be_read_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be read today may be readable tomorrow."""
    stream = picture_stream(birds(LABELS, bad=(3,)), on_bad_image="skip")
    table = provider_of(tmp_path, stream=stream).frozen_features(train=True)
    assert not table[3].any()
    assert not list(tmp_path.iterdir())
    assert "in memory only: some cannot be read" in capsys.readouterr().out


def test_a_base_that_learns_is_looked_at_anew(tmp_path: Path) -> None:
    provider = provider_of(tmp_path, get_baseline("finetune", build("vit")))
    before = provider.frozen_features(train=False)
    with torch.no_grad():
        provider.model.get_base_model().layernorm.bias += 1
    assert (provider.frozen_features(train=False) - before).abs().max() > 0.5
    assert provider.queries(train=False) is None
    assert not list(tmp_path.iterdir())


# ---- files ---------------------------------------------------------------------------------------------------------------

KEY, OTHER_KEY = "a" * 64, "b" * 64
TABLE = torch.arange(3000.0).view(100, 30)


def cache_in(folder: Path, max_bytes: int = 2**30) -> tuple[QueryCache, list[str]]:
    told: list[str] = []
    return QueryCache(folder, max_bytes, told.append), told


def test_a_table_is_read_from_its_file(tmp_path: Path) -> None:
    cache, told = cache_in(tmp_path / "not" / "there")
    assert cache.read(KEY) is None
    assert cache.write(KEY, TABLE)
    found = cache.read(KEY)
    assert found is not None
    assert torch.equal(found, TABLE)
    assert cache.path(KEY).name not in Path("/proc/self/maps").read_text()
    cache.write(KEY, TABLE + 1)
    assert torch.equal(found, TABLE), "a reader keeps what it has read"
    with cache.path(KEY).open("r+b") as file:  # a mapped table would change here,
        file.seek(-50, os.SEEK_END)
        file.write(b"\xff" * 50)
        assert torch.equal(found, TABLE)
        file.truncate(8)  # and here a look at it would end the process
    assert torch.equal(found, TABLE)
    cache.folder.chmod(0o750)
    cache.write(KEY, TABLE)
    assert cache.path(KEY).stat().st_mode & 0o777 == 0o640, "who may read the folder may read it"
    assert [file.name for file in cache.folder.iterdir()] == [cache.path(KEY).name]
    assert not told


def flipped(content: bytes) -> bytes:
    return content[:-50] + bytes([content[-50] ^ 1]) + content[-49:]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-4]),
    "cut in its header": lambda file: file.write_bytes(file.read_bytes()[:20]),
    "empty": lambda file: file.write_bytes(b""),
    "a flipped bit": lambda file: file.write_bytes(flipped(file.read_bytes())),
    "no safetensors": lambda file: file.write_bytes(b"\xff" * 500),
    "without a note": lambda file: save_file({"features": TABLE}, file),
    "of other images": lambda file: file.write_bytes(file.with_name(f"{OTHER_KEY}.safetensors").read_bytes()),
    "another tensor": lambda file: save_file({"weights": TABLE}, file, metadata={"key": KEY}),
    "another type": lambda file: save_file({"features": TABLE.half()}, file, metadata={"key": KEY}),
    "sizes below zero": lambda file: file.write_bytes(file.read_bytes().replace(b"[100,30]", b"[-99,-9]")),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_computed_again(damage: str, tmp_path: Path) -> None:
    cache, told = cache_in(tmp_path)
    for key in (KEY, OTHER_KEY):
        cache.write(key, TABLE)
    DAMAGES[damage](cache.path(KEY))
    assert cache.read(KEY) is None
    assert len(told) == 1
    assert told[0].startswith(f"query cache: {cache.path(KEY)} cannot be used (")
    assert "\n" not in told[0]
    if damage != "a folder":
        assert cache.write(KEY, TABLE)
        assert torch.equal(cache.read(KEY), TABLE)  # type: ignore[arg-type]
    else:
        assert not cache.write(KEY, TABLE)
        assert "nothing could be kept" in told[1]


def test_the_folder_is_bounded_and_the_oldest_use_goes_first(tmp_path: Path) -> None:
    cache, told = cache_in(tmp_path, 3 * (TABLE.nbytes + 1000))
    foreign = [tmp_path / "model.safetensors", tmp_path / f"{KEY}.json", tmp_path / ".hidden"]
    for file in foreign:
        file.write_bytes(bytes(50_000))
        os.utime(file, (1, 1))
    left = tmp_path / f"{PREFIX}0{STAGING}"  # of a writer that was killed
    left.mkdir()
    (left / f"{KEY}.safetensors").write_bytes(bytes(5000))
    (tmp_path / f"{PREFIX}0{ALIVE}").touch()
    keys = [str(number) * 64 for number in range(5)]
    for age, key in enumerate(keys[:3]):
        cache.write(key, TABLE)
        os.utime(cache.path(key), (10 + age, 10 + age))
    assert not left.exists()
    assert cache.read(keys[0]) is not None  # its use is now the newest
    cache.write(keys[3], TABLE)
    assert [cache.path(key).exists() for key in keys[:4]] == [True, False, True, True]
    cache.write(keys[4], TABLE)
    assert [cache.path(key).exists() for key in keys] == [True, False, False, True, True]
    assert all(file.exists() for file in foreign), "what others have put there stays"
    assert not told
    assert not cache.write(KEY, TABLE.repeat(4, 1))
    assert told == ["query cache: 48,000 bytes are not kept, query_cache_bytes is 39,000"]
    assert cache.path(keys[4]).exists(), "nothing goes for what cannot be kept"


def test_a_folder_that_cannot_be_written_costs_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    cache, told = cache_in(tmp_path / "file" / "folder")
    assert cache.read(KEY) is None
    assert not cache.write(KEY, TABLE)
    assert "nothing could be kept" in told[-1]
    with pytest.raises(ValueError, match="is a file: name a folder"):
        cache_in(tmp_path / "file")


def test_writers_and_readers_at_once(tmp_path: Path) -> None:
    """Last one wins, all are right, none sees half a file; room is made under their feet."""
    cache, told = cache_in(tmp_path, 2 * (TABLE.nbytes + 1000))
    keys = [KEY, OTHER_KEY, "c" * 64]
    wrong: list[Any] = []

    def work(number: int) -> None:
        for step in range(30):
            key = keys[(number + step) % 3]
            found = cache.read(key)
            if found is not None and not torch.equal(found, TABLE + keys.index(key)):
                wrong.append(key)
            cache.write(key, TABLE + keys.index(key))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all("nothing could be kept" in line for line in told), told
    assert not list(tmp_path.glob(".*"))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= cache.max_bytes


def test_where_queries_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert folder_of_queries(None) is None
    monkeypatch.setenv(VARIABLE, "/cache")
    assert folder_of_queries(None) == Path("/cache/queries")
    assert folder_of_queries("here") == Path("here")
    assert folder_of_queries("") is None


# ---- runs ----------------------------------------------------------------------------------------------------------------


def picture_trainer(
    method: str, cache: Path | str, output: Path | None = None, callbacks: Sequence[TrainerCallback] = (), **settings: Any
) -> ContinualTrainer:
    """Two tasks, one epoch of four or three steps each."""
    AcceleratorState._reset_state(reset_partial_state=True)
    base = build("vit")
    set_seed(3)
    if method in ("frozen", "finetune"):
        model: Any = get_baseline(method, base)
    else:
        model = get_prompt_pool_model(base, {**METHODS, **WITH_CLASSIFIER}[method]())
    stream = picture_stream(**settings.pop("stream", {}))
    told: dict[str, Any] = {"num_train_epochs": 1, "batch_size": 4, "save_steps": 1} | settings
    args = ContinualArguments(str(output) if output else None, query_cache=str(cache), **told)
    return ContinualTrainer(model, stream, args, callbacks=callbacks)


def run(method: str, cache: Path | str, **settings: Any) -> tuple[ContinualTrainer, list[int]]:
    trainer = picture_trainer(method, cache, **settings)
    with counted_passes() as passes:
        trainer.train()
    return trainer, passes


def assert_same(one: ContinualTrainer, other: ContinualTrainer, why: str) -> None:
    assert one.matrix == other.matrix, why
    mine, theirs = tensors(one), tensors(other)
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == [], why


STEPS = 7
TESTS = 3  # passes over test images: task 0, then 0 and 1
CALIBRATION = 7  # batches of both tasks' images after their training, for the temperature of the scores


@pytest.mark.parametrize("method", ["l2p", "l2p analytic", "frozen"])
def test_a_run_is_the_same_with_and_without_kept_queries(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without, computed = run(method, "")
    assert capsys.readouterr().out.count("computed once, in memory\n") == 2
    cold, again = run(method, tmp_path)
    assert capsys.readouterr().out.count(f"computed once, kept in {tmp_path}") == 2
    warm, read = run(method, tmp_path)
    assert capsys.readouterr().out.count(f"images read from {tmp_path}") == 2
    assert_same(without, cold, "cold")
    assert_same(without, warm, "warm")
    assert computed == again
    assert sorted(computed) == sorted([*read, 26, 8]), "one pass over the training and one over the test images"
    if method == "frozen":
        assert read == []
    if method == "l2p":
        assert len(read) == STEPS + TESTS + CALIBRATION, "no query pass at all"


@pytest.mark.slow
def test_another_method_order_and_batch_find_the_same(tmp_path: Path) -> None:
    run("l2p", tmp_path, mixed_precision="bf16")
    other: dict[str, Any] = {"mixed_precision": "bf16", "batch_size": 7, "stream": {"tasks": [[3, 0], [1, 2]]}}
    without, computed = run("coda", "", **other)
    warm, read = run("coda", tmp_path, **other)
    assert_same(without, warm, "warm")
    assert sorted(computed) == sorted([*read, 26, 8])
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_a_resumed_run_is_the_same_whatever_became_of_the_files(tmp_path: Path) -> None:
    whole, _ = run("l2p", "")
    cache = tmp_path / "cache"
    for number, step in enumerate((2, 5)):
        with pytest.raises(Stop):
            picture_trainer("l2p", cache, tmp_path / "run", [StopAt(step)]).train(resume=number > 0)
        for file in cache.iterdir():
            file.write_bytes(file.read_bytes()[:-1])
    resumed = picture_trainer("l2p", "", tmp_path / "run")  # nor does it matter where they are
    resumed.train(resume=True)
    assert_same(whole, resumed, "resumed")


@pytest.mark.slow
def test_it_is_left_alone_where_it_is_not_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("vpt", tmp_path)  # asks for no query
    run("l2p", tmp_path, cache_queries=False)
    run("finetune", tmp_path)
    assert not list(tmp_path.iterdir())
    assert "query cache" not in capsys.readouterr().out
    run("l2p", tmp_path, stream={"augmentation": CropAndFlip()})
    assert len(list(tmp_path.iterdir())) == 2, "test images, and training images as they are for the calibration"


@pytest.mark.slow
@pytest.mark.parametrize("on_device", [False, True])
def test_queries_of_views_are_kept(on_device: bool, tmp_path: Path) -> None:
    """Each view is computed once, whatever the number of epochs; the queries are those of the images as they are shown."""
    views: dict[str, Any] = {"stream": {"augmentation": CropAndFlip(views=2, on_device=on_device)}, "num_train_epochs": 3}
    plain, computed = run("l2p", "", cache_queries=False, **views)
    cold, again = run("l2p", tmp_path, **views)
    warm, read = run("l2p", tmp_path, **views)
    assert_same(cold, warm, "warm")
    assert len(read) == 3 * STEPS + TESTS + CALIBRATION, "no query pass at all"
    assert sorted(again) == sorted([*read, 26, 26, 26, 8]), "one pass over each view, and one over the images as they are"
    assert len(computed) == 2 * (3 * STEPS + TESTS + CALIBRATION)
    mine, theirs = tensors(plain), tensors(cold)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5, msg=name)
    for changed in ({"seed": 1}, {"stream": {"augmentation": CropAndFlip(views=2, on_device=not on_device)}}):
        known = len(list(tmp_path.iterdir()))
        run("l2p", tmp_path, **views | changed)
        assert len(list(tmp_path.iterdir())) == known + 2, "other views"


@pytest.mark.slow
def test_a_run_that_augments_on_the_device_is_resumed(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "stream": {"augmentation": CropAndFlip(on_device=True)},
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 2,
    }
    whole, _ = run("l2p", "", **settings)
    with pytest.raises(Stop):
        picture_trainer("l2p", "", tmp_path / "run", [StopAt(5)], **settings).train()
    resumed = picture_trainer("l2p", "", tmp_path / "run", **settings)
    resumed.train(resume=True)
    assert_same(whole, resumed, "resumed")
    other, _ = run("l2p", "", num_train_epochs=2, gradient_accumulation_steps=2)
    assert other.evaluations != whole.evaluations or any(
        not torch.equal(a, b) for a, b in zip(tensors(other).values(), tensors(whole).values(), strict=True)
    ), "it augments"
