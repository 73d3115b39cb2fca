"""Images in, labels and scores out."""

import json
import math
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from peft import PeftModel
from PIL import Image
from support.adapters import learn
from support.families import build
from support.hub_server import Hub
from support.methods import METHODS
from support.photos import array, picture
from transformers import ViTImageProcessor, ViTModel

from cl_prompts import PromptPoolPipeline, get_prompt_pool_model
from cl_prompts.sharing.image_processor import load_processor
from cl_prompts.storage.file_source import FileSource
from cl_prompts.storage.hub_errors import HubError


NAMES = {7: "owl", 1: "jay"}
REMOTE = {"AutoImageProcessor": "mine.MineImageProcessor"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model's folder, and that of an adapter of two tasks on it."""
    base, adapter = (tmp_path_factory.mktemp(name) for name in ("base", "adapter"))
    build("vit").save_pretrained(base)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(base)
    model = get_prompt_pool_model(ViTModel.from_pretrained(base), METHODS["hash"]())
    learn(model, [7, 3])
    learn(model, [1, 5], seed=1)
    model.adapter.config.state.class_names = {str(c): name for c, name in NAMES.items()}
    model.save_pretrained(adapter)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.2] * 3).save_pretrained(adapter)
    return base, adapter


@pytest.fixture(scope="module")
def pipe(folders: tuple[Path, Path]) -> PromptPoolPipeline:
    return PromptPoolPipeline.from_pretrained(folders[1], batch_size=3)


def test_labels_and_scores(pipe: PromptPoolPipeline, tmp_path: Path) -> None:
    """The same numbers as the model's own, by the adapter's class names, best first."""
    picture().save(tmp_path / "picture.png")
    answer = pipe(tmp_path / "picture.png", top_k=3)
    pixels = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.2] * 3)(picture(), return_tensors="pt")
    with torch.no_grad():
        scores = pipe.model.eval()(**pixels).logits.softmax(-1)[0].tolist()
    expected = dict(zip(["owl", "3", "jay", "5"], scores, strict=True))  # in the order of model.classes: 7, 3, 1, 5
    assert [a["score"] for a in answer] == pytest.approx(sorted(scores, reverse=True)[:3], abs=1e-6)
    assert {a["label"]: a["score"] for a in answer} == pytest.approx({a["label"]: expected[a["label"]] for a in answer})
    everything = pipe(picture(), top_k=None)
    assert len(everything) == len(pipe(picture())) == 4
    assert sum(a["score"] for a in everything) == pytest.approx(1)
    assert set(everything[0]) == {"label", "score"}


def test_an_answer_does_not_depend_on_the_batch(pipe: PromptPoolPipeline) -> None:
    images = [picture(seed, size) for seed, size in enumerate([(40, 56), (32, 32), (99, 20), (8, 8), (64, 48)])]
    together = pipe(images, top_k=None)
    for image, answer in zip(images, together, strict=True):
        alone = pipe(image, top_k=None)
        assert [a["label"] for a in alone] == [a["label"] for a in answer]
        assert [a["score"] for a in alone] == pytest.approx([a["score"] for a in answer], abs=1e-5)
    assert len({str(answer) for answer in together}) == 5
    assert pipe([]) == []
    assert len(pipe(tuple(images[:1]))) == 1


