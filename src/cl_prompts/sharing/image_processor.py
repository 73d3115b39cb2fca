"""Loading and checking the image processor of an adapter or of its base model."""

from __future__ import annotations

import os
import re
from typing import Any

from PIL import Image
from transformers import AutoImageProcessor, ImageProcessingMixin

from cl_prompts.runtime.text import first_line


PROCESSOR_FILE = "preprocessor_config.json"
# transformers loads any class of its own that the file names; only these are image processors.
CLASS_NAME = re.compile(r"(?!Auto)\w+(ImageProcessor(Fast|Pil)?|FeatureExtractor)")
LARGEST = 4096  # pixels


def load_processor(source: str | os.PathLike[str], **hub: Any) -> Any:
    """The image processor of a folder or Hub id; no code from there is run.

    Args:
        source: folder or Hub id that holds `preprocessor_config.json`.
        hub: `revision`, `token` and the like, for the Hub.

    Raises:
        ValueError: there is none, or it names no image processor of transformers.
    """
    if not source:
        raise ValueError(f"the adapter has no {PROCESSOR_FILE}, and its base model no name: pass image_processor=")
    try:
        declared = ImageProcessingMixin.get_image_processor_dict(source, **hub)[0]
        kind = declared.get("image_processor_type") or declared.get("feature_extractor_type")
        if kind is not None and not CLASS_NAME.fullmatch(kind):
            raise ValueError(f"{kind!r} is no image processor")
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=False, **hub)
    except Exception as error:  # values of an untrusted file may make any code fail
        raise ValueError(f"no image processor in {source} ({first_line(error)}): pass image_processor=") from error


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
                raise ValueError(f"its {name} is {declared}, more than {LARGEST} pixels are refused")
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
