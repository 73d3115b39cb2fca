"""Bare models of timm as bases: in transformers' wrapper for them, which runs the same module.

A bare model's forward takes `x`, and it has no config to save. The wrapper has both.
"""

from __future__ import annotations

import weakref
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cl_prompts.backbones.structure import find_structure


# One wrapper for each bare model, as long as it is used: the hooks on a base belong to one model.
_WRAPPER = "_cl_wrapper"
_WRAPPERS: WeakKeyDictionary[nn.Module, weakref.ref[PreTrainedModel]] = WeakKeyDictionary()
_LOCK = Lock()
_MADE_HERE = "_cl_made_of_bare"


def wrapped_if_bare(model: nn.Module) -> nn.Module:
    """A bare vision transformer of timm in transformers' wrapper, without a copy; any other model as it is.

    With a classifier, the wrapper is a `TimmWrapperForImageClassification`, whose logits are what the bare model returns;
    otherwise a `TimmWrapperModel`, whose `pooler_output` is.

    Raises:
        TypeError: it is no vision transformer.
    """
    if isinstance(model, PreTrainedModel) or not _has_methods_of_timm(model):
        return model
    with _LOCK:
        known = _WRAPPERS.get(model)
        wrapper: PreTrainedModel | None = vars(model).get(_WRAPPER) or (known() if known is not None else None)
        if wrapper is None:
            find_structure(model)  # its error names the model, not the wrapper
            wrapper = _wrap(model)
            _WRAPPERS[model] = weakref.ref(wrapper)
        return wrapper


def given_base(model: nn.Module) -> nn.Module:
    """The model that `wrapped_if_bare` was given."""
    bare: nn.Module = model.timm_model if vars(model).get(_MADE_HERE) else model  # type: ignore[assignment]
    return bare


class HeldWrapper:
    """Until `remove`, a bare model keeps its wrapper among its attributes, but not as a submodule.

    The hooks on the blocks of both belong to the wrapper, so that it must live as long as the bare model. A copy of the
    bare model has a wrapper of its own. For other models nothing is done.

    Args:
        model: the base model, maybe a wrapper made here.
    """

    def __init__(self, model: nn.Module) -> None:
        self.bare = given_base(model)
        if self.bare is not model:
            vars(self.bare)[_WRAPPER] = model

    def remove(self) -> None:
        """Let the bare model forget its wrapper."""
        vars(self.bare).pop(_WRAPPER, None)


def _has_methods_of_timm(model: nn.Module) -> bool:
    return all(callable(getattr(type(model), name, None)) for name in ("forward_features", "forward_head", "forward"))


def _wrap(model: Any) -> PreTrainedModel:
    from transformers import TimmWrapperForImageClassification, TimmWrapperModel  # deferred: imports timm and torchvision

    labels = getattr(model, "num_classes", 0)
    # From a checkpoint without a classifier, transformers makes no classifier.
    has_head = bool(labels) and (getattr(model, "pretrained_cfg", None) or {}).get("num_classes") != 0
    kind: Any = TimmWrapperForImageClassification if has_head else TimmWrapperModel
    wrapper = kind.__new__(kind)  # its __init__ would make a new model of timm
    PreTrainedModel.__init__(wrapper, _config_of(model, labels))
    wrapper.timm_model = nn.Identity()
    wrapper.features_only, wrapper.num_labels = False, labels
    wrapper.post_init()  # would initialize the weights of the model
    wrapper.timm_model = model
    wrapper.supports_gradient_checkpointing = hasattr(model, "set_grad_checkpointing")
    setattr(wrapper, _MADE_HERE, True)
    wrapper.training = model.training
    return wrapper


def _config_of(model: Any, labels: int) -> PreTrainedConfig:
    """The config with which transformers makes such a model.

    It is named by the Hub id of timm's weights if the model has their shapes and is not new. Arguments other than the size
    of images cannot be read off a model: its config then does not describe it.
    """
    from transformers import TimmWrapperConfig  # deferred: imports timm

    declared = dict(getattr(model, "pretrained_cfg", None) or {})
    architecture = declared.get("architecture")
    config = TimmWrapperConfig(
        num_labels=labels, architecture=architecture or type(model).__name__, pretrained_cfg=declared
    )
    if architecture and not _has_shapes(model, architecture, {}):
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        if size and _has_shapes(model, architecture, {"img_size": size}):
            config.model_args = {"img_size": list(size)}
            declared["input_size"] = (3, *size)  # for timm's image processor
        return config
    hub_id = declared.get("hf_hub_id")
    if architecture and isinstance(hub_id, str) and not declared.get("hf_hub_filename") and _was_trained(model):
        config.name_or_path = hub_id
    return config


def _has_shapes(model: nn.Module, architecture: str, arguments: dict[str, Any]) -> bool:
    """Whether timm makes a model of these shapes; layers of PEFT inside `model` do not count."""
    import timm  # deferred: a model with an architecture was made by it

    if not timm.is_model(architecture):
        return False
    try:
        with torch.device("meta"):
            made = timm.create_model(architecture, num_classes=getattr(model, "num_classes", 0), **arguments)
    except Exception:  # the code of any model may fail in any way
        return False
    same = find_structure(model).shape == find_structure(made).shape
    return same and _shapes(made).items() <= _shapes(model).items()


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name.replace(".base_layer.", "."): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _was_trained(model: nn.Module) -> bool:
    """Whether a norm has another bias or, without biases, another weight than that of a new model."""
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    for name, new in (("bias", 0), ("weight", 1)):
        found = [t for t in (getattr(norm, name, None) for norm in norms) if isinstance(t, torch.Tensor) and not t.is_meta]
        if found:
            return any(bool((tensor != new).any()) for tensor in found)
    return False