def test_images_of_none_of_the_classes(pipe: PromptPoolPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture(seed, (32, 32)) for seed in range(5)]
    plain = pipe(images)
    with pytest.raises(ValueError, match=r'unknown="flag" needs a threshold, and the adapter was saved without one: call'):
        pipe(images, unknown="flag")
    with pytest.raises(ValueError, match='unknown=\'drop\': choose "flag", "refuse" or None'):
        pipe(images, unknown="drop")  # type: ignore[call-overload]
    with torch.no_grad():
        batch = torch.cat([pipe.preprocess(image)["pixel_values"] for image in images])
        novelty = pipe.model.novelty(pipe.model.eval()(pixel_values=batch))
    state = pipe.model.adapter.config.state
    monkeypatch.setattr(state, "novelty_threshold", float(novelty.sort().values[2:4].mean()))
    unknown = (novelty > state.novelty_threshold).tolist()
    assert sum(unknown) == 2
    flagged, refused = pipe(images, unknown="flag"), pipe(images, unknown="refuse")
    assert [[one["unknown"] for one in answer] for answer in flagged] == [[new] * 4 for new in unknown]
    labels = [[one["label"] for one in answer] for answer in plain]
    assert [[one["label"] for one in answer] for answer in flagged] == labels
    assert [[one["label"] for one in answer] for answer in refused] == [
        [] if new else row for row, new in zip(labels, unknown, strict=True)
    ]
    assert (pipe(images[0], unknown="refuse") == []) == unknown[0]
    assert pipe(images) == plain


@pytest.mark.filterwarnings("ignore:the adapter was trained on images of 32x32 pixels, these are")
def test_shapes_that_differ_within_a_batch() -> None:
    """A base that takes any size, and a processor that keeps proportions."""
    model = get_prompt_pool_model(build("dinov2"), METHODS["vpt"]())
    learn(model, [0, 1, 2])
    pipe = PromptPoolPipeline(model, ViTImageProcessor(do_resize=False))
    images = [picture(0, (32, 32)), picture(1, (48, 32)), picture(2, (32, 32)), picture(3, (48, 32))]
    for image, answer in zip(images, pipe(images), strict=True):
        alone = pipe(image)
        assert [a["label"] for a in alone] == [a["label"] for a in answer]
        assert [a["score"] for a in alone] == pytest.approx([a["score"] for a in answer], abs=1e-5)


@pytest.mark.parametrize("method", ["dualprompt", "layer_grouped"])
def test_a_model_in_training_answers_as_at_test(
    method: str, pipe: PromptPoolPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a change of mode that another thread could see."""
    model = get_prompt_pool_model(build("vit"), METHODS[method]())
    learn(model, [7, 3])
    learn(model, [1, 5], seed=1)
    own = PromptPoolPipeline(model.eval(), pipe.image_processor)
    expected = own(picture())
    model.train()
    with monkeypatch.context() as patched:
        patched.delattr(torch.nn.Module, "train")  # `eval` calls it, too
        assert own(picture()) == expected
    assert model.training
    assert model.base_model.adapter.training


def test_a_base_in_bfloat16(folders: tuple[Path, Path], pipe: PromptPoolPipeline) -> None:
    base, adapter = folders
    halved = ViTModel.from_pretrained(base, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="trained on a base in float32, this one is in bfloat16: another precision"):
        found = PromptPoolPipeline.from_pretrained(adapter, base=halved)
    scores, expected = ({a["label"]: a["score"] for a in p(picture())} for p in (found, pipe))
    assert scores == pytest.approx(expected, abs=0.05)


def test_a_plain_peft_model_and_another_base(folders: tuple[Path, Path], pipe: PromptPoolPipeline) -> None:
    base, adapter = folders
    expected = pipe(picture())
    plain = PeftModel.from_pretrained(ViTModel.from_pretrained(base), str(adapter))
    assert PromptPoolPipeline(plain, pipe.image_processor)(picture()) == expected
    moved = base.rename(base.with_name("moved"))
    try:
        for given in (moved, str(moved), ViTModel.from_pretrained(moved)):
            assert PromptPoolPipeline.from_pretrained(adapter, base=given)(picture()) == expected
    finally:
        moved.rename(base)


def test_the_image_processor(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The adapter's own; else the base's; a given one before both."""
    _, adapter = folders
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    assert PromptPoolPipeline.from_pretrained(adapter).image_processor.image_mean == (0.2,) * 3
    assert PromptPoolPipeline.from_pretrained(tmp_path).image_processor.image_mean == (0.5,) * 3
    given = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.7] * 3)
    assert PromptPoolPipeline.from_pretrained(adapter, image_processor=given).image_processor is given
    with pytest.raises(ValueError, match=r"the adapter has no preprocessor_config\.json, and its base model no name: pass"):
        PromptPoolPipeline.from_pretrained(tmp_path, base=build("vit"))


