"""Features of a pass: which token or pool stands for an image, and how a masking model is made to see all of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.backbones.structure import Structure
from cl_prompts.backbones.tokens import TokenInjector


def resolve_pooling(pooling: str, structure: Structure, family: str) -> str:
    """The feature that "auto" means for a model.

    Raises:
        ValueError: the model has no such feature.
    """
    if pooling == "auto":
        return structure.pooling
    if pooling in ("cls", "cls_mean") and not structure.has_cls:
        raise ValueError(f'"{pooling}" was asked for, but {family} has no CLS token: use "auto" or "mean"')
    if pooling == "pooler" and structure.pooler is None:
        raise ValueError(f'"pooler" was asked for, but {family} has no pooler that reads all tokens: use "auto"')
    return pooling


def take_feature(model: nn.Module, structure: Structure, seen: TokenInjector, pooling: str) -> Tensor:
    """One feature per image [B, D] (or [B, 2 D]) from what the newest pass recorded.

    Args:
        pooling: "cls" (CLS behind the final norm), "mean" (of the patches behind the final norm), "cls_mean" (both,
            [B, 2 D]), "pooler" (the model's pooled feature) or "prompt" (mean of the prompt tokens' outputs behind the
            final norm).
    """
    assert seen.hidden is not None
    norm = model.get_submodule(structure.norm)
    if pooling == "cls":
        feature = norm(seen.hidden[:, 0])
    elif pooling == "mean":
        feature = norm(seen.hidden)[:, structure.special_tokens :].mean(1)
    elif pooling == "cls_mean":
        hidden = norm(seen.hidden)
        feature = torch.cat([hidden[:, 0], hidden[:, structure.special_tokens :].mean(1)], 1)
    elif pooling == "prompt":
        assert seen.prompt_hidden is not None
        feature = norm(seen.prompt_hidden).mean(1)
    else:
        assert seen.pooled is not None
        feature = seen.pooled
    return feature.float()


@contextmanager
def whole_image(model: nn.Module, structure: Structure) -> Iterator[None]:
    """Make a model that masks patches at random (ViT-MAE) see all of them."""
    config: Any = model.get_submodule(structure.inner).config
    ratio = getattr(config, "mask_ratio", None)
    if ratio is None:
        yield
        return
    config.mask_ratio = 0.0
    try:
        yield
    finally:
        config.mask_ratio = ratio


def in_order_noise(model: nn.Module, structure: Structure, kwargs: dict[str, Any], batch: Tensor) -> dict[str, Any]:
    """`noise` that keeps the patches of a masking model in order, where the caller gave none."""
    backbone: Any = model.get_submodule(structure.inner)
    if "noise" not in signature(backbone.forward).parameters or kwargs.get("noise") is not None:
        return {}
    patch = backbone.config.patch_size
    patches = (batch.shape[2] // patch) * (batch.shape[3] // patch)
    order = torch.arange(patches, dtype=torch.float32, device=batch.device)
    return {"noise": order.expand(len(batch), -1)}
