"""The base model that an adapter stands on: the one it brings along, or the one it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from cl_prompts.methods import PromptPoolConfig
from cl_prompts.runtime.text import first_line, shown
from cl_prompts.storage.adapter_files import WHERE
from cl_prompts.storage.hub_errors import HubError, explained


BASE_FOLDER = "base"  # of a base model that an adapter brings along
MAX_BLOCKS = 1000


def load_base(config: PromptPoolConfig, folder: Path, repo_id: str | None, **kwargs: Any) -> PreTrainedModel:
    """The base model of an adapter: the one it brings along in `base/`, else the one that its config names.

    Args:
        config: of the adapter.
        folder: where its files are.
        repo_id: the Hub repository they came from; None if they are the user's own.
        kwargs: of transformers' `from_pretrained`.

    Raises:
        ValueError: no base is named, or one that only its author has.
        cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
    """
    source, revision = config.base_model_name_or_path, config.revision
    if not source:
        source, revision = str(_included_base(folder, repo_id, kwargs)), None
    elif repo_id is not None:
        _refuse_path(source, repo_id)
    where = {name: kwargs[name] for name in WHERE if name in kwargs} | {"revision": revision or "main"}
    kind, safe = _base_class(config), {"trust_remote_code": False, "use_safetensors": True}
    try:
        with explained(source, revision):
            _check_base_config(kind, AutoConfig.from_pretrained(source, trust_remote_code=False, **where))
            model: PreTrainedModel = kind.from_pretrained(source, **where | safe | kwargs)
    except HubError:
        raise
    except Exception as error:  # a stranger's base goes into all kinds of code
        raise ValueError(
            f"the base {shown(source)} that the adapter names cannot be loaded ({first_line(error)}): load a base "
            "yourself, then PromptPoolModel.from_pretrained(base, adapter)"
        ) from error
    return model


def built_bytes(config: PromptPoolConfig, source: str, **where: Any) -> int:
    """Memory that the base of an adapter takes, as its config describes it: transformers builds that much, whatever the
    weights hold.

    Args:
        config: of the adapter; names the base's class.
        source: folder or Hub id of the base.
        where: `revision`, `subfolder`, `token` and the like, for the Hub.

    Raises:
        ValueError: there is no such model.
        cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
    """
    kind = _base_class(config)
    try:
        with explained(source, where.get("revision")):
            base = AutoConfig.from_pretrained(source, trust_remote_code=False, **where)
            _check_base_config(kind, base)
            if kind is not AutoModel and not isinstance(base, kind.config_class):  # a part of it
                base = kind.config_class.from_pretrained(source, **where)
            with torch.device("meta"):
                model: PreTrainedModel = (kind.from_config if kind is AutoModel else kind._from_config)(base)
    except HubError:
        raise
    except Exception as error:  # as in `load_base`
        raise ValueError(
            f"the base {shown(source)} that the adapter names cannot be built ({first_line(error)})"
        ) from error
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _included_base(folder: Path, repo_id: str | None, kwargs: dict[str, Any]) -> Path:
    base = folder / BASE_FOLDER
    if repo_id is not None:
        where = {name: kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in kwargs}
        wanted = [f"{BASE_FOLDER}/*.json", f"{BASE_FOLDER}/*.safetensors"]
        with explained(repo_id):
            snapshot_download(repo_id, revision=folder.name, allow_patterns=wanted, **where)
    if not (base / "config.json").is_file():
        raise ValueError(
            f"the adapter in {repo_id or folder} names no base model: load the base yourself, then "
            "PromptPoolModel.from_pretrained(base, adapter)"
        )
    return base


def _refuse_path(source: str, repo_id: str) -> None:
    try:
        validate_repo_id(source)
    except ValueError as error:
        raise ValueError(
            f"the adapter {repo_id} names the base {shown(source)}, which is no Hub id: load the base yourself, then "
            "PromptPoolModel.from_pretrained(base, adapter)"
        ) from error


def _check_base_config(kind: Any, base: PretrainedConfig) -> None:
    """Raise ValueError for a base that transformers would build, at length, before it looked at the weights, or with code
    from the Hub.
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
            raise ValueError(f"its config asks for the attention {shown(attention)} from the Hub")


def _base_class(config: PromptPoolConfig) -> Any:
    name = (config.auto_mapping or {}).get("base_model_class")
    if name is None:
        return AutoModel
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"the adapter names the base class {shown(name)}, which transformers does not have: load the base yourself, "
            "then PromptPoolModel.from_pretrained(base, adapter)"
        )
    return found
