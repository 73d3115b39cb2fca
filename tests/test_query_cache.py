"""Queries kept over runs: found when nothing changed, never when something did, and no run is the worse for any of it."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from datasets import Dataset, Image, concatenate_datasets
from families import SIZES, build
from images import ToTensor
from methods import METHODS, WITH_CLASSIFIER
from peft import LoraConfig, get_peft_model
from query_images import (
    LABELS,
    TASKS,
    Scaled,
    counted_passes,
    picture_model,
    picture_stream,
    train_images,
    viewer_of,
)
from safetensors.torch import save_file
from small_runs import Stop, StopAt, tensors
from stream_data import birds, pictures, row_values, to_tensor
from torch import Tensor
from transformers import AutoImageProcessor, ViTConfig, ViTModel

from cl_prompts import get_prompt_pool_model
from cl_prompts.continual import (
    ClassIncrementalStream,
    ContinualArguments,
    ContinualTrainer,
    CropAndFlip,
    DomainIncrementalStream,
    GaussianStream,
    Stream,
    TrainerCallback,
    query_key,
)
from cl_prompts.continual.baselines import JointStream, get_comparison_learner
from cl_prompts.continual.query_cache import VARIABLE, QueryCache, folder_of_queries
from cl_prompts.continual.query_key import NotTold, agreed_key, query_digest


CPU = torch.device("cpu")


def key_of(model: Any = None, stream: Any = None, *, train: bool = True, together: int = 64) -> str:
    stream = stream or picture_stream()
    rows = stream.all_rows(train=train)
    model = model or picture_model()
    key = agreed_key(query_digest(model, stream, rows, train=train, together=together, device=CPU), CPU)
    assert key is not None
    return key


@pytest.fixture(scope="module")
def key() -> str:
    return key_of()


# ---- the key: what it knows ----------------------------------------------------------------------------------------------


def changed_image() -> Any:
    rows = train_images()
    other = birds(LABELS, 5).select([7])
    return concatenate_datasets([rows.select(range(7)), other, rows.select(range(8, len(rows)))])


def same_weights(**config: Any) -> Any:
    """The base with another setting that its weights do not show."""
    base = ViTModel(ViTConfig(**{**SIZES, **config}))
    base.load_state_dict(build("vit").state_dict())
    base.set_attn_implementation("sdpa")
    return base.eval()


def swapped_module() -> Any:
    base = build("vit")
    name = next(name for name, module in base.named_modules() if "GELU" in type(module).__name__)
    base.set_submodule(name, torch.nn.ReLU())
    return base


class AlsoScaled(Scaled):
    def __call__(self, image: Any) -> Tensor:
        return super().__call__(image).flip(-1)


OTHER_DATA: dict[str, Callable[[], Stream]] = {
    "another image in a row": lambda: picture_stream(changed_image()),
    "rows in another order": lambda: picture_stream(train_images().select([4, 1, 2, 3, 0, *range(5, len(LABELS))])),
    "another subset": lambda: picture_stream(tasks=TASKS[:1]),
    "more rows than the tasks have": lambda: picture_stream(concatenate_datasets([train_images(), birds([3], 9)])),
    "another mode of decoding": lambda: picture_stream(train_images().cast_column("image", Image(mode="L"))),
    "decoded by a transform": lambda: picture_stream(
        train_images().with_transform(lambda rows: {**rows, "image": [image.rotate(180) for image in rows["image"]]})
    ),
    "another resize": lambda: picture_stream(transform=Scaled(24)),
    "another mean": lambda: picture_stream(transform=Scaled(mean=0.4)),
    "another class of transform": lambda: picture_stream(transform=AlsoScaled()),
    "another rule for bad images": lambda: picture_stream(on_bad_image="skip"),
}


@pytest.mark.parametrize("change", OTHER_DATA)
def test_other_images_are_not_found(change: str, key: str) -> None:
    assert key_of(stream=OTHER_DATA[change]()) != key


class Rows:
    """Images as a list: no data set of the library."""

    column_names = ("image", "label")

    def __init__(self, images: Sequence[Any], labels: Sequence[int] = LABELS) -> None:
        self.images, self.labels = list(images), list(labels)

    def __getitem__(self, what: Any) -> Any:
        return self.labels if what == "label" else {"image": self.images[what], "label": self.labels[what]}


def test_the_same_image_in_another_row_is_not_found() -> None:
    rows = Rows([pictures(1)[0], *pictures(3)], [0, 1, 2, 3])
    assert key_of(stream=picture_stream(rows, tasks=[[0]])) != key_of(stream=picture_stream(rows, tasks=[[1]]))


OTHER_MODEL: dict[str, Callable[[], Any]] = {
    "other weights": lambda: picture_model(base=build("vit", seed=1)),
    "the same weights in another precision": lambda: picture_model(base=build("vit").to(torch.bfloat16)),
    "another number of heads": lambda: picture_model(base=same_weights(num_attention_heads=2)),
    "another epsilon": lambda: picture_model(base=same_weights(layer_norm_eps=1e-3)),
    "another activation": lambda: picture_model(base=same_weights(hidden_act="relu")),
    "a module in place of another": lambda: picture_model(base=swapped_module()),
    "another attention": lambda: picture_model(base=build("vit", attention="eager")),
    "another pooling": lambda: picture_model(query_pooling="mean"),
    "another family": lambda: picture_model(base=build("deit")),
    "the pass of a comparison learner": lambda: get_comparison_learner("frozen", build("vit")),
}


@pytest.mark.parametrize("change", OTHER_MODEL)
def test_another_base_is_not_found(change: str, key: str) -> None:
    assert key_of(OTHER_MODEL[change]()) != key


def test_another_precision_machine_or_version_is_not_found(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [key]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found.append(key_of())
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    found.append(key_of())
    torch.set_num_threads(threads)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16")
        found.append(key_of())
    for name, value in (
        ("version", lambda library: "9.9" if library == "transformers" else "1"),
        ("processor", lambda: "another"),
        ("_own_code", lambda: "another"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(query_key, name, value)
            found.append(key_of())
    with monkeypatch.context() as patch:
        patch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
        found.append(key_of())
    found.append(key_of(together=32))
    assert len(set(found)) == len(found)
    assert key_of() == key, "all is as it was"


def test_the_key_knows_nothing_of_tasks_methods_and_labels(key: str, tmp_path: Path) -> None:
    same: dict[str, Stream] = {
        "another order of tasks": picture_stream(tasks=[[3], [2, 0], [1]]),
        "other class names": picture_stream(birds(LABELS, names=["a", "b", "c", "d"])),
        "all at once": JointStream(picture_stream()),
        "no tasks": GaussianStream(train_images(), birds([0, 1, 2, 3], 1), Scaled()),
        "domains": DomainIncrementalStream(
            birds(LABELS, domains=[i // 9 for i in range(len(LABELS))]),
            birds([0, 1, 2, 3] * 3, 1, domains=[i // 4 for i in range(12)]),
            Scaled(),
        ),
    }
    for name, stream in same.items():
        assert key_of(stream=stream) == key, name
    for method in METHODS:
        assert key_of(picture_model(method)) == key, method
    files = tmp_path / "images.parquet"
    train_images().to_parquet(str(files))
    assert key_of(stream=picture_stream(Dataset.from_parquet(str(files), cache_dir=str(tmp_path)))) == key


def test_every_method_has_the_same_queries() -> None:
    """What makes it right to share them: bit for bit."""
    images = torch.stack([Scaled()(image) for image in pictures(5)])
    expected = picture_model().base_model.extract_features(images)
    for method in METHODS:
        model = picture_model(method)
        assert torch.equal(model.base_model.extract_features(images), expected), method


def test_the_example_says_what_its_transform_does(key: str) -> None:
    def processor(**other: Any) -> Any:
        return AutoImageProcessor.from_pretrained(Path(__file__).parent.parent / "examples" / "micro_vit", **other)

    transforms = [
        ToTensor(processor()),
        ToTensor(processor(), "unit"),
        ToTensor(processor(), resample="bicubic"),
        ToTensor(processor(size={"height": 24, "width": 24})),
        ToTensor(processor(image_mean=[0.4, 0.5, 0.5])),
    ]
    found = [key_of(stream=picture_stream(transform=transform)) for transform in transforms]
    assert len(set(found)) == len(found)
    assert key_of(stream=picture_stream(transform=ToTensor(processor()))) == found[0]


def test_images_that_lie_in_files(tmp_path: Path, key: str) -> None:
    """The data set holds paths, whose files may change while it does not."""
    for number, image in enumerate(pictures(len(LABELS))):
        image.save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(len(LABELS))]
    rows = Dataset.from_dict({"image": paths, "label": LABELS}).cast_column("image", Image())
    before = key_of(stream=picture_stream(rows))
    assert before == key, "the same bytes"
    pictures(1, 77)[0].save(tmp_path / "11.png")
    changed = key_of(stream=picture_stream(rows))
    assert changed != before
    (tmp_path / "11.png").unlink()
    with pytest.raises(NotTold, match=r"the file of an image cannot be read .*11\.png"):
        key_of(stream=picture_stream(rows))


def test_images_that_are_no_files() -> None:
    images = pictures(len(LABELS))
    arrays = [np.asarray(image) for image in images]
    kinds: list[Callable[[], list[Any]]] = [
        lambda: list(images),
        lambda: list(arrays),
        lambda: [array.astype(np.int16) for array in arrays],
        lambda: [array.reshape(9, 6, 3) for array in arrays],
        lambda: [torch.from_numpy(array.copy()) for array in arrays],
        lambda: [torch.from_numpy(array.copy()).view(torch.int8) for array in arrays],
        lambda: [torch.from_numpy(array.copy()).reshape(9, 6, 3) for array in arrays],
    ]
    for kind in kinds:
        found = []
        for changes in (False, False, True):
            cells = kind()
            if changes:  # the last pixel of an image
                cells[9] = cells[9].copy() if hasattr(cells[9], "copy") else cells[9].clone()
                if hasattr(cells[9], "putpixel"):
                    cells[9].putpixel((8, 5), (1, 2, 3))
                else:
                    cells[9][-1, -1, -1] += 1
            found.append(key_of(stream=picture_stream(Rows(cells))))
        assert found[0] == found[1] != found[2]
    assert len({key_of(stream=picture_stream(Rows(kind()))) for kind in kinds}) == len(kinds)


# ---- what has no key -----------------------------------------------------------------------------------------------------


class Unsaid(Scaled):
    def settings(self) -> Any:
        return {"mean": torch.zeros(3)}


def made_elsewhere() -> Any:
    space: dict[str, Any] = {"Scaled": Scaled}
    exec("class Elsewhere(Scaled): pass", space)
    return space["Elsewhere"]()


def with_hook() -> Any:
    model = picture_model()
    model.get_base_model().layers[0].register_forward_hook(lambda module, args, output: None)
    return model


def compiled(how: str) -> Any:
    model = picture_model()
    if how == "backbone":
        model.base_model.compile_backbone(backend="eager")
    else:
        model.get_base_model().layers[1].compile(backend="eager")
    return model


UNTOLD: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "a function": (picture_model, lambda: picture_stream(transform=to_tensor), "transform to_tensor does not say"),
    "no JSON": (picture_model, lambda: picture_stream(transform=Unsaid()), "cannot be written as JSON .*Tensor"),
    "no source": (picture_model, lambda: picture_stream(transform=made_elsewhere()), "source .* Elsewhere"),
    "numbers of images": (
        picture_model,
        lambda: ClassIncrementalStream(row_values([0, 1]), row_values([0, 1]), [[0, 1]], Scaled()),
        "given as int",
    ),
    "paths": (picture_model, lambda: picture_stream(Rows(["owl.png"] * len(LABELS))), "given as str"),
    "LoRA inside": (
        lambda: picture_model(base=get_peft_model(build("vit"), LoraConfig(target_modules=["q_proj"])).base_model.model),
        picture_stream,
        "q_proj, a Linear, is neither of torch nor of transformers",
    ),
    "a copy of the norm": (lambda: picture_model(modules_to_save=["layernorm"]), picture_stream, "a ModulesToSaveWrapper"),
    "a compiled base": (lambda: compiled("backbone"), picture_stream, "the base, a ViTModel, is compiled"),
    "a compiled block": (lambda: compiled("block"), picture_stream, r"layers\.1, .* is compiled"),
    "a hook of others": (with_hook, picture_stream, r"layers\.0, .* has a forward hook of others"),
}


@pytest.mark.parametrize("case", UNTOLD)
def test_what_is_not_told_has_no_key(case: str) -> None:
    model, stream, why = UNTOLD[case]
    with pytest.raises(NotTold, match=why):
        key_of(model(), stream())


def test_what_has_no_key_is_kept_in_memory_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    viewer = viewer_of(tmp_path, stream=picture_stream(transform=Unsaid()))
    with counted_passes() as passes:
        assert viewer.frozen_features(train=True) is viewer.frozen_features(train=True)
    assert passes == [26]
    assert not list(tmp_path.iterdir())
    told = capsys.readouterr().out
    assert told.startswith("query cache: 26 training images computed once, in memory only: settings of the transform")
    assert told.count("\n") == 1


def test_a_pass_with_images_that_cannot_be_read_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be read today may be readable tomorrow."""
    stream = picture_stream(birds(LABELS, bad=(3,)), on_bad_image="skip")
    table = viewer_of(tmp_path, stream=stream).frozen_features(train=True)
    assert not table[3].any()
    assert not list(tmp_path.iterdir())
    assert "in memory only: some cannot be read" in capsys.readouterr().out


