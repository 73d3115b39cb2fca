"""The pass over a task's images after its training: features for the classifier, statistics for the pool."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from cl_prompts.backbones.input_checks import further_inputs
from cl_prompts.backbones.prompted_backbone import PromptedBackbone
from cl_prompts.interfaces import Probe
from cl_prompts.learner.features import record
from cl_prompts.learner.protocol import Images
from cl_prompts.runtime.gathered import gather_statistics
from cl_prompts.runtime.precision import without_autocast
from cl_prompts.tuner.adapter import PoolAdapter
from cl_prompts.tuner.forward import prompted_forward


def features_of(
    backbone: PromptedBackbone,
    adapter: PoolAdapter,
    batch: Mapping[str, Any],
    probe: Probe = None,
) -> Tensor:
    """Features that the classifier gets at test: [B, D] float32.

    Args:
        backbone: the base model with its hooks.
        adapter: the adapter.
        batch: with `pixel_values`, further inputs of the base and, if known, `query`.
        probe: called with the attention of each block that has a prefix; None: not called.
    """
    own = {name: batch[name] for name in ("pixel_values", "query", "lower_blocks") if name in batch}
    own |= further_inputs(backbone.model, batch)
    with prompted_forward(backbone, adapter, (), own, training=False, features_only=True, probe=probe):
        features: Tensor = backbone.model(**own).features
    return features


def consolidate(backbone: PromptedBackbone, adapter: PoolAdapter, images: Images) -> None:
    """See `TaskAPI.consolidate`. After an error nothing has changed."""
    gather_statistics(adapter)
    statistics = adapter.pool.new_statistics() if adapter.collects else None

    def read(batch: Mapping[str, Any]) -> Tensor:
        probe = None if statistics is None else partial(statistics.add, valid=batch["labels"] >= 0)
        return features_of(backbone, adapter, batch, probe)

    adapter.consolidate(record(read, images))
    if statistics is not None:
        with without_autocast():
            adapter.pool.keep_statistics(statistics)
