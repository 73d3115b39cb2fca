"""The training state of an adapter: everything that training has changed, between tasks or within one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cl_prompts.interfaces import BackboneShape
from cl_prompts.learner.checks import check_finite
from cl_prompts.learner.features import Recorded
from cl_prompts.learner.nested_tensors import below, copy_tensors, prefixed
from cl_prompts.runtime.gathered import check_gathered
from cl_prompts.storage.adapter_state import AdapterState
from cl_prompts.tuner.adapter import PoolAdapter
from cl_prompts.tuner.validation import check_same_settings


def training_state_dict(adapter: PoolAdapter, base: nn.Module) -> dict[str, Any]:
    """The training state of an adapter on a base.

    Returns:
        a dict with `tensors` by name (all of the adapter's, also those that an adapter file does not hold, and those of the
        base's trained modules) and JSON-able `values`.

    Raises:
        FloatingPointError: a tensor holds NaN or Inf.
        ValueError: statistics of this task have not been gathered over processes.
    """
    check_gathered(adapter)
    check_finite(_tensors(adapter) | _trained(base), adapter.config.state.tasks)
    tensors = prefixed("adapter.", _tensors(adapter)) | prefixed("base.", _trained(base))
    if adapter.recorded is not None:
        tensors |= prefixed("recorded.", vars(adapter.recorded))
    tensors |= prefixed("sample_counter.", adapter.sample_counter.state_dict())
    return {"tensors": tensors, "values": {"state": adapter.config.state.to_dict(), "config": adapter.config.settings()}}


def restored_adapter(adapter: PoolAdapter, shape: BackboneShape, base: nn.Module, state: Mapping[str, Any]) -> PoolAdapter:
    """A new adapter with a training state.

    Args:
        adapter: an adapter with the same config on the same base; it is not changed.
        shape: sizes of the base.
        base: its trained modules are overwritten.
        state: from `training_state_dict`.

    Raises:
        ValueError: the state is of another config. The base is not changed then.
    """
    check_same_settings(adapter.config, state["values"].get("config", {}), "the training state")
    tensors: Mapping[str, Tensor] = state["tensors"]
    config = copy.deepcopy(adapter.config)
    config.state = AdapterState.from_dict(state["values"]["state"])
    new = PoolAdapter(config, shape, adapter.query_pooling).to(next(iter(_tensors(adapter).values())).device)
    if new.classifier is not None and tensors.get("adapter.classifier.counted"):
        new.classifier.make_room()
    source = {name: tensor for name, tensor in tensors.items() if name.startswith(("adapter.", "base."))}
    copy_tensors(source, prefixed("adapter.", _tensors(new)) | prefixed("base.", _trained(base)))
    recorded = below("recorded.", tensors)
    if recorded:
        new.recorded = Recorded(**recorded)
    new.sample_counter.load_state_dict(below("sample_counter.", tensors))
    new.train(adapter.training)
    return new.requires_grad_(next(adapter.head.parameters()).requires_grad)


def _tensors(adapter: PoolAdapter) -> dict[str, Tensor]:
    return {**dict(adapter.named_parameters()), **dict(adapter.named_buffers())}


def _trained(base: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in base.named_parameters() if p.requires_grad}
