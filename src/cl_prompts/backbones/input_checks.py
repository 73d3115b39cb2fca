"""Whether images and features that a caller passes fit the backbone; every error names the value and the mend."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.backbones.own_arguments import OWN_ARGUMENTS
from cl_prompts.backbones.structure import Structure, check_not_compiled, check_not_wrapped, expected_image
from cl_prompts.backbones.timm_models import wrapped_if_bare
from cl_prompts.runtime.arguments import refuse_unknown


# Taken by every model of transformers, but without effect on `PromptPoolOutput`.
NOT_ANSWERED = ("output_attentions", "output_hidden_states")


def check_arguments(model: nn.Module, kwargs: Mapping[str, Any], further: Collection[str] = ()) -> None:
    """Check the names of a forward's arguments: the models of transformers accept and ignore unknown ones.

    Args:
        model: the base.
        kwargs: the arguments.
        further: names that are allowed besides those of the base, for example `OWN_ARGUMENTS` of a prompted forward.

    Raises:
        TypeError: the base has no argument of that name.
        ValueError: attentions or hidden states are asked for, which the output does not have.
    """
    for name in NOT_ANSWERED:
        if kwargs.get(name):
            raise ValueError(
                f"{name}=True: the output of a model with prompts has none; call the base, model.get_base_model()(...)"
            )
    check_argument_names(model, kwargs, further)


def check_argument_names(model: nn.Module, kwargs: Mapping[str, Any], further: Collection[str]) -> None:
    """Raise TypeError if the base has no argument of a name, and it is not among the `further` ones."""
    if not torch.compiler.is_compiling():  # a graph cannot look at signatures
        # The class of a base with prompts names `OWN_ARGUMENTS` too.
        known = {*_arguments(type(model).forward)} - {*OWN_ARGUMENTS} | {*NOT_ANSWERED, "return_dict", *further}
        refuse_unknown("the forward", kwargs, known)


def further_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a base takes of a `batch` beside the images, like the `spatial_shapes` of SigLIP 2's patches."""
    known = {*_arguments(type(model).forward)} - {"pixel_values", *OWN_ARGUMENTS}
    return {name: value for name, value in batch.items() if name in known}


@cache
def _arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments of a model's `forward`, taken from its class."""
    parameters = inspect.signature(forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD and p.name != "self")


def checked_base(model: Any) -> nn.Module:
    """A base as it is used: a bare model of timm in transformers' wrapper, any other as it is.

    Raises:
        TypeError: it is no model, but for example the name of one, or a model inside a wrapper that hides its calls.
    """
    if isinstance(model, str):
        raise TypeError(f"the base is {model!r}, a name: load it first, transformers.AutoModel.from_pretrained({model!r})")
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"the base is {what}: pass a model first, as transformers.AutoModel.from_pretrained(name) gives it")
    check_not_wrapped(model)
    return wrapped_if_bare(model)


def check_images(model: nn.Module, structure: Structure, images: Any, kwargs: dict[str, Any]) -> None:
    """Raise if images have no batch, the wrong number of channels, or a size the base does not take."""
    check_not_compiled(model)
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        raise ValueError("TorchScript, and the ONNX export made from it, cannot trace prompts: use torch.export.export")
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
