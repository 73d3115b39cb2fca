"""A backbone and a head that grows task by task, what it has learnt as tensors and JSON, and files of them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from safetensors.torch import save_file
from torch import Tensor, nn

from cl_prompts.backbones.feature_extractor import FeatureExtractor
from cl_prompts.continual.checkpointing.checkpoint import below, prefixed
from cl_prompts.heads.incremental import GrowingHead
from cl_prompts.learner.optimizer_hook import OptimizerLink
from cl_prompts.storage.adapter_state import AdapterState
from cl_prompts.storage.disk_full import explain_disk_full
from cl_prompts.storage.staging import staging_folder
from cl_prompts.tuner.training_state import fill


CONFIG_FILE, WEIGHTS_FILE = "learner.json", "learner.safetensors"


class GrowingModel(nn.Module):
    """Backbone and head; see `ComparisonLearner` for the arguments."""

    name: ClassVar[str]
    learns_without_tasks: ClassVar[bool] = False

    def __init__(self, backbone: nn.Module, freeze_backbone: bool, pooling: str, num_labels: int | None) -> None:
        super().__init__()
        if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
            raise ValueError(f"num_labels={num_labels!r} must be a positive number of classes")
        if num_labels is not None and not self.learns_without_tasks:
            raise ValueError(
                f"num_labels={num_labels}: {self.name!r} needs to know when a task ends, use a stream with tasks"
            )
        self.num_labels = num_labels
        self.options: dict[str, Any] = {
            "freeze_backbone": freeze_backbone,
            "pooling": pooling,
            "num_labels": num_labels,
        }
        self.features = FeatureExtractor(backbone, pooling, frozen=freeze_backbone)
        self.head = GrowingHead(self.features.width)
        self.state = AdapterState(base_fingerprint=self.features.fingerprint)
        self.grown = False  # since the last training forward
        self.link = OptimizerLink()
        if num_labels is not None:
            self.head.declare(self.classes, self.classes)

    def number(self, name: str, value: float) -> float:
        """Check a non-negative setting and note it among the options."""
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r} must be a non-negative number")
        self.options[name] = value
        return value

    # ---- what subclasses override ------------------------------------------------------------------------------------

    def before_task(self, declared: list[int]) -> None:
        """Before the head grows for a task of the classes `declared`."""

    def extra_tensors(self) -> dict[str, Tensor]:
        """What the learner keeps besides parameters."""
        return {}

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back the `tensors` that `extra_tensors` gave; parameters and classes are in place already."""

    # ---- tasks -------------------------------------------------------------------------------------------------------

    @property
    def classes(self) -> list[int]:
        """Known class ids, in the order of the logits' columns."""
        return list(range(self.num_labels)) if self.num_labels is not None else self.state.classes

    def begin_task(
        self, classes: Sequence[int], *, revisit: bool = False, class_names: dict[int, str] | None = None
    ) -> None:
        """Open the next task; build a new optimizer after it. See `PromptPoolTuner.begin_task`."""
        if self.num_labels is not None:
            raise ValueError(f"num_labels={self.num_labels} makes this learner task-free: leave begin_task out")
        declared = self.state.check_task(classes, revisit)
        self.before_task(declared)
        known = list(dict.fromkeys(self.classes + declared))
        self.head.declare(known, declared)
        self.state.tasks.append(declared)
        self.state.task_open = self.grown = True
        self.state.class_names |= {str(int(c)): str(name) for c, name in (class_names or {}).items()}
        self.link.detach()

    def end_task(self) -> None:
        """Close the task."""
        if not self.state.task_open:
            raise ValueError("no task is open: call begin_task(classes) first")
        self.state.task_open = False
        self.link.detach()

    # ---- state -------------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """Sha256 of what defines the learner before it has learnt: its name and options, and the backbone's weights."""
        told = [self.name, self.options, self.features.fingerprint]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def training_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that training has changed, also in the middle of a task: tensors by name, and JSON-able values."""
        tensors = prefixed("parameters.", self.trained()) | prefixed("extra.", self.extra_tensors())
        return tensors, {"state": self.state.to_dict()}

    def load_training_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on where `training_state` was taken, with a learner of the same options on the same backbone.

        Raises:
            ValueError: the state is of another backbone or other options. Nothing has changed then.
        """
        state = AdapterState.from_dict(values["state"])
        if state.base_fingerprint != self.features.fingerprint:
            raise ValueError("the state was taken from a learner on a backbone with other weights: load that one")
        classes = self.classes if self.num_labels is not None else state.classes
        device = self.head.weight.device
        head = GrowingHead(self.features.width).requires_grad_(self.head.weight.requires_grad).to(device)
        if classes:
            head.declare(classes, state.tasks[-1] if state.tasks else classes)
        own = {name: p for name, p in self.trained().items() if not name.startswith("head.")}
        own |= {f"head.{name}": p for name, p in head.named_parameters() if p.requires_grad}
        found = below("parameters.", tensors)
        fill(own, found)
        self.head, self.state = head, state
        self.link.detach()
        self.load_extra_tensors({name: tensor.to(device) for name, tensor in below("extra.", tensors).items()})

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, is_main_process: bool = True) -> None:
        """Save as `learner.json` and `learner.safetensors`, for `load_comparison_learner`.

        Args:
            save_directory: folder to write.
            is_main_process: only the main process writes.
        """
        if not is_main_process:
            return
        tensors, values = self.training_state()
        told = {"learner": self.name, "options": self.options, **values}
        with explain_disk_full(save_directory), staging_folder(save_directory) as folder:
            save_file({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, folder / WEIGHTS_FILE)
            (folder / CONFIG_FILE).write_text(json.dumps(told, indent=2))
