"""Whether images and features that a caller passes fit the backbone; every error names the value and the mend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cl_prompts.backbones.structure import Structure, expected_image


def check_is_model(model: Any) -> None:
    """Raise TypeError if a base is no model, but for example the name of one."""
    if isinstance(model, str):
        raise TypeError(f"the base is {model!r}, a name: load it first, transformers.AutoModel.from_pretrained({model!r})")
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"the base is {what}: pass a model first, as transformers.AutoModel.from_pretrained(name) gives it")


def check_images(model: nn.Module, structure: Structure, images: Any, kwargs: dict[str, Any]) -> None:
    """Raise if images have no batch, the wrong number of channels, or a size the base does not take."""
    if not isinstance(images, Tensor):
        mend = "pass model(**inputs)" if isinstance(images, Mapping) else "the base's image processor makes one"
        raise TypeError(f"pixel_values must be a tensor [B, channels, height, width], got {type(images).__name__}: {mend}")
    if images.dim() == 0 or images.shape[0] == 0:
        raise ValueError(f"pixel_values has shape {list(images.shape)}: give at least one image")
    channels, size = expected_image(model, structure)
    if channels is None:  # SigLIP 2 takes patches
        return
    if images.dim() != 4:
        raise ValueError(f"pixel_values has shape {list(images.shape)}, expected [B, {channels}, height, width]")
    if images.shape[1] != channels:
        raise ValueError(
            f"pixel_values has {images.shape[1]} channels, the base takes {channels}: convert images to RGB first"
        )
    if size is not None and tuple(images.shape[2:]) != size and not kwargs.get("interpolate_pos_encoding"):
        raise ValueError(
            f"images are {images.shape[2]}x{images.shape[3]}, the base takes {size[0]}x{size[1]}: resize them with its "
            "image processor, or pass interpolate_pos_encoding=True"
        )


def check_query(query: Any, images: int, width: int) -> None:
    """Raise if a query that a caller passes is not one feature per image."""
    if not isinstance(query, Tensor):
        raise TypeError(f"query must be a tensor [B, width] from extract_features, got {type(query).__name__}")
    if query.shape != (images, width):
        raise ValueError(f"query has shape {list(query.shape)}, expected {[images, width]}")
