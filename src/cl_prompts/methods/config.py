"""Configs: one class per method. A field that a method does not use does not exist on its config.

Every field's default is the paper's or the released code's value, or says whose choice it is.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from cl_prompts.methods.head_config import ClassifierConfig
from cl_prompts.methods.shared.field_checks import choice, flag, kind, not_negative, positive, positive_number
from cl_prompts.runtime.text import shown
from cl_prompts.storage.adapter_files import HUB_KEYWORDS, AdapterSource, find_adapter
from cl_prompts.storage.adapter_state import FORMAT_VERSION, AdapterState
from cl_prompts.storage.integrity import CONFIG_FILE, PEFT_TYPE, Declared, check_config_size, digest_file
from cl_prompts.version import __version__


METHODS: dict[str, type[PromptPoolConfig]] = {}

READOUTS = ("auto", "cls", "mean", "cls_mean", "pooler", "prompt")
POOLINGS = ("auto", "cls", "mean", "pooler")
CLASS_MASKS = ("task", "batch", "none")
INITS = ("uniform", "unit_uniform", "small_uniform", "normal", "zeros")
LAYER_INITS = (*INITS, "lower_layer")


class _ByMethod(type):
    """Makes `PromptPoolConfig(method="l2p", ...)` build an `L2PConfig`.

    PEFT knows one config class per PEFT type and filters unknown keys of a file by that class's signature, which would
    drop every field of the method. So the class is chosen by `method` first, and unknown keys of a saved file (told by
    the `peft_type` that only files carry) are dropped here.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is PromptPoolConfig:
            cls = _class_of(kwargs.get("method"))
        if "peft_type" in kwargs:
            kwargs = cls._drop_unknown(kwargs)  # type: ignore[attr-defined]
        return type.__call__(cls, *args, **kwargs)


def _class_of(method: Any) -> type[PromptPoolConfig]:
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"unknown method {shown(method)}: choose one of {sorted(METHODS)}")
    return METHODS[method]


def _runtime(default: Any, text: str) -> Any:
    """A field that is this process's business and never enters or leaves a file."""
    return field(default=default, compare=False, metadata={"help": text, "runtime": True})


