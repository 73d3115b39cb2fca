"""Loading and checking the image processor of an adapter or of its base model."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoImageProcessor, TimmWrapperImageProcessor

from cl_prompts.runtime.text import first_line, short_repr
from cl_prompts.storage.bounded_read import MAX_BASE_CONFIG_BYTES, MAX_PROCESSOR_BYTES, read_json_object
from cl_prompts.storage.file_source import FileSource
from cl_prompts.storage.hub_errors import HubError


PROCESSOR_FILE, BASE_CONFIG = "preprocessor_config.json", "config.json"
# transformers loads any class of its own that the file names; only these are image processors.
CLASS_NAME = re.compile(r"(?!Auto)\w+(ImageProcessor(Fast|Pil)?|FeatureExtractor)")
LARGEST = 4096  # pixels
# What timm's models say about images, in their config.json; transformers takes its presence for a checkpoint of timm.
TIMM_MARK, TIMM_PROCESSOR = "pretrained_cfg", "TimmWrapperImageProcessor"


def save_processor(processor: Any, folder: Path) -> None:
    """Write the `preprocessor_config.json` of an image processor, also of timm's, which transformers does not write."""
    if type(processor).__name__ != TIMM_PROCESSOR:
        processor.save_pretrained(folder)
        return
    content = {"image_processor_type": TIMM_PROCESSOR, TIMM_MARK: processor.data_config}
    (folder / PROCESSOR_FILE).write_text(json.dumps(content, indent=2) + "\n")


def load_processor(place: FileSource) -> Any:
    """The image processor that a `preprocessor_config.json` describes, or that of timm's which a `config.json` describes.

    No code beside it is run.

    transformers gets a folder with this file and the base's model type alone: it would follow others.

    Args:
        place: where the file lies, and perhaps the `config.json` of a base.

    Raises:
        ValueError: there is none, it is damaged, or it names no image processor of transformers.
        cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
    """
    try:
        declared = _declared(place)
        kind = declared.get("image_processor_type") or declared.get("feature_extractor_type")
        if kind is not None and not (isinstance(kind, str) and CLASS_NAME.fullmatch(kind)):
            raise ValueError(f"{short_repr(kind)} is no image processor")
        if TIMM_MARK in declared and kind in (None, TIMM_PROCESSOR):
            return TimmWrapperImageProcessor(pretrained_cfg=declared[TIMM_MARK])
        with tempfile.TemporaryDirectory(prefix="cl_prompts-processor-") as room:
            declared.pop("auto_map", None)
            Path(room, PROCESSOR_FILE).write_text(json.dumps(declared))
            if kind is None:  # files of old versions: the class follows from the base's
                model_type = _model_type(place)
                if not isinstance(model_type, str):
                    raise ValueError("it names no image processor of transformers; custom code is never run")
                Path(room, BASE_CONFIG).write_text(json.dumps({"model_type": model_type}))
            return AutoImageProcessor.from_pretrained(room, trust_remote_code=False, local_files_only=True)
    except HubError:
        raise
    except Exception as error:  # values of an untrusted file may make any code fail
        raise ValueError(f"no image processor in {place.name} ({first_line(error)}): pass image_processor=") from error


def _declared(place: FileSource) -> dict[str, Any]:
    path = place.fetch(PROCESSOR_FILE, MAX_PROCESSOR_BYTES)
    if path is not None:
        return read_json_object(path, MAX_PROCESSOR_BYTES)
    path = place.fetch(BASE_CONFIG, MAX_BASE_CONFIG_BYTES)
    content = {} if path is None else read_json_object(path, MAX_BASE_CONFIG_BYTES)
    if TIMM_MARK not in content:
        raise ValueError(f"it has no {PROCESSOR_FILE}")
    return {TIMM_MARK: content[TIMM_MARK]}


def _model_type(place: FileSource) -> Any:
    path = place.fetch(BASE_CONFIG, MAX_BASE_CONFIG_BYTES)
    return None if path is None else read_json_object(path, MAX_BASE_CONFIG_BYTES).get("model_type")


def check_processor(processor: Any, image_size: list[int] | None, *, any_size: bool = False) -> None:
    """Try an image processor.

    Args:
        processor: the image processor.
        image_size: height and width in pixels that it has to make; None: any.
        any_size: whether the base takes images of any size. A processor that keeps proportions is then accepted.

    Raises:
        ValueError: it asks for huge images, fails, or makes images of another size.
    """
    try:
        for name in ("size", "crop_size", "pad_size"):
            declared = dict(getattr(processor, name, None) or {})
            if max([0, *declared.values()]) > LARGEST:
                raise ValueError(f"its {name} is {short_repr(declared)}, more than {LARGEST} pixels are refused")
        _check_sizes_of_timm(getattr(processor, "data_config", None) or {})
        # Not square, so that a processor that keeps proportions is found.
        made, turned = (
            processor(images=Image.new("RGB", size), return_tensors="pt")["pixel_values"] for size in ((48, 64), (64, 48))
        )
        if not made.isfinite().all():
            raise ValueError("it produces NaN or Inf")
    except Exception as error:
        raise ValueError(f"the image processor fails ({first_line(error)}): pass another image_processor=") from error
    found = list(made.shape[-2:])
    keeps_proportions = made.shape != turned.shape
    if image_size is not None and found != image_size and not (any_size and keeps_proportions):
        raise ValueError(
            f"the image processor makes images of {found[0]}x{found[1]} pixels, the adapter was trained on "
            f"{image_size[0]}x{image_size[1]}: pass the image_processor= of its training"
        )


def _check_sizes_of_timm(config: Mapping[str, Any]) -> None:
    """Raise ValueError if an image processor of timm resizes images to huge ones, before it crops them."""
    if config and max(config["input_size"][1:]) > LARGEST * min(1.0, config["crop_pct"]):
        sizes = {name: config[name] for name in ("input_size", "crop_pct")}
        raise ValueError(f"it has {short_repr(sizes)}, more than {LARGEST} pixels are refused")
