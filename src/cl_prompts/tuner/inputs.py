"""What an adapter remembers of the images of its training: their size, and the arguments that the base needs for them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from cl_prompts.backbones.input_checks import check_images, check_query
from cl_prompts.backbones.prompted_backbone import PromptedBackbone
from cl_prompts.storage.adapter_state import is_base_argument
from cl_prompts.tuner.adapter import PoolAdapter


def check_inputs(
    backbone: PromptedBackbone, adapter: PoolAdapter, images: Any, query: Any, arguments: dict[str, Any], *, learning: bool
) -> None:
    """Check the images of a forward, and warn if they are of another size than those of training.

    Args:
        backbone: the base with its hooks.
        adapter: the adapter; if `learning`, it remembers the size and the arguments.
        images: images [B, 3, H, W].
        query: un-prompted features [B, D] passed by the caller, or None.
        arguments: arguments of the base.
        learning: whether something is learned from the images.

    Raises:
        TypeError: `images` or `query` is no tensor.
        ValueError: the images or queries do not fit the base.
    """
    check_images(backbone.model, backbone.structure, images, arguments)
    if query is not None:
        check_query(query, images.shape[0], backbone.structure.shape.width)
    if torch.compiler.is_compiling():
        return
    state = adapter.config.state
    if images.dim() == 4:  # SigLIP 2 takes patches
        size = list(images.shape[2:])
        if state.image_size not in (None, size):
            warn_of_size(state.image_size, images)
        if learning and state.image_size != size and not state.several_sizes:
            state.several_sizes = state.image_size is not None
            state.image_size = None if state.several_sizes else size
    if learning:
        state.base_arguments = {name: value for name, value in arguments.items() if is_base_argument(name, value)}


def warn_of_size(trained: list[int] | None, images: Tensor) -> None:
    """Warn that images are not of the size [height, width] of the training images."""
    if trained is not None:
        warnings.warn(
            f"the adapter was trained on images of {trained[0]}x{trained[1]} pixels, these are {images.shape[2]}x"
            f"{images.shape[3]}: resize them with the image processor of its training, or expect worse answers",
            stacklevel=3,
        )
