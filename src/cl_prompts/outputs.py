"""The output of a model with a prompt pool."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class PromptPoolOutput(ModelOutput):
    """Output of a model with a prompt pool. Fields are None where a method does not have them.

    Args:
        loss: cross entropy plus the method's terms, a scalar; None without labels.
        logits: [B, known classes], in the order of `model.classes`. In training, -inf for classes that `class_mask`
            excludes from the loss. At test they are divided by the temperature, so that their softmax is calibrated.
        losses: the terms of the loss by name, "cross_entropy" and the method's; None without labels.
        prompt_ids: numbers of the selected prompts [B, k], or [B, layers, k] if each layer selects.
        prompt_weights: their scores or mixing weights, [B, k] or [B, layers, k].
        scores: selection scores of all prompts of the pool, [B, M] or [B, layers, M].
        query: feature of the un-prompted pass [B, D].
        features: input of the classifier [B, D].
        adapter_names: the adapter of each image [B], of a forward with `adapter_names`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    prompt_ids: Tensor | None = None
    prompt_weights: Tensor | None = None
    scores: Tensor | None = None
    query: Tensor | None = None
    features: Tensor | None = None
    adapter_names: list[str] | None = None
