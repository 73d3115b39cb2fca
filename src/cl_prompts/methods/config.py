"""The base class of all method configs. A config has only the fields that its method uses.

The default of a field is the value of the paper or of the released code; "Ours" marks our own fields and defaults.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig

from cl_prompts.methods.head_config import ClassifierConfig
from cl_prompts.methods.registry import METHODS
from cl_prompts.methods.shared.field_checks import choice, flag, kind, not_negative, positive, scales_logits
from cl_prompts.runtime.arguments import refuse_unknown
from cl_prompts.runtime.peft_type import PEFT_TYPE
from cl_prompts.runtime.text import short_repr
from cl_prompts.storage.adapter_files import LOAD_KEYWORDS, AdapterSource, find_adapter
from cl_prompts.storage.adapter_state import FORMAT_VERSION, AdapterState, check_base_arguments
from cl_prompts.storage.bounded_read import MAX_ADAPTER_BYTES
from cl_prompts.storage.declared import CONFIG_FILE, Declared, check_config_size
from cl_prompts.storage.file_source import HUB_KEYWORDS
from cl_prompts.storage.integrity import digest_file
from cl_prompts.version import __version__


READOUTS = ("auto", "cls", "mean", "cls_mean", "pooler", "prompt")
POOLINGS = ("auto", "cls", "mean", "pooler")
CLASS_MASKS = ("task", "batch", "none")
INITS = ("uniform", "unit_uniform", "small_uniform", "normal", "zeros")
LAYER_INITS = (*INITS, "lower_layer")


class _ByMethod(type):
    """Metaclass that makes `PromptPoolConfig(method="l2p", ...)` build an `L2PConfig`.

    PEFT knows one config class per PEFT type and drops the keys of a file that this class does not have, which would be
    every field of the method. Therefore the class is chosen by `method` first, and unknown keys are dropped afterwards.
    Only files have the key `peft_type`.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is PromptPoolConfig:
            cls = _class_of(kwargs.get("method"))
        if "peft_type" in kwargs:
            kwargs = cls._drop_unknown(kwargs)  # type: ignore[attr-defined]
        return type.__call__(cls, *args, **kwargs)


def _class_of(method: Any) -> type[PromptPoolConfig]:
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"unknown method {short_repr(method)}: choose one of {sorted(METHODS)}")
    return METHODS[method].config_class


