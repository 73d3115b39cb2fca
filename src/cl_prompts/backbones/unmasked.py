"""Models that mask patches at random (ViT-MAE) see all patches, in order, while a planned pass runs."""

from __future__ import annotations

import copy
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.backbones.plan import running_plan
from cl_prompts.backbones.structure import Structure


def install(model: nn.Module, structure: Structure) -> bool:
    """Give the embeddings a copy of their config whose mask ratio is 0 in a planned pass; False for other models."""
    embeddings: Any = model.get_submodule(structure.embeddings)
    config = getattr(embeddings, "config", None)
    if getattr(config, "mask_ratio", None) is None:
        return False
    view = copy.copy(config)
    view.__class__ = type(type(config).__name__, (type(config),), {"mask_ratio": property(_mask_ratio, _set_mask_ratio)})
    embeddings._cl_shared_config, embeddings.config = config, view
    return True


def uninstall(model: nn.Module, structure: Structure) -> None:
    """Give the embeddings their own config back."""
    embeddings: Any = model.get_submodule(structure.embeddings)
    embeddings.config = embeddings._cl_shared_config
    del embeddings._cl_shared_config


def in_order_noise(model: nn.Module, structure: Structure, kwargs: dict[str, Any], images: Tensor) -> dict[str, Any]:
    """`noise` that keeps the patches of a masking model in order, where the caller gave none."""
    backbone: Any = model.get_submodule(structure.inner)
    if "noise" not in signature(backbone.forward).parameters or kwargs.get("noise") is not None:
        return {}
    patch = backbone.config.patch_size
    patches = (images.shape[2] // patch) * (images.shape[3] // patch)
    order = torch.arange(patches, dtype=torch.float32, device=images.device)
    return {"noise": order.expand(images.shape[0], -1)}


def _mask_ratio(config: Any) -> float:
    ratio: float = vars(config)["mask_ratio"]
    return ratio if running_plan() is None else 0.0


def _set_mask_ratio(config: Any, ratio: float) -> None:
    vars(config)["mask_ratio"] = ratio
