"""What decides a kept query is all in its key, nothing else is, and what cannot be told has none."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, concatenate_datasets
from peft import LoraConfig, get_peft_model
from support.families import SIZES, build
from support.methods import METHODS
from support.query_images import (
    LABELS,
    TASKS,
    Scaled,
    Unsaid,
    picture_model,
    picture_stream,
    train_images,
)
from support.stream_data import birds, pictures, row_values, to_tensor
from torch import Tensor
from transformers import AutoImageProcessor, ViTConfig, ViTModel

from cl_prompts.baselines import get_baseline
from cl_prompts.continual import (
    ClassIncrementalStream,
    DomainIncrementalStream,
    GaussianStream,
    JointStream,
    Stream,
)
from cl_prompts.continual.feature_cache.key import agreed_key, query_digest
from cl_prompts.interfaces import NotCacheableError
from cl_prompts.runs import MICRO_VIT
from cl_prompts.runs.images import ToTensor


pytestmark = pytest.mark.by_turns(3)


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
    "the pass of a baseline": lambda: get_baseline("frozen", build("vit")),
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
            patch.setattr("cl_prompts.continual.feature_cache.key." + name, value)
            found.append(key_of())
    with monkeypatch.context() as patch:
        patch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
        found.append(key_of())
    found.append(key_of(together=32))
    assert len(set(found)) == len(found)
    assert key_of() == key, "all is as it was"


@pytest.mark.slow
def test_the_key_knows_nothing_of_tasks_methods_and_labels(key: str, tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    same: dict[str, Stream] = {
        "another order of tasks": picture_stream(tasks=[[3], [2, 0], [1]]),
        "other class names": ClassIncrementalStream(
            birds(LABELS, names=names), birds([0, 1, 2, 3] * 2, 1, names=names), TASKS, Scaled()
        ),
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
        return AutoImageProcessor.from_pretrained(MICRO_VIT, **other)

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
    with pytest.raises(NotCacheableError, match=r"the file of an image cannot be read .*11\.png"):
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
    "a function": (picture_model, lambda: picture_stream(transform=to_tensor), r"transform to_tensor has no settings\(\)"),
    "no JSON": (picture_model, lambda: picture_stream(transform=Unsaid()), "cannot be written as JSON .*Tensor"),
    "no source": (picture_model, lambda: picture_stream(transform=made_elsewhere()), "source .* Elsewhere"),
    "numbers of images": (
        picture_model,
        lambda: ClassIncrementalStream(row_values([0, 1]), row_values([0, 1]), [[0, 1]], Scaled()),
        "of type int",
    ),
    "paths": (picture_model, lambda: picture_stream(Rows(["owl.png"] * len(LABELS))), "of type str"),
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
    with pytest.raises(NotCacheableError, match=why):
        key_of(model(), stream())
