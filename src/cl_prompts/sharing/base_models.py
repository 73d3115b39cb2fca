"""Loading the base model of an adapter: the one that its config names, or the one in its folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from cl_prompts.methods import PromptPoolConfig
from cl_prompts.runtime.text import first_line, short_repr
from cl_prompts.storage.adapter_files import HUB_KEYWORDS, AdapterFiles
from cl_prompts.storage.hub_errors import HubError, explain_hub_errors


BASE_FOLDER = "base"  # of a base model that an adapter brings along
MAX_BLOCKS = 1000


def load_base(config: PromptPoolConfig, files: AdapterFiles | None = None, **kwargs: Any) -> PreTrainedModel:
    """The base model that an adapter's config names or, where it names none, the one in the adapter's folder `base/`.

    Args:
        config: of the adapter.
        files: of the adapter; None: only the base that the config names is looked for.
        kwargs: of transformers' `from_pretrained`.

    Raises:
        ValueError: no base is named, or one that only its author has.
        cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
    """
    source, revision = config.base_model_name_or_path, config.revision
    if not source:
        source, revision = str(_included_base(files, kwargs)), None
    elif files is not None and files.repo_id is not None:
        _refuse_path(source, files.repo_id)
    hub = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs} | {"revision": revision or "main"}
    kind, safe = _base_class(config), {"trust_remote_code": False, "use_safetensors": True}
    try:
        with explain_hub_errors(source, revision):
            _check_base_config(kind, AutoConfig.from_pretrained(source, trust_remote_code=False, **hub))
            model: PreTrainedModel = kind.from_pretrained(
                source, **hub | safe | _dtype_of_training(config, kwargs) | kwargs
            )
    except HubError:
        raise
    except Exception as error:  # the code of any model may fail in any way
        raise ValueError(
            f"the base {short_repr(source)} that the adapter names cannot be loaded ({first_line(error)}): load a base "
            "yourself, then PromptPoolModel.from_pretrained(base, adapter)"
        ) from error
    return model


def _dtype_of_training(config: PromptPoolConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The `dtype` of the base in the adapter's training, unless the caller has chosen one or the adapter knows none."""
    dtype = config.state.base_dtype
    return {} if dtype is None or {"dtype", "torch_dtype"} & set(kwargs) else {"dtype": dtype}


def built_bytes(config: PromptPoolConfig, source: str, **hub: Any) -> int:
    """Bytes of the model that transformers builds from the config of an adapter's base, before it reads any weights.

    Args:
        config: of the adapter; names the base's class.
        source: folder or Hub id of the base.
        hub: `revision`, `subfolder`, `token` and the like, for the Hub.

    Raises:
        ValueError: there is no such model.
        cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
    """
    kind = _base_class(config)
    try:
        with explain_hub_errors(source, hub.get("revision")):
            base = AutoConfig.from_pretrained(source, trust_remote_code=False, **hub)
            _check_base_config(kind, base)
            if kind is not AutoModel and not isinstance(base, kind.config_class):  # a part of it
                base = kind.config_class.from_pretrained(source, **hub)
            with torch.device("meta"):
                model: PreTrainedModel = (kind.from_config if kind is AutoModel else kind._from_config)(base)
    except HubError:
        raise
    except Exception as error:  # as in `load_base`
        raise ValueError(
            f"the base {short_repr(source)} that the adapter names cannot be built ({first_line(error)})"
        ) from error
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _included_base(files: AdapterFiles | None, kwargs: dict[str, Any]) -> Path:
    base = files.folder / BASE_FOLDER if files is not None else None
    if files is not None and files.repo_id is not None:
        hub = {name: kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in kwargs}
        inside = PurePosixPath(files.subfolder or "", BASE_FOLDER)
        wanted = [f"{inside}/*.json", f"{inside}/*.safetensors"]
        with explain_hub_errors(files.repo_id):
            snapshot_download(files.repo_id, revision=files.commit, allow_patterns=wanted, **hub)
    if base is None or not (base / "config.json").is_file():
        place = "" if files is None else f" in {files.repo_id or files.folder}"
        raise ValueError(
            f"the adapter{place} names no base model: load the base yourself, then "
            "PromptPoolModel.from_pretrained(base, adapter)"
        )
    return base


def _refuse_path(source: str, repo_id: str) -> None:
    try:
        validate_repo_id(source)
    except ValueError as error:
        raise ValueError(
            f"the adapter {repo_id} names the base {short_repr(source)}, which is no Hub id: load the base yourself, then "
            "PromptPoolModel.from_pretrained(base, adapter)"
        ) from error


def _check_base_config(kind: Any, base: PretrainedConfig) -> None:
    """Raise ValueError for a base that is huge, of another class than its adapter says, or needs code from the Hub.

    transformers builds the model before it looks at the weights.
    """
    parts = (base, *(getattr(base, name, None) for name in type(base).sub_configs))
    if kind is not AutoModel and kind.config_class not in map(type, parts):
        raise ValueError(f"its class {kind.__name__} is not made for a {type(base).__name__}")
    for part in parts:
        blocks = getattr(part, "num_hidden_layers", None)
        if isinstance(blocks, int) and blocks > MAX_BLOCKS:
            raise ValueError(f"its config has {blocks:,} blocks, more than {MAX_BLOCKS:,}")
        attention = getattr(part, "_attn_implementation", None)
        if isinstance(attention, str) and "/" in attention:  # code of a repository
            raise ValueError(f"its config asks for the attention {short_repr(attention)} from the Hub")


def _base_class(config: PromptPoolConfig) -> Any:
    name = (config.auto_mapping or {}).get("base_model_class")
    if name is None:
        return AutoModel
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"the adapter names the base class {short_repr(name)}, which transformers does not have: load the base "
            "yourself, then PromptPoolModel.from_pretrained(base, adapter)"
        )
    return found