@dataclass
class PromptPoolConfig(ClassifierConfig, metaclass=_ByMethod):
    """Base class of all method configs. `PromptPoolConfig(method="l2p", ...)` is the same as `L2PConfig(...)`.

    The fields of the classifier (`head`, `alignment`, ...) are inherited from `ClassifierConfig`.

    Args:
        method: name of the method.
        readout: input of the classifier: "cls" (CLS after the final norm), "mean" (of the patches), "cls_mean" (both
            concatenated, width 2 D), "pooler" (the model's pooled feature), "prompt" (mean of the prompt tokens' outputs)
            or "auto" (same as the query).
        query_pooling: feature of the un-prompted pass that is the query: "cls", "mean", "pooler" or "auto" (CLS if the
            model has one and a final norm, else its pooled feature, else the mean of the patches).
        class_mask: logits that the training loss uses: "task" (classes of the current task, others -inf), "batch" (classes
            of the labels in the global batch) or "none" (all). In a task of one class, without images of others, the head
            learns on the features of all classes seen (docs/methods/classifiers.md).
        logit_temperature: divides the logits at test (calibration). The predicted class does not change.
        loss_temperature: divides the logits of the images in the training loss.
        diversity_weight: weight of the mean squared cosine between different prompts of a layer
            (`cl_prompts.methods.shared.regularizers.diversity`).
        alignment_weight: weight of 1 - cosine between the mean row of a prompt and its key. Only for methods with keys.
        entropy_weight: weight of log M - entropy of the batch's mean selection, which keeps a pool from collapsing onto few
            prompts. Only for methods that select prompts.
        num_labels: number of classes, with ids 0..num_labels-1, for task-free training without `begin_task`.
        modules_to_save: names of modules of the base that are trained and saved with the adapter, as in PEFT.
        base_arguments: further arguments of every forward of the base, like {"interpolate_pos_encoding": True} for images
            of another size than the base's. Those of a training forward are remembered and need not be given here.
        state: tasks, classes and counters of the adapter; set by the model.
        max_adapter_bytes: an adapter with more bytes of tensors is refused before memory is allocated. Not saved.
        strict_base: raise an error, instead of a warning, if the base has other weights than the one of training. Not
            saved.
        verify: compare the checksum of loaded tensors. Not saved.
        declared: tensors that the header of the weights file declares; compared with the shapes that the config implies
            before memory is allocated. Not saved.

    Raises:
        ValueError: a field is out of range, or two fields contradict each other. Whether the fields fit a backbone is
            checked when the model is made.
    """

    method: str = ""
    readout: str = field(default="auto", metadata={"help": "input of the classifier"})
    query_pooling: str = field(default="auto", metadata={"help": "feature of the un-prompted pass that is the query"})
    class_mask: str = field(default="task", metadata={"help": "logits that the training loss uses"})
    logit_temperature: float = field(default=1.0, metadata={"help": "divides the logits at test"})
    loss_temperature: float = field(default=1.0, metadata={"help": "divides the logits of the training loss"})
    diversity_weight: float = field(default=0.0, metadata={"help": "weight of the cosines between prompts of a layer"})
    alignment_weight: float = field(default=0.0, metadata={"help": "weight of the distance between keys and prompts"})
    entropy_weight: float = field(default=0.0, metadata={"help": "weight of the entropy of the selection"})
    num_labels: int | None = field(default=None, metadata={"help": "fixed number of classes, task-free"})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules of the base that are trained with the adapter"}
    )
    base_arguments: dict[str, Any] | None = field(
        default=None, metadata={"help": "further arguments of every forward of the base"}
    )
    state: AdapterState = field(default_factory=AdapterState, metadata={"help": "set by the model"})
    # Fields of the running process, which are neither saved nor loaded. Written out, so that the API pages show defaults.
    max_adapter_bytes: int = field(
        default=MAX_ADAPTER_BYTES, compare=False, metadata={"help": "largest size of an adapter in bytes", "runtime": True}
    )
    strict_base: bool = field(
        default=False, compare=False, metadata={"help": "raise an error on a base with other weights", "runtime": True}
    )
    verify: bool = field(
        default=True, compare=False, metadata={"help": "compare the checksum of loaded tensors", "runtime": True}
    )
    declared: Mapping[str, Declared] | None = field(
        default=None, compare=False, metadata={"help": "tensors that the weights file declares", "runtime": True}
    )

    papers: ClassVar[tuple[str, ...]] = ()
    # Whether training must call `attach_optimizer`.
    needs_optimizer: ClassVar[bool] = False
    # Whether the optimizer's steps on the head's rows of earlier tasks are undone. They have no gradient with
    # class_mask="task", but momentum and weight decay move them.
    freezes_old_rows: ClassVar[bool] = False
    # Whether prompts have keys, and whether a score selects among prompts.
    has_keys: ClassVar[bool] = True
    selects: ClassVar[bool] = True
    # Fields of older files that had no influence on an answer; they are ignored without a warning.
    retired_fields: ClassVar[tuple[str, ...]] = ()
    # Values of fields that files of adapters lack which were written before the fields were there; not today's defaults.
    older_values: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        if self.task_type is not None:
            raise ValueError(f"task_type={short_repr(self.task_type)}: PEFT has no image task type; leave it out")
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.method != type(self).method:
            raise ValueError(f"{type(self).__name__} is for method={type(self).method!r}, not {short_repr(self.method)}")
        if self.state is None:
            self.state = AdapterState()
        elif not isinstance(self.state, AdapterState):
            self.state = AdapterState.from_dict(self.state)
        kind(self, str, "text", "base_model_name_or_path", "revision")
        kind(self, dict, "a mapping", "auto_mapping")
        flag(self, "inference_mode")
        saved = self.modules_to_save
        if saved is not None and not (
            isinstance(saved, (list, tuple, set)) and all(isinstance(name, str) for name in saved)
        ):
            raise ValueError(f'modules_to_save={short_repr(saved)} must be a list of names, like ["layernorm"]')
        if self.base_arguments is not None:
            check_base_arguments("base_arguments", self.base_arguments)
        choice(self, "readout", READOUTS)
        choice(self, "query_pooling", POOLINGS)
        choice(self, "class_mask", CLASS_MASKS)
        scales_logits(self, "logit_temperature", "loss_temperature")
        not_negative(self, "diversity_weight", "alignment_weight", "entropy_weight")
        if self.alignment_weight and not self.has_keys:
            raise ValueError(f"alignment_weight={self.alignment_weight}: {self.method} has no keys to align; leave it at 0")
        if self.entropy_weight and not self.selects:
            raise ValueError(f"entropy_weight={self.entropy_weight}: {self.method} selects nothing; leave it at 0")
        if self.num_labels is not None:
            positive(self, "num_labels")
            if self.num_labels == 1:
                raise ValueError(
                    "num_labels=1 leaves nothing to tell apart: give at least 2, or declare classes by begin_task"
                )
            if self.class_mask == "task":
                raise ValueError('num_labels is for task-free training: set class_mask="batch" or "none" with it')
        self.check_classifier(self.num_labels)

    @classmethod
    def _drop_unknown(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        saved = {f.name for f in fields(cls) if f.init and not f.metadata.get("runtime")}
        unknown = sorted(set(kwargs) - saved - set(cls.retired_fields))
        if unknown:
            warnings.warn(
                f"unknown fields {short_repr(unknown)} in the file of a {cls.__name__} are ignored: it was written by a "
                "newer cl_prompts, or by hand",
                stacklevel=3,
            )
        given = {k: v for k, v in kwargs.items() if k in saved}
        return {**cls.older_values, **given} if given.get("state") else given

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PromptPoolConfig:
        """Build the config of a method from `kwargs`, which name it as "method"; unknown keys are dropped with a warning.

        Raises:
            ValueError: no method has that name, or this class is the config of another method.
        """
        config = PromptPoolConfig(**{"peft_type": PEFT_TYPE, **kwargs})
        if cls is not PromptPoolConfig and not isinstance(config, cls):
            raise ValueError(f"the file holds a {type(config).__name__} (method {config.method!r}), not a {cls.__name__}")
        return config

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: AdapterSource, subfolder: str | None = None, **kwargs: Any
    ) -> PromptPoolConfig:
        """Read `adapter_config.json` from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: folder or Hub id, or the files that `find_adapter` found.
            subfolder: folder of the adapter in it.
            kwargs: `revision`, `token`, `cache_dir` and the like, for the Hub. Those of loading weights, which PEFT passes
                too, are not used.

        Raises:
            TypeError: an argument is unknown, for example a field of the config: set it on the result.
            ValueError: the folder holds no adapter, or one whose weights are not safetensors.
            cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
        """
        refuse_unknown("from_pretrained of a config", kwargs, (*LOAD_KEYWORDS, "ephemeral_gpu_offload"))
        hub = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
        limit = PromptPoolConfig.max_adapter_bytes
        files = find_adapter(pretrained_model_name_or_path, subfolder, max_bytes=limit, **hub)
        config = cls.from_peft_type(**copy.deepcopy(dict(files.config)))
        config.declared = files.tensors
        return config

    def settings(self) -> dict[str, Any]:
        """The fields that say what the tensors mean, as JSON has them: all but the state, limits and PEFT's own."""
        skipped = {"state", *(f.name for f in fields(PeftConfig))}
        own = [f.name for f in fields(self) if f.name not in skipped and not f.metadata.get("runtime")]
        values = {name: getattr(self, name) for name in own}
        read: dict[str, Any] = json.loads(json.dumps(values, default=sorted))  # a set of modules_to_save has no order
        return read

    def to_dict(self) -> dict[str, Any]:
        """All fields that are saved."""
        values = super().to_dict()
        return {f.name: values[f.name] for f in fields(self) if not f.metadata.get("runtime")}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json`, with the checksum of the weights in the same folder.

        Args:
            save_directory: folder to write to.
            kwargs: `auto_mapping_dict`, as in PEFT.

        Raises:
            TypeError: an argument is unknown.
            ValueError: the file would be larger than the limit of loading.
        """
        refuse_unknown("save_pretrained of a config", kwargs, ("auto_mapping_dict",))
        self.state.format_version, self.state.written_by = FORMAT_VERSION, __version__  # not those of a file it came from
        saved = copy.copy(self)  # other threads may save or train this config
        saved.state = replace(self.state, weights_sha256=digest_file(save_directory))
        super(PromptPoolConfig, saved).save_pretrained(os.fspath(save_directory), **kwargs)
        check_config_size(Path(save_directory, CONFIG_FILE))
