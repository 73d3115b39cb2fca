"""Configs: one class per method. A field that a method does not use does not exist on its config.

Every field's default is the paper's or the released code's value, or says whose choice it is.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from peft import PeftConfig

from cl_prompts.integrity import PEFT_TYPE, check_adapter_files, digest_file
from cl_prompts.state import AdapterState


METHODS: dict[str, type[PromptPoolConfig]] = {}

HEADS = ("linear", "cosine")
READOUTS = ("auto", "cls", "mean", "pooler", "prompt")
POOLINGS = ("auto", "cls", "mean", "pooler")
CLASS_MASKS = ("task", "batch", "none")
INITS = ("uniform", "small_uniform", "normal", "zeros")


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
        raise ValueError(f"unknown method {method!r}: choose one of {sorted(METHODS)}")
    return METHODS[method]


def _runtime(default: Any, text: str) -> Any:
    """A field that is this process's business and never enters or leaves a file."""
    return field(default=default, metadata={"help": text, "runtime": True})


@dataclass
class PromptPoolConfig(PeftConfig, metaclass=_ByMethod):
    """Base of all method configs; `PromptPoolConfig(method=name, ...)` is the same as that method's own class.

    Args:
        method: name of the method.
        readout: what the classifier reads: "cls" (CLS after the final norm), "mean" (of the patches), "pooler" (the
            model's own pooled feature), "prompt" (mean of the prompt tokens' outputs) or "auto" (as the query).
        head: "linear" w.x + b, as in the papers, or "cosine" head_scale * cos(w, x): rows of different tasks then stay
            comparable, although no loss ever compares them (class_mask="task").
        head_scale: scale of the cosine head.
        query_pooling: which feature of the un-prompted pass is the query: "cls", "mean", "pooler" or "auto" (CLS where
            there is one behind a final norm, else the model's pooled feature, else the mean of the patches).
        class_mask: which logits the training loss sees: "task" (classes of the current task, others -inf), "batch"
            (labels present in the global batch) or "none".
        num_labels: fixed number of classes with ids 0..num_labels-1 for task-free training, without `begin_task`.
        modules_to_save: names of modules of the base to train and save along, as in PEFT.
        state: what the adapter has learned so far; kept by the model.
        max_adapter_bytes: an adapter whose tensors would take more is refused before memory is allocated. Not saved.
        strict_base: a base with other weights than the adapter was made for is an error instead of a warning. Not saved.
        verify: compare the checksum of loaded tensors. Not saved.
    """

    method: str = ""
    readout: str = field(default="auto", metadata={"help": "what the classifier reads"})
    head: str = field(default="linear", metadata={"help": "linear or cosine classifier"})
    head_scale: float = field(default=20.0, metadata={"help": "scale of the cosine head"})
    query_pooling: str = field(default="auto", metadata={"help": "which un-prompted feature is the query"})
    class_mask: str = field(default="task", metadata={"help": "which logits the training loss sees"})
    num_labels: int | None = field(default=None, metadata={"help": "fixed number of classes, task-free"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules of the base to train along"})
    state: AdapterState = field(default_factory=AdapterState, metadata={"help": "kept by the model"})
    max_adapter_bytes: int = _runtime(8 * 2**30, "largest adapter that is loaded")
    strict_base: bool = _runtime(False, "another base is an error")
    verify: bool = _runtime(True, "compare checksums")

    papers: ClassVar[tuple[str, ...]] = ()
    needs_optimizer: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        METHODS[cls.__dict__["method"]] = cls

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        own = type(self).__dict__["method"] if type(self) is not PromptPoolConfig else self.method
        if self.method != own:
            raise ValueError(f"{type(self).__name__} is for method={own!r}, not {self.method!r}")
        if self.task_type is not None:
            raise ValueError(f"task_type={self.task_type!r}: PEFT has no image task type; leave it out")
        if self.state is None:
            self.state = AdapterState()
        elif not isinstance(self.state, AdapterState):
            self.state = AdapterState.from_dict(self.state)
        _kind(self, str, "text", "base_model_name_or_path", "revision")
        _kind(self, dict, "a mapping", "auto_mapping")
        _flag(self, "inference_mode")
        saved = self.modules_to_save
        if saved is not None and not (
            isinstance(saved, (list, tuple, set)) and all(isinstance(name, str) for name in saved)
        ):
            raise ValueError(f'modules_to_save={saved!r} must be a list of names, like ["layernorm"]')
        _choice(self, "readout", READOUTS)
        _choice(self, "head", HEADS)
        _positive_number(self, "head_scale")
        _choice(self, "query_pooling", POOLINGS)
        _choice(self, "class_mask", CLASS_MASKS)
        if self.num_labels is not None:
            _positive(self, "num_labels")
            if self.class_mask == "task":
                raise ValueError('num_labels is for task-free training: set class_mask="batch" or "none" with it')

    @classmethod
    def _drop_unknown(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        saved = {f.name for f in fields(cls) if f.init and not f.metadata.get("runtime")}
        unknown = sorted(set(kwargs) - saved)
        if unknown:
            warnings.warn(
                f"unknown fields {unknown} in the file of a {cls.__name__} are ignored: it was written by a newer "
                "cl_prompts, or by hand",
                stacklevel=3,
            )
        return {k: v for k, v in kwargs.items() if k in saved}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PromptPoolConfig:
        """Build the config of the method named in `kwargs["method"]`; unknown keys of a file are dropped with a warning."""
        config = PromptPoolConfig(**{"peft_type": PEFT_TYPE, **kwargs})
        if cls is not PromptPoolConfig and not isinstance(config, cls):
            raise ValueError(f"the file holds a {type(config).__name__} (method {config.method!r}), not a {cls.__name__}")
        return config

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PromptPoolConfig:
        """Read `adapter_config.json` from a folder or the Hub.

        Raises:
            ValueError: the folder holds no adapter, or one whose weights are not safetensors.
        """
        check_adapter_files(pretrained_model_name_or_path, subfolder)
        return super().from_pretrained(os.fspath(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All fields that belong in a file."""
        values = super().to_dict()
        return {f.name: values[f.name] for f in fields(self) if not f.metadata.get("runtime")}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json`, with the checksum of the weights that lie beside it."""
        self.state.weights_sha256 = digest_file(save_directory)
        try:
            super().save_pretrained(os.fspath(save_directory), **kwargs)
        finally:
            self.state.weights_sha256 = None  # that of this one file, not of what is trained on


@dataclass
class L2PConfig(PromptPoolConfig):
    """L2P: the prompts of a shared pool whose keys are nearest to the image's query go in front of its patches.

    Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022. Defaults are those of the released PyTorch code
    (JH-LEE-KR/l2p-pytorch), except that the choice is made per image; the paper's text has pull_coefficient 0.5.

    Args:
        pool_size: number of prompts M.
        prompt_length: tokens of one prompt Lp.
        top_k: prompts per image N (paper) or K.
        prompt_init, key_init: "uniform" U(-1, 1) (released PyTorch code), "small_uniform" U[0, 0.01) (released JAX
            code), "normal" (std 0.02) or "zeros".
        key_type: "learned" keys; "prompt_mean" takes a prompt's mean token as its key (ablation "w/o key"); "none" uses
            every prompt for every image, without a query (with pool_size=1: ablation "w/o pool", a single prompt).
        pull_coefficient: lambda, weight of the cosine between query and chosen keys (eq. 5).
        diversified_selection: in training, weigh distances by how often a prompt was chosen in earlier tasks (eq. 4).
        batchwise_selection: one set of prompts for the whole batch by majority vote, in training and at test, as in the
            released code. Answers then depend on the batch; only for comparison with published figures.
        position: "after_cls" [CLS, prompts, patches] (first release, PyTorch code) or "front" [prompts, CLS, patches].
        add_cls_position_embedding: add CLS's position embedding to each prompt token (first release, PyTorch code).
            None: do so where the backbone has one.
    """

    method: str = "l2p"
    readout: str = "prompt"
    pool_size: int = 10
    prompt_length: int = 5
    top_k: int = 5
    prompt_init: str = "uniform"
    key_init: str = "uniform"
    key_type: str = "learned"
    pull_coefficient: float = 0.1
    diversified_selection: bool = False
    batchwise_selection: bool = False
    position: str = "after_cls"
    add_cls_position_embedding: bool | None = None

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2112.08654",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "pool_size", "prompt_length", "top_k")
        _choice(self, "prompt_init", INITS)
        _choice(self, "key_init", INITS)
        _choice(self, "key_type", ("learned", "prompt_mean", "none"))
        _choice(self, "position", ("after_cls", "front"))
        _not_negative(self, "pull_coefficient")
        _flag(self, "diversified_selection", "batchwise_selection")
        if self.add_cls_position_embedding is not None:
            _flag(self, "add_cls_position_embedding")
        _check_top_k(self)
        if self.key_type == "none":
            if self.top_k != self.pool_size:
                raise ValueError(
                    f'key_type="none" uses every prompt: set top_k={self.pool_size} (the pool_size), not {self.top_k}'
                )
            if self.diversified_selection or self.batchwise_selection:
                raise ValueError('key_type="none" chooses nothing: leave diversified and batchwise selection off')
        if self.batchwise_selection:
            warnings.warn(
                "batchwise_selection=True lets the images of a batch vote on their prompts: an image's answer then "
                "depends on what else is in its batch, and test batches of one task leak the task",
                stacklevel=2,
            )


@dataclass
class HashPromptConfig(PromptPoolConfig):
    """Hash: one pool of prompts for all tasks, a router per task, and a history of which prompts were used.

    Li et al., "Is Parameter Isolation Better for Prompt-Based Continual Learning?" (History-Aware prompt-SHaring), CVPR
    2026, arXiv 2601.20894. No code is public and the paper leaves open most sizes, the router's input and which router
    answers at test: those fields are our reading, and their defaults our choice (docs/results.md says how they were
    chosen).

    Args:
        pool_size: prompts in the pool, per layer. Ours.
        prompt_length: rows of one prompt; the first half are keys, the second half values. Ours.
        top_k: prompts mixed for an image. Ours.
        layers: blocks that get prefixes, from 0. The paper's default is blocks 1-4.
        share_layers: one pool for all layers instead of one per layer. Ours.
        prompt_init: as in `L2PConfig`. Ours.
        prefix_space: "projected" (keys and values are learned behind the frozen projections, as all published code does)
            or "input" (prompts go through them, as the formulas read).
        router_init: a new task's router starts as a copy of the "previous" one, or from "normal" noise (std 0.02). Ours.
        router_inference: which router answers at test. "average": mean score over all routers. "prototype": the router
            of the task whose class mean is nearest to the un-prompted feature. "confidence": each router in turn, the
            most confident answer wins. "last": the newest. Ours.
        hdr: form of the routing penalty phi(H): "constant" (delta for the `history_top` most activated prompts; the
            paper's default), "log" delta * log(1 + H), "power" delta * H^alpha, or "none".
        delta: size of the routing penalty. Ours.
        alpha: exponent of the "power" form. Ours.
        history_top: size of the most-activated set A_t. Ours.
        hgm: form of the update factor psi(H): "constant" (beta for the same set; the paper's default), "reciprocal"
            1 / (1 + zeta H), "exponential" exp(-zeta H), or "none".
        beta: factor of the "constant" form, in (0, 1]. Ours.
        zeta: rate of the other two forms, and weight of `modulate="quadratic"`. Ours.
        modulate: what psi scales. "update": the step that was taken (exact under Adam, where a constant factor on a
            gradient cancels). "gradient": the gradient, as the text reads. "quadratic": adds the loss term
            zeta / 2 * sum_e H_e |theta_e - theta_e^t|^2 instead.
        history_decay: weight of a task's counts one task later; 1.0 is the paper's plain sum. Smaller values let prompts
            that were busy long ago come back. Ours.
    """

    method: str = "hash"
    pool_size: int = 20
    prompt_length: int = 10
    top_k: int = 4
    layers: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    share_layers: bool = False
    prompt_init: str = "uniform"
    prefix_space: str = "projected"
    router_init: str = "previous"
    router_inference: str = "average"
    hdr: str = "constant"
    delta: float = 0.1
    alpha: float = 0.5
    history_top: int = 4
    hgm: str = "constant"
    beta: float = 0.1
    zeta: float = 0.01
    modulate: str = "update"
    history_decay: float = 1.0

    papers: ClassVar[tuple[str, ...]] = ("https://arxiv.org/abs/2601.20894",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "pool_size", "prompt_length", "top_k", "history_top")
        _choice(self, "prompt_init", INITS)
        _choice(self, "prefix_space", ("projected", "input"))
        _choice(self, "router_init", ("previous", "normal"))
        _choice(self, "router_inference", ("average", "prototype", "confidence", "last"))
        _choice(self, "hdr", ("constant", "log", "power", "none"))
        _choice(self, "hgm", ("constant", "reciprocal", "exponential", "none"))
        _choice(self, "modulate", ("update", "gradient", "quadratic"))
        _not_negative(self, "delta", "alpha", "zeta", "beta", "history_decay")
        _flag(self, "share_layers")
        _check_top_k(self)
        _check_layers(self)
        if self.readout == "prompt":
            raise ValueError('readout="prompt" needs prompt tokens; hash has key/value prefixes: use "auto"')
        if self.prompt_length % 2:
            raise ValueError(f"prompt_length={self.prompt_length} cannot be split into keys and values: use an even number")
        if self.history_top > self.pool_size:
            raise ValueError(f"history_top={self.history_top} is larger than pool_size={self.pool_size}")
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta={self.beta} must lie in (0, 1]: 1 leaves updates as they are")
        if not 0 <= self.history_decay <= 1:
            raise ValueError(f"history_decay={self.history_decay} must lie in [0, 1]")

    @property
    def needs_optimizer(self) -> bool:  # type: ignore[override]
        """Whether training must call `attach_optimizer`: steps are scaled."""
        return self.hgm != "none" and self.modulate == "update"


def _choice(config: PromptPoolConfig, name: str, options: tuple[str, ...]) -> None:
    if getattr(config, name) not in options:
        raise ValueError(f"{name}={getattr(config, name)!r}: choose one of {list(options)}")


def _positive(config: PromptPoolConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or not 1 <= value < 2**63:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1 (and below 2**63)")


def _flag(config: PromptPoolConfig, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name}={getattr(config, name)!r} must be True or False")


def _kind(config: PromptPoolConfig, kind: type, called: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name}={value!r} must be {called} or None")


def _not_negative(config: PromptPoolConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
            raise ValueError(f"{name}={value!r} must be a finite number of at least 0")


def _positive_number(config: PromptPoolConfig, name: str) -> None:
    _not_negative(config, name)
    if getattr(config, name) == 0:
        raise ValueError(f"{name}=0 must be larger than 0")


def _check_top_k(config: Any) -> None:
    if config.top_k > config.pool_size:
        raise ValueError(f"top_k={config.top_k} is larger than pool_size={config.pool_size}: choose at most all prompts")


def _check_layers(config: Any) -> None:
    layers = config.layers
    if not isinstance(layers, (list, tuple)) or not layers or not all(type(i) is int and i >= 0 for i in layers):
        raise ValueError(f"layers={layers!r} must be a list of block numbers, counted from 0")
    if len(set(layers)) != len(layers):
        raise ValueError(f"layers={layers!r} names a block twice")
    config.layers = sorted(layers)
