"""The transform of a stream: an image processor as a transform, and its result as a tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from cl_prompts.runtime.images import pil_to_rgb
from cl_prompts.runtime.text import short_repr


class ProcessorTransform:
    """Transform: image -> tensor [3, H, W], with an image processor of transformers. PIL images of other modes are made
    RGB first, by the rule of `cl_prompts.runtime.images`.

    Args:
        processor: the image processor, or a processor that has one as `image_processor`.
        options: arguments of its call.
    """

    def __init__(self, processor: Any, **options: Any) -> None:
        self.processor = getattr(processor, "image_processor", processor)
        self.options = options

    def settings(self) -> dict[str, Any]:
        """All settings, JSON-able, for the query cache."""
        kind = type(self.processor)
        return {"class": f"{kind.__module__}.{kind.__qualname__}", **self.processor.to_dict(), "options": self.options}

    def __call__(self, image: Any) -> Tensor:
        """The tensor [3, H, W] of an image."""
        return self._processed(image, **self.options)

    def resized(self, image: Any) -> Tensor:
        """The image as it is before its values are scaled: [3, H, W], 8 bits with most processors."""
        return self._processed(image, **self.options | {"do_rescale": False, "do_normalize": False})

    def _processed(self, image: Any, **options: Any) -> Tensor:
        rgb = pil_to_rgb(image) if isinstance(image, PIL.Image.Image) else image
        pixels: Tensor = self.processor(rgb, return_tensors="pt", **options)["pixel_values"][0]
        return pixels


def as_transform(transform: Any) -> Callable[[Any], Any]:
    """A transform as given, or for an image processor of transformers the transform that calls it.

    Raises:
        TypeError: `transform` cannot be called.
    """
    processor = getattr(transform, "image_processor", transform)
    if hasattr(processor, "preprocess") and hasattr(processor, "to_dict") and not isinstance(processor, type):
        return ProcessorTransform(processor)
    if not callable(transform) or isinstance(transform, type):
        raise TypeError(
            f"transform={short_repr(transform)}: pass a function image -> tensor [3, H, W], or the base's image processor, "
            "AutoImageProcessor.from_pretrained(name)"
        )
    return transform


def as_pixels(value: Any) -> Tensor:
    """What a transform returns, as a float tensor [3, H, W].

    Accepted are tensors, arrays, and what an image processor returns for one image (`pixel_values`, with a batch of one).

    Raises:
        TypeError: it is none of these, or holds integers.
        ValueError: it is not one image.
    """
    if isinstance(value, Mapping):
        if "pixel_values" not in value:
            raise TypeError(f"the transform returned a dict with {sorted(value)}: return the tensor of the image")
        value = value["pixel_values"]
    if isinstance(value, list | tuple) and len(value) == 1:
        (value,) = value
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        raise TypeError(f"the transform returned a {type(value).__name__}: end it with ToTensor() or the image processor")
    if value.dim() == 4 and value.shape[0] == 1:
        value = value[0]
    if value.dim() != 3 or (value.shape[0] not in (1, 3) and value.shape[2] in (1, 3)):
        mend = "permute(2, 0, 1) puts the channels first" if value.dim() == 3 else "return one image"
        raise ValueError(f"the transform returned shape {list(value.shape)}, expected [3, height, width]: {mend}")
    if not value.is_floating_point():
        raise TypeError(
            f"the transform returned {value.dtype}: convert to float and normalize as the base expects, for example with "
            "its image processor"
        )
    return value.float() if value.dtype == torch.float64 else value
