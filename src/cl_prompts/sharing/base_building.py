"""Building a base model from its files in memory: transformers gets a config and tensors, and no folder or Hub id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel

from cl_prompts.runtime.text import short_repr
from cl_prompts.sharing.base_files import BaseFiles
from cl_prompts.sharing.image_processor import TIMM_MARK
from cl_prompts.storage.declared import Declared


CALLS = 20_000  # of torch, for a model without tensors; a block of a vision transformer needs about 100
CALLS_PER_TENSOR = 200
SPARE_NUMBERS = 2**20
# Arguments of `from_pretrained` that would make transformers read other files, or run code of a repository.
OTHER_FILES = (
    "adapter_kwargs",
    "code_revision",
    "config",
    "gguf_file",
    "state_dict",
    "subfolder",
    "variant",
    "weights_only",
)


def build_base(kind: Any, files: BaseFiles, name: str, /, **kwargs: Any) -> PreTrainedModel:
    """The base model that a config and safetensors files describe.

    Args:
        kind: class of the model, or `AutoModel`.
        files: of the base.
        name: `name_or_path` of the model.
        kwargs: of transformers' `from_pretrained`, like `dtype` or `attn_implementation`.

    Raises:
        ValueError: the class is not made for the config, the weights do not fit it, or an argument names other files.
    """
    wrong = sorted({*OTHER_FILES, "trust_remote_code", "use_safetensors"} & kwargs.keys())
    if wrong:
        raise ValueError(f"{wrong} cannot be given here: load the base with transformers, and pass the model")
    config, rest = _config_of(kind, files.config, kwargs)
    described = _on_meta(kind, config, len(files.tensors))
    _check_tensors(described, files.tensors)
    tensors = {key: tensor for file in files.weights for key, tensor in load_file(file).items()}
    model: PreTrainedModel = type(described).from_pretrained(None, config=config, state_dict=tensors, **rest)
    model.config.name_or_path = model.name_or_path = name
    return model


def _config_of(kind: Any, content: Mapping[str, Any], kwargs: Mapping[str, Any]) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The config of `kind`, a part of a larger one where its class is that of a part; arguments that are none of it."""
    content, model_type = dict(content), content.get("model_type")
    if model_type is None and TIMM_MARK in content:
        model_type = "timm_wrapper"
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers has no model type `{short_repr(model_type)[1:-1]}`; custom code is never run")
    made_for = CONFIG_MAPPING[model_type]
    if kind is not AutoModel:
        if kind.config_class not in (made_for, *made_for.sub_configs.values()):
            raise ValueError(f"its class {kind.__name__} is not made for a {made_for.__name__}")
        if kind.config_class is not made_for:
            content = content.get(kind.config_class.base_config_key) or {}
            made_for = kind.config_class
    config, rest = made_for.from_dict(content, return_unused_kwargs=True, **kwargs)
    # `from_dict` takes these over, and `from_pretrained` needs them too.
    return config, rest | {key: kwargs[key] for key in ("dtype", "attn_implementation") if key in kwargs}


class _BoundedCalls(TorchFunctionMode):
    """Raises ValueError after a number of calls of torch, in this thread: a config must not make a model without end."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = self.left = limit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"its config describes a model of more than {self.limit:,} steps, far more than its weights")
        return func(*args, **(kwargs or {}))


def _on_meta(kind: Any, config: PretrainedConfig, tensors: int) -> PreTrainedModel:
    """The model without memory for its tensors."""
    with torch.device("meta"), _BoundedCalls(CALLS + CALLS_PER_TENSOR * tensors):
        model: PreTrainedModel = (kind.from_config if kind is AutoModel else kind._from_config)(config)
    return model


def _check_tensors(model: PreTrainedModel, declared: Mapping[str, Declared]) -> None:
    """Raise ValueError if a tensor of the weights has another shape than the config implies, or most tensors are missing.

    transformers allocates what is missing, of whatever size the config asks for.
    """
    prefix = f"{model.base_model_prefix}."
    needed: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in needed.items():
        for saved in (name, f"{prefix}{name}", name.removeprefix(prefix)):
            if saved in declared and declared[saved].shape != tuple(tensor.shape):
                raise ValueError(
                    f"{short_repr(saved)} has shape {short_repr(list(declared[saved].shape))} in its weights, its config "
                    f"implies {short_repr(list(tensor.shape))}"
                )
    implied = sum(tensor.numel() for tensor in needed.values())
    held = sum(torch.Size(tensor.shape).numel() for tensor in declared.values())
    if implied > 2 * held + SPARE_NUMBERS:
        raise ValueError(f"its config describes a model of {implied:,} numbers, its weights hold {held:,}")
