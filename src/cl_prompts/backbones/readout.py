"""One feature per image, read from what a pass recorded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl_prompts.backbones.plan import PassRecord
from cl_prompts.backbones.structure import Structure


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


def read_feature(model: nn.Module, structure: Structure, record: PassRecord, pooling: str) -> Tensor:
    """One feature per image [B, D] (or [B, 2 D]), float32.

    Args:
        model: the base model.
        structure: where its parts are.
        record: of the pass.
        pooling: "cls" (CLS behind the final norm), "mean" (of the patches behind the final norm), "cls_mean" (both,
            [B, 2 D]), "pooler" (the model's pooled feature) or "prompt" (mean of the prompt tokens' outputs behind the
            final norm).
    """
    assert record.hidden is not None
    norm = nn.Identity() if structure.norm is None else model.get_submodule(structure.norm)
    if pooling == "cls":
        feature = norm(record.hidden[:, 0])
    elif pooling == "mean":
        feature = norm(record.hidden)[:, structure.patches].mean(1)
    elif pooling == "cls_mean":
        hidden = norm(record.hidden)
        feature = torch.cat([hidden[:, 0], hidden[:, structure.patches].mean(1)], 1)
    elif pooling == "prompt":
        assert record.prompt_hidden is not None
        feature = norm(record.prompt_hidden).mean(1)
    else:
        assert record.pooled is not None
        feature = record.pooled
    return feature.float()
