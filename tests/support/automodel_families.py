"""The vision models that `transformers.AutoModel` knows, and why some are no base for prompts."""

import importlib
import re
import warnings
from ast import literal_eval
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from cl_prompts.backbones.prompted_backbone import PromptedBackbone
from cl_prompts.backbones.trial import check_takes_images, try_once


MODELS = Path(transformers.__file__).parent / "models"
IMAGES = ("pixel_values", "pixel_values_videos", "flattened_patches")
NEEDS = "not tried: needs "  # a library that is not there
# Their structure is that of a vision transformer, but the trial when they are wrapped fails.
BY_TRIAL = {
    "MiniCPMOcrVisionModel": "its forward needs `target_sizes`: it packs the patches of several images",
    "MiniCPMV4_7VisionModel": "its forward needs `target_sizes`: it packs the patches of several images",
}


def vision_models() -> dict[str, str]:
    """Class name -> folder of transformers, of every model of `AutoModel` that takes images or videos and no text.

    Sources are read, not imported, which takes a second instead of half a minute.
    """
    found = {}
    for model_type, names in MODEL_MAPPING_NAMES.items():
        folder = model_type_to_module_name(model_type)
        for name in [names] if isinstance(names, str) else names:
            source = source_of(folder, name)
            modalities = attribute(source, name, "input_modalities") or "text"
            modalities = {modalities} if isinstance(modalities, str) else set(modalities)
            takes_images = attribute(source, name, "main_input_name") in IMAGES and modalities == {"text"}
            is_tower = model_type.endswith(("_vision", "vision_model", "vit_model"))
            if source and (modalities <= {"image", "video"} or takes_images or is_tower):
                found[name] = folder
    return found


@cache
def source_of(folder: str, name: str) -> str:
    """The file that defines a class; empty if there is none."""
    texts = (path.read_text() for path in sorted((MODELS / folder).glob("modeling_*.py")))
    return next((text for text in texts if f"\nclass {name}(" in text), "")


def attribute(source: str, name: str, wanted: str) -> Any:
    """The value of a class attribute, also of a base class in the same file; None if it has none there."""
    found = re.search(rf"^class {name}\((\w*)[^:]*\):\n((?:    .*\n|\n)*)", source, re.MULTILINE)
    if found is None:
        return None
    value = re.search(rf"^    {wanted}(?:: [^=]+)? = (.+)$", found[2], re.MULTILINE)
    return attribute(source, found[1], wanted) if value is None else literal_eval(value[1])


def why_refused(name: str, folder: str) -> str | None:
    """Why a model of a family's default size is no base, tried without weights; None: nothing speaks against it."""
    if name.startswith("TimmWrapper") or name == "TimmBackbone":
        return "a vision transformer inside it works: see timm"
    module = next(path for path in (MODELS / folder).glob("modeling_*.py") if f"\nclass {name}(" in path.read_text())
    try:
        kind = getattr(importlib.import_module(f"transformers.models.{folder}.{module.stem}"), name)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of default sizes
            model = kind(kind.config_class())
    except ImportError as error:
        library = re.search(r"requires the (\w+) library|named '(\w+)'", str(error))
        return NEEDS + (library[1] or library[2] if library else str(error))
    except (TypeError, ValueError, AttributeError):
        return "not tried: its default config builds no model"
    try:
        backbone = PromptedBackbone(model.eval())
        check_takes_images(model, {})
        try_once(backbone, {}, torch.device("meta"), training=False)
    except TypeError as error:
        return BY_TRIAL.get(name) or re.split(r"\. (?:Supported|Pass)", str(error))[0].split(": ", 1)[1]
    return None
