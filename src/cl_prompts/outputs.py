"""What the model answers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class PromptPoolOutput(ModelOutput):
    """Answer of a model with a prompt pool.

    Args:
        loss: cross entropy plus all further parts, a scalar; only with labels.
        logits: [B, known classes], in the order of `model.classes`. In training, classes that the loss does not see are
            -inf (`class_mask`).
        losses: the parts of the loss, by name ("cross_entropy" and the method's own).
        prompt_ids: chosen prompts [B, k], or [B, layers, k] where each layer chooses.
        prompt_weights: their scores or mixing weights, likewise [B, k] or [B, layers, k].
        scores: what the choice was made by, over the whole pool: [B, M] or [B, layers, M], where a method selects.
        query: feature of the un-prompted pass [B, D], where the method asks for one.
        features: what the classifier read [B, D].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    prompt_ids: Tensor | None = None
    prompt_weights: Tensor | None = None
    scores: Tensor | None = None
    query: Tensor | None = None
    features: Tensor | None = None
