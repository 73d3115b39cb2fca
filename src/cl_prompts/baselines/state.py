"""Identity, training state and files of a baseline."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_prompts.backbones.cache_key import backbone_cache_key
from cl_prompts.backbones.feature_extractor import FeatureExtractor
from cl_prompts.baselines.files import write_files
from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.learner.checks import check_finite
from cl_prompts.learner.nested_tensors import below, copy_tensors, prefixed
from cl_prompts.learner.task_state import TaskState
from cl_prompts.runtime.precision import device_of_float64
from cl_prompts.storage.adapter_state import AdapterState


class BaselineState(nn.Module):
    """What identifies a baseline, what its training has changed, and its files."""

    name: ClassVar[str]
    options: dict[str, Any]
    tasks: TaskState
    features: FeatureExtractor
    head: IncrementalHead

    def extra_tensors(self) -> dict[str, Tensor]:
        """What the baseline keeps besides its parameters, by name."""
        return {}

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore `tensors` that `extra_tensors` returned. Parameters and classes are restored already."""

    def detach_optimizer(self) -> None:
        """Take the hooks off the attached optimizer."""

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def check_finite(self) -> None:
        """Raise FloatingPointError if anything that training has changed holds NaN or Inf."""
        self.training_state_dict()

    def cache_key(self) -> dict[str, Any]:
        """What `extract_features` depends on, JSON-able: equal keys mean equal features.

        Raises:
            cl_prompts.interfaces.NotCacheableError: the backbone has code or hooks of others, or is compiled.
        """
        reader = {"reader": "FeatureExtractor", "arguments": self.features.arguments}
        return backbone_cache_key(self.features.base, self.features.pooling) | reader

    def fingerprint(self) -> str:
        """Sha256 of what defines the learner before it has learned: its name and options, and the backbone's weights."""
        identity = [self.name, self.options, self.features.fingerprint]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def training_state_dict(self) -> dict[str, Any]:
        """All that training has changed, also in the middle of a task: `tensors` by name, and JSON-able `values`."""
        tensors = prefixed("parameters.", self.trained()) | prefixed("extra.", self.extra_tensors())
        check_finite(tensors, self.tasks.state.tasks)
        return {"tensors": tensors, "values": {"state": self.tasks.state.to_dict()}}

    def load_training_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state` of a learner with the same options on the same backbone.

        Raises:
            ValueError: the state is of another backbone or other options. Nothing has changed then.
        """
        tasks = TaskState(AdapterState.from_dict(state["values"]["state"]), self.tasks.num_labels)
        if tasks.state.base_fingerprint != self.features.fingerprint:
            raise ValueError("the state was taken from a learner on a backbone with other weights: load that one")
        tensors, device = state["tensors"], self.head.weight.device
        head = IncrementalHead(self.features.width).requires_grad_(self.head.weight.requires_grad).to(device)
        if tasks.classes:
            head.expand(tasks.classes, tasks.current_classes)
        target = {name: p for name, p in self.trained().items() if not name.startswith("head.")}
        target |= {f"head.{name}": p for name, p in head.named_parameters() if p.requires_grad}
        copy_tensors(below("parameters.", tensors), target)
        self.head, self.tasks = head, tasks.to(device)
        self.detach_optimizer()
        extra = below("extra.", tensors)
        work = device_of_float64(device)
        self.load_extra_tensors({n: t.to(work if t.dtype == torch.float64 else device) for n, t in extra.items()})

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, is_main_process: bool = True) -> None:
        """Save as `learner.json` and `learner.safetensors`, for `load_baseline`.

        The folder `save_directory` is replaced as a whole, by the process with `is_main_process`.
        """
        if is_main_process:
            write_files(save_directory, self.name, self.options, self.training_state_dict())