@dataclass
class PromptPoolConfig(ClassifierConfig, metaclass=_ByMethod):
    """Base of all method configs; `PromptPoolConfig(method=name, ...)` is the same as that method's own class.

    Fields that choose the classifier (`head`, `alignment`, ...) are those of `ClassifierConfig`.

    Args:
        method: name of the method.
        readout: what the classifier reads: "cls" (CLS after the final norm), "mean" (of the patches), "cls_mean" (both, 2 D
            numbers), "pooler" (the model's own pooled feature), "prompt" (mean of the prompt tokens' outputs) or "auto" (as
            the query).
        query_pooling: which feature of the un-prompted pass is the query: "cls", "mean", "pooler" or "auto" (CLS where
            there is one behind a final norm, else the model's pooled feature, else the mean of the patches).
        class_mask: which logits the training loss sees: "task" (classes of the current task, others -inf), "batch"
            (labels present in the global batch) or "none".
        logit_temperature: logits are divided by it at test (calibration); the answer's class stays the same.
        diversity_weight: weight of a loss term that keeps the prompts of a layer apart (`pools.regularisers.diversity`).
        alignment_weight: weight of 1 - cosine between a prompt's mean row and its key. Only methods with keys.
        entropy_weight: weight of log M - entropy of the batch's mean selection: keeps a pool from collapsing onto few
            prompts. Only methods that select.
        num_labels: fixed number of classes with ids 0..num_labels-1 for task-free training, without `begin_task`.
        modules_to_save: names of modules of the base to train and save along, as in PEFT.
        state: what the adapter has learned so far; kept by the model.
        max_adapter_bytes: an adapter whose tensors would take more is refused before memory is allocated. Not saved.
        strict_base: a base with other weights than the adapter was made for is an error instead of a warning. Not saved.
        verify: compare the checksum of loaded tensors. Not saved.
        declared: what the header of the weights beside a file declares, compared with what the config implies before memory
            is allocated. Not saved.

    Raises:
        ValueError: a field is out of range, or fields do not fit each other. Whether they fit the backbone is told when the
            config is put on one.
    """

    method: str = ""
    readout: str = field(default="auto", metadata={"help": "what the classifier reads"})
    query_pooling: str = field(default="auto", metadata={"help": "which un-prompted feature is the query"})
    class_mask: str = field(default="task", metadata={"help": "which logits the training loss sees"})
    logit_temperature: float = field(default=1.0, metadata={"help": "divides the logits at test"})
    diversity_weight: float = field(default=0.0, metadata={"help": "keeps the prompts of a layer apart"})
    alignment_weight: float = field(default=0.0, metadata={"help": "pulls keys and their prompts together"})
    entropy_weight: float = field(default=0.0, metadata={"help": "spreads the selection over the pool"})
    num_labels: int | None = field(default=None, metadata={"help": "fixed number of classes, task-free"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules of the base to train along"})
    state: AdapterState = field(default_factory=AdapterState, metadata={"help": "kept by the model"})
    max_adapter_bytes: int = _runtime(8 * 2**30, "largest adapter that is loaded")
    strict_base: bool = _runtime(False, "another base is an error")
    verify: bool = _runtime(True, "compare checksums")
    declared: Mapping[str, Declared] | None = _runtime(None, "tensors that are going to be loaded")

    papers: ClassVar[tuple[str, ...]] = ()
    needs_optimizer: ClassVar[bool] = False
    has_keys: ClassVar[bool] = True
    selects: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "method" in cls.__dict__:  # fields that several methods share have a class of their own, which is no method
            METHODS[cls.__dict__["method"]] = cls

    def __post_init__(self) -> None:
        if self.task_type is not None:
            raise ValueError(f"task_type={shown(self.task_type)}: PEFT has no image task type; leave it out")
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        own = type(self).__dict__["method"] if type(self) is not PromptPoolConfig else self.method
        if self.method != own:
            raise ValueError(f"{type(self).__name__} is for method={own!r}, not {shown(self.method)}")
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
            raise ValueError(f'modules_to_save={shown(saved)} must be a list of names, like ["layernorm"]')
        choice(self, "readout", READOUTS)
        choice(self, "query_pooling", POOLINGS)
        choice(self, "class_mask", CLASS_MASKS)
        positive_number(self, "logit_temperature")
        not_negative(self, "diversity_weight", "alignment_weight", "entropy_weight")
        if self.alignment_weight and not self.has_keys:
            raise ValueError(f"alignment_weight={self.alignment_weight}: {self.method} has no keys to align; leave it at 0")
        if self.entropy_weight and not self.selects:
            raise ValueError(f"entropy_weight={self.entropy_weight}: {self.method} selects nothing; leave it at 0")
        if self.num_labels is not None:
            positive(self, "num_labels")
            if self.class_mask == "task":
                raise ValueError('num_labels is for task-free training: set class_mask="batch" or "none" with it')
        self.check_classifier(self.num_labels)

    @classmethod
    def _drop_unknown(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        saved = {f.name for f in fields(cls) if f.init and not f.metadata.get("runtime")}
        unknown = sorted(set(kwargs) - saved)
        if unknown:
            warnings.warn(
                f"unknown fields {shown(unknown)} in the file of a {cls.__name__} are ignored: it was written by a newer "
                "cl_prompts, or by hand",
                stacklevel=3,
            )
        return {k: v for k, v in kwargs.items() if k in saved}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PromptPoolConfig:
        """Build the config of the method that `kwargs` name as "method"; unknown keys of a file are dropped with a warning.

        Raises:
            ValueError: no method has that name, or this class is another method's.
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
            kwargs: `revision`, `token`, `cache_dir` and the like, for the Hub; other names are ignored, as in PEFT.

        Raises:
            ValueError: the folder holds no adapter, or one whose weights are not safetensors.
            cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
        """
        hub = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
        limit = PromptPoolConfig.max_adapter_bytes
        files = find_adapter(pretrained_model_name_or_path, subfolder, max_bytes=limit, **hub)
        config = cls.from_peft_type(**copy.deepcopy(dict(files.config)))
        config.declared = files.tensors
        return config

    def to_dict(self) -> dict[str, Any]:
        """All fields that belong in a file."""
        values = super().to_dict()
        return {f.name: values[f.name] for f in fields(self) if not f.metadata.get("runtime")}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json`, with the checksum of the weights that lie beside it.

        Args:
            save_directory: folder to write to.
            kwargs: as in PEFT.

        Raises:
            ValueError: it is larger than any that is loaded.
        """
        self.state.format_version, self.state.written_by = FORMAT_VERSION, __version__  # not those of a file it came from
        saved = copy.copy(self)  # other threads may save or train this config
        saved.state = replace(self.state, weights_sha256=digest_file(save_directory))
        super(PromptPoolConfig, saved).save_pretrained(os.fspath(save_directory), **kwargs)
        check_config_size(Path(save_directory, CONFIG_FILE))