def test_a_processor_of_another_size(pipe: PromptPoolPipeline) -> None:
    with pytest.raises(ValueError, match=r"makes images of 24x24 pixels, the adapter was trained on 32x32: pass"):
        PromptPoolPipeline(pipe.model, ViTImageProcessor(size={"height": 24, "width": 24}))
    with pytest.raises(ValueError, match=r"makes images of 64x48 pixels"):
        PromptPoolPipeline(pipe.model, ViTImageProcessor(do_resize=False))


def test_from_the_hub(hub: Hub, folders: tuple[Path, Path], pipe: PromptPoolPipeline, tmp_path: Path) -> None:
    """By id and revision, with everything of one commit; then without the network, from the cache."""
    base, adapter = folders
    api = HfApi()
    for name, folder in (("me/vit", base), ("me/pool", adapter)):
        api.create_repo(name)
        api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns="README.md")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "me/vit"}
    api.upload_file(path_or_fileobj=json.dumps(config).encode(), path_in_repo="adapter_config.json", repo_id="me/pool")
    commit = api.model_info("me/pool").sha
    expected = pipe(picture())
    for options in ({}, {"base": "me/vit"}, {"base": ViTModel.from_pretrained(base)}, {"revision": commit}):
        found = PromptPoolPipeline.from_pretrained("me/pool", **options)  # type: ignore[arg-type]
        assert found(picture()) == expected
        assert found.image_processor.image_mean == (0.2,) * 3
    api.delete_file("preprocessor_config.json", "me/pool")
    assert PromptPoolPipeline.from_pretrained("me/pool").image_processor.image_mean == (0.5,) * 3
    assert PromptPoolPipeline.from_pretrained("me/pool", revision=commit)(picture()) == expected
    with pytest.raises(HubError, match="there is no me/none for you"):
        PromptPoolPipeline.from_pretrained("me/none")
    hub.fail("GET|HEAD", 503, times=None)
    assert PromptPoolPipeline.from_pretrained("me/pool", revision=commit, local_files_only=True)(picture()) == expected


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "not JSON": (lambda good: "{", "no image processor in .*: pass image_processor="),
    "a list": (lambda good: [good], "no image processor in"),
    "no class": (lambda good: {k: v for k, v in good.items() if k != "image_processor_type"}, "no image processor in"),
    "a model": (lambda good: good | {"image_processor_type": "ViTModel"}, "'ViTModel' is no image processor"),
    "itself": (lambda good: good | {"image_processor_type": "AutoImageProcessor"}, "'AutoImageProcessor' is no image"),
    "another library": (lambda good: good | {"image_processor_type": "os.system"}, "'os.system' is no image processor"),
    "a number": (lambda good: good | {"image_processor_type": 3}, "no image processor in"),
    "remote code": (
        lambda good: {"image_processor_type": "MineImageProcessor", "auto_map": REMOTE},
        "Unrecognized image processor",
    ),
    "huge": (lambda good: good | {"size": {"height": 10**6, "width": 10**6}}, "more than 4096 pixels are refused"),
    "text for numbers": (lambda good: good | {"image_mean": "no number"}, "the image processor fails"),
    "no size": (lambda good: good | {"size": None}, "the image processor fails"),
    "too many means": (lambda good: good | {"image_mean": [0.5] * 4}, "the image processor fails"),
    "no deviation": (lambda good: good | {"image_std": [0, 0, 0]}, "the image processor"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_processor_file(
    case: str, folders: tuple[Path, Path], pipe: PromptPoolPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = HOSTILE[case]
    content = make(json.loads((folders[1] / "preprocessor_config.json").read_text()))
    (tmp_path / "preprocessor_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        PromptPoolPipeline(pipe.model, load_processor(FileSource(str(tmp_path), tmp_path)))
    assert not (tmp_path / "run").exists()


def test_code_beside_a_known_processor_is_left_alone(folders: tuple[Path, Path], tmp_path: Path) -> None:
    content = json.loads((folders[1] / "preprocessor_config.json").read_text()) | {"auto_map": REMOTE}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w').close()")
    assert type(load_processor(FileSource(str(tmp_path), tmp_path))).__module__.startswith("transformers.models.vit.")
    assert not (tmp_path / "run").exists()


def test_what_is_no_pipeline(pipe: PromptPoolPipeline) -> None:
    with pytest.raises(TypeError, match="ViTModel has no prompt pool: load one with"):
        PromptPoolPipeline(build("vit"), pipe.image_processor)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        PromptPoolPipeline(pipe.model, pipe.image_processor, batch_size=0)
    with pytest.raises(ValueError, match="top_k=0 must be at least 1"):
        pipe(picture(), top_k=0)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "missing": (lambda: "missing.png", "there is no file missing.png: check the path"),
    "folder": (lambda: Path("."), r"\. is a folder: name the images in it"),
    "text": (lambda: "text.png", r"text.png cannot be read as an image \(it is no JPEG, .* or PPM file\): convert"),
    "truncated": (lambda: "half.png", r"half.png cannot be read as an image \(.*truncated"),
    "empty": (lambda: "empty.png", "empty.png cannot be read as an image"),
    "NUL": (lambda: "\0", "there is no file"),
    "base64": (lambda: "aGVsbG8=", "there is no file aGVsbG8="),
    "32 bits": (lambda: Image.fromarray(np.full((4, 4), 70000, np.int32)), "PIL image I .*32-bit integer pixels"),
    "float pixels": (lambda: Image.fromarray(np.zeros((4, 4), np.float32)), "floating-point pixels, whose range"),
    "no pixels": (lambda: Image.new("RGB", (0, 3)), "0x3 pixels: there is nothing to see"),
    "layout": (lambda: array().transpose(2, 0, 1), r"numpy array uint8\[3, 56, 40\] cannot be .* not \[height, width\]"),
    "tensor's layout": (lambda: torch.zeros(56, 40, 3), r"tensor float32\[56, 40, 3\] cannot be .*\[channels, height"),
    "batch": (lambda: array()[None], "several images as a list"),
    "line": (lambda: np.zeros(3, np.uint8), "cannot be read as an image"),
    "no rows": (lambda: np.zeros((0, 4, 3), np.uint8), "4x0 pixels: there is nothing"),
    "0 to 255": (lambda: array().astype(np.float32), r"outside \[0, 1\]: divide by 255, or cast to uint8"),
    "normalised": (lambda: torch.full((3, 4, 4), -0.1), r"normalized pixels go to model\(pixel_values"),
    "NaN": (lambda: np.full((4, 4, 3), math.nan), r"outside \[0, 1\]"),
    "int64": (lambda: array().astype(np.int64), r"int64\[56, 40, 3\] cannot be read .*unknown range: cast it to uint8"),
    "bool": (lambda: np.zeros((4, 4), bool), "unknown range"),
}


@pytest.mark.parametrize("case", BAD)
def test_images_that_are_none(case: str, pipe: PromptPoolPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole, "PNG")
    Path("half.png").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    Path("text.png").write_text("no image")
    Path("empty.png").touch()
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        pipe(make())
    with pytest.raises(ValueError, match=f"image 1 of the list: .*{message}"):
        pipe([picture(), make()])


def test_what_is_no_image_at_all(pipe: PromptPoolPipeline) -> None:
    with pytest.raises(TypeError, match="an image is a path, a URL, a PIL image, an array or a tensor, got int"):
        pipe(3)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"image 0 of the list: .*got bytes"):
        pipe([b"bytes"])
