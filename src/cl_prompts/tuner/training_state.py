"""All that training has changed in an adapter, also in the middle of a task, and how it is put back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.interfaces import BackboneShape
from cl_prompts.learner.features import Recorded
from cl_prompts.learner.optimizer_hook import SampleCounter
from cl_prompts.storage.adapter_state import AdapterState
from cl_prompts.tuner.adapter import PoolAdapter


def training_state(adapter: PoolAdapter, base: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (of the adapter, what it does not save included, and of the base's trained modules) and JSON-able values."""
    tensors = {f"adapter.{name}": tensor for name, tensor in _tensors(adapter).items()}
    tensors |= {f"base.{name}": p for name, p in base.named_parameters() if p.requires_grad}
    if adapter.recorded is not None:
        tensors |= {f"recorded.{name}": value for name, value in vars(adapter.recorded).items()}
    tensors["counted"] = torch.tensor(adapter.sample_counter.seen, dtype=torch.int64)
    return tensors, {"state": adapter.config.state.to_dict()}


def rebuilt(
    adapter: PoolAdapter, shape: BackboneShape, base: nn.Module, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> PoolAdapter:
    """The adapter that `training_state` saw, made from one of the same config.

    Raises:
        ValueError: the tensors are not those of this config.
    """
    config = copy.deepcopy(adapter.config)
    config.state = AdapterState.from_dict(values["state"])
    new = PoolAdapter(config, shape, adapter.query_pooling).to(next(iter(_tensors(adapter).values())).device)
    if new.classifier is not None and tensors.get("adapter.classifier.counted"):
        new.classifier.make_room()
    own = {f"adapter.{name}": tensor for name, tensor in _tensors(new).items()}
    own |= {f"base.{name}": p for name, p in base.named_parameters() if p.requires_grad}
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(("adapter.", "base."))}
    fill(own, found)
    if "recorded.ids" in tensors:
        new.recorded = Recorded(*(tensors[f"recorded.{field.name}"] for field in fields(Recorded)))
    new.sample_counter = SampleCounter(tensors["counted"].tolist())
    new.train(adapter.training)
    return new.requires_grad_(next(adapter.head.parameters()).requires_grad)


@torch.no_grad()
def fill(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into those of the same names; after an error nothing has changed.

    Raises:
        ValueError: they are not the same tensors.
    """
    wrong = sorted(set(own) ^ set(found)) or [name for name in own if own[name].shape != found[name].shape]
    if wrong:
        raise ValueError(
            f"the training state was taken with another config or other options: {wrong} are missing, unknown or differ"
        )
    for name, tensor in own.items():
        tensor.copy_(found[name])


def _tensors(adapter: PoolAdapter) -> dict[str, Tensor]:
    return {**dict(adapter.named_parameters()), **dict(adapter.named_buffers())}