def test_a_base_that_learns_is_looked_at_anew(tmp_path: Path) -> None:
    viewer = viewer_of(tmp_path, get_comparison_learner("finetune", build("vit")))
    before = viewer.frozen_features(train=False)
    with torch.no_grad():
        viewer.model.get_base_model().layernorm.bias += 1
    assert (viewer.frozen_features(train=False) - before).abs().max() > 0.5
    assert viewer.queries(train=False) is None
    assert not list(tmp_path.iterdir())


# ---- files ---------------------------------------------------------------------------------------------------------------

KEY, OTHER_KEY = "a" * 64, "b" * 64
TABLE = torch.arange(3000.0).view(100, 30)


def cache_in(folder: Path, max_bytes: int = 2**30) -> tuple[QueryCache, list[str]]:
    told: list[str] = []
    return QueryCache(folder, max_bytes, told.append), told


def test_a_table_is_mapped_from_its_file(tmp_path: Path) -> None:
    cache, told = cache_in(tmp_path / "not" / "there")
    assert cache.read(KEY) is None
    assert cache.write(KEY, TABLE)
    found = cache.read(KEY)
    assert found is not None
    assert torch.equal(found, TABLE)
    assert cache.path(KEY).name in Path("/proc/self/maps").read_text()
    cache.write(KEY, TABLE + 1)
    assert torch.equal(found, TABLE), "a reader keeps what it has mapped"
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
    left = tmp_path / f".{KEY}.{'0' * 32}.writing"  # of a writer that was killed
    left.write_bytes(bytes(5000))
    os.utime(left, (2, 2))
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
        model: Any = get_comparison_learner(method, base)
    else:
        model = get_prompt_pool_model(base, {**METHODS, **WITH_CLASSIFIER}[method]())
    stream = picture_stream(**settings.pop("stream", {}))
    told: dict[str, Any] = {"epochs": 1, "batch_size": 4, "checkpoint_every": 1} | settings
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
        assert len(read) == STEPS + TESTS, "no query pass at all"


def test_another_method_order_and_batch_find_the_same(tmp_path: Path) -> None:
    run("l2p", tmp_path, mixed_precision="bf16")
    other: dict[str, Any] = {"mixed_precision": "bf16", "batch_size": 7, "stream": {"tasks": [[3, 0], [1, 2]]}}
    without, computed = run("coda", "", **other)
    warm, read = run("coda", tmp_path, **other)
    assert_same(without, warm, "warm")
    assert sorted(computed) == sorted([*read, 26, 8])
    assert len(list(tmp_path.iterdir())) == 2


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


def test_it_is_left_alone_where_it_is_not_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("vpt", tmp_path)  # asks for no query
    run("l2p", tmp_path, cache_queries=False)
    run("finetune", tmp_path)
    assert not list(tmp_path.iterdir())
    assert "query cache" not in capsys.readouterr().out
    run("l2p", tmp_path, stream={"augmentation": CropAndFlip()})
    assert len(list(tmp_path.iterdir())) == 1, "test images only"
