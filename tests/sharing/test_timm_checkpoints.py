"""Folders as timm puts them on the Hub, as bases: their config names no model type, and holds the image processor."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.families import inputs, randomized
from transformers import AutoImageProcessor, AutoModel

from cl_prompts import AutoPromptPoolModel, L2PConfig, PromptPoolPipeline, get_prompt_pool_model
from cl_prompts.runs.images import ToTensor
from cl_prompts.sharing.image_processor import check_processor, load_processor
from cl_prompts.storage.file_source import FileSource


timm = pytest.importorskip("timm", reason="timm cannot be imported, for example without torchvision", exc_type=ImportError)
NAME = "vit_tiny_patch16_224"
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
IMAGES = {"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.2] * 3, "crop_pct": 0.9}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of timm with a classifier of 5 classes."""
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(randomized(timm.create_model(NAME, num_classes=5, **SIZES)).state_dict(), folder / "model.safetensors")
    config = {"architecture": NAME, "num_classes": 5, "model_args": SIZES, "pretrained_cfg": IMAGES}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def place_of(folder: Path) -> FileSource:
    return FileSource(str(folder), folder)


@torch.no_grad()
def test_a_checkpoint_of_timm_is_found_again_with_its_image_processor(checkpoint: Path, tmp_path: Path) -> None:
    processor: Any = AutoImageProcessor.from_pretrained(checkpoint)
    model = get_prompt_pool_model(AutoModel.from_pretrained(checkpoint), L2PConfig(pool_size=4, top_k=2, prompt_length=2))
    model.begin_task([0, 1])
    model.end_task()
    model.eval().save_pretrained(tmp_path / "adapter", image_processor=processor)
    values = inputs("vit", 2)
    again = AutoPromptPoolModel.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(again(**values).logits, model(**values).logits, atol=1e-6, rtol=0)

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    scores = model(**processor(picture)).logits.softmax(1)[0].max().item()
    for saved in (True, False):  # the adapter's own, then the base's
        pipe = PromptPoolPipeline.from_pretrained(tmp_path / "adapter")
        assert pipe.image_processor.data_config == processor.data_config
        assert pipe(picture)[0]["score"] == pytest.approx(scores, abs=1e-6)
        (tmp_path / "adapter" / "preprocessor_config.json").unlink(missing_ok=not saved)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_size": [3, 100_000, 100_000]}, "more than 4096 pixels"),
        ({"crop_pct": 1e-6}, "more than 4096 pixels"),
        ({"mean": "red"}, "image processor"),
        ("no mapping", "image processor"),
    ],
)
def test_a_hostile_image_processor_of_timm_is_refused(changed: Any, message: str, tmp_path: Path) -> None:
    declared = IMAGES | changed if isinstance(changed, dict) else changed
    content = {"image_processor_type": "TimmWrapperImageProcessor", "pretrained_cfg": declared}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        check_processor(load_processor(place_of(tmp_path)), None)


def test_settings_that_the_image_processor_of_timm_lacks(checkpoint: Path) -> None:
    processor = load_processor(place_of(checkpoint))
    assert ToTensor(processor)(Image.new("RGB", (40, 50))).shape == (3, 32, 32)
    for options in ({"input_range": "unit"}, {"resample": "bilinear"}):
        with pytest.raises(ValueError, match="TimmWrapperImageProcessor, has no"):
            ToTensor(processor, **options)
