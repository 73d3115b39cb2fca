"""The base model that an adapter names, and the adapter on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModel, PreTrainedModel

from cl_prompts.configs import PromptPoolConfig
from cl_prompts.fetch import WHERE, adapter_folder
from cl_prompts.hub_errors import explained
from cl_prompts.model import PromptPoolModel


BASE_FOLDER = "base"  # of a base model that an adapter brings along


class AutoPromptPoolModel:
    """`AutoPromptPoolModel.from_pretrained(adapter)` loads the base model named in the adapter, then the adapter."""

    def __init__(self) -> None:
        raise TypeError("AutoPromptPoolModel is not made, it makes: call AutoPromptPoolModel.from_pretrained(adapter)")

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        strict_base: bool = False,
        verify: bool = True,
        max_adapter_bytes: int | None = None,
        **kwargs: Any,
    ) -> PromptPoolModel:
        """Load an adapter and its base.

        Only model classes of transformers itself are built, from safetensors; no code of a repository is run.

        Args:
            model_id: folder or Hub id of the adapter.
            adapter_name, is_trainable, strict_base, verify, max_adapter_bytes: see `PromptPoolModel.from_pretrained`.
            kwargs: `revision`, `subfolder` of the adapter; `token`, `cache_dir`, `local_files_only` of both; the rest, like
                `dtype` or `attn_implementation`, goes to the base's `from_pretrained`.

        Raises:
            ValueError: the adapter is damaged, or names no base that can be loaded here.
            cl_prompts.hub_errors.HubError: the Hub cannot be reached or refuses.
        """
        where = {name: kwargs.pop(name) for name in WHERE if name in kwargs}
        subfolder = kwargs.pop("subfolder", None)
        limit = max_adapter_bytes or PromptPoolConfig.max_adapter_bytes
        folder = adapter_folder(model_id, subfolder, max_bytes=limit, **where)
        config = PromptPoolConfig.from_pretrained(folder)
        shared = {name: where[name] for name in ("token", "cache_dir", "local_files_only") if name in where}
        remote = not Path(model_id, subfolder or "").exists()
        base = load_base(config, folder, os.fspath(model_id) if remote else None, **shared, **kwargs)
        return PromptPoolModel.from_pretrained(
            base,
            folder,
            adapter_name,
            is_trainable,
            strict_base=strict_base,
            verify=verify,
            max_adapter_bytes=max_adapter_bytes,
        )


def load_base(config: PromptPoolConfig, folder: Path, repo_id: str | None, **kwargs: Any) -> PreTrainedModel:
    """The base model of an adapter: the one it brings along in `base/`, else the one that its config names.

    Args:
        config: of the adapter.
        folder: where its files are.
        repo_id: the Hub repository they came from; None if they are the user's own.
        kwargs: of transformers' `from_pretrained`.

    Raises:
        ValueError: no base is named, or one that only its author has.
        cl_prompts.hub_errors.HubError: the Hub cannot be reached or refuses.
    """
    source, revision = config.base_model_name_or_path, config.revision
    if not source:
        source, revision = str(_included_base(folder, repo_id, kwargs)), None
    elif repo_id is not None:
        _refuse_path(source, repo_id)
    safe = {"trust_remote_code": False, "use_safetensors": True}
    with explained(source, revision):
        model: PreTrainedModel = _base_class(config).from_pretrained(source, revision=revision or "main", **safe | kwargs)
    return model


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
            f"the adapter {repo_id} names the base {source!r}, which is no Hub id: load the base yourself, then "
            "PromptPoolModel.from_pretrained(base, adapter)"
        ) from error


def _base_class(config: PromptPoolConfig) -> Any:
    name = (config.auto_mapping or {}).get("base_model_class")
    if name is None:
        return AutoModel
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"the adapter names the base class {name!r}, which transformers does not have: load the base yourself, then "
            "PromptPoolModel.from_pretrained(base, adapter)"
        )
    return found
