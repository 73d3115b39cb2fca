"""Loading the base model of an adapter: the one that its config names, or the one in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import transformers
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModel, PreTrainedModel

from cl_prompts.methods import PromptPoolConfig
from cl_prompts.runtime.text import first_line, short_repr
from cl_prompts.sharing.base_building import build_base
from cl_prompts.sharing.base_files import find_base_files
from cl_prompts.sharing.image_processor import BASE_CONFIG, PROCESSOR_FILE
from cl_prompts.storage.adapter_files import AdapterFiles
from cl_prompts.storage.bounded_read import MAX_PROCESSOR_BYTES
from cl_prompts.storage.file_source import HUB_KEYWORDS, FileSource
from cl_prompts.storage.hub_errors import HubError


BASE_FOLDER = "base"  # of a base model that an adapter brings along


def load_base(
    config: PromptPoolConfig, files: AdapterFiles | None = None, /, *, max_bytes: int | None = None, **kwargs: Any
) -> PreTrainedModel:
    """The base model that an adapter's config names or, where it names none, the one in the adapter's folder `base/`.

    Of a base only `config.json`, safetensors and the image processor are fetched and read (`base_files`).

    Args:
        config: of the adapter.
        files: of the adapter; None: only the base that the config names is looked for.
        max_bytes: refuse a base with larger weights before they are fetched; None: no limit.
        kwargs: of transformers' `from_pretrained`.

    Raises:
        ValueError: no base is named, or one that only its author has, or it is damaged, too large, or no plain model of
            transformers.
        cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
    """
    hub = {name: kwargs.pop(name) for name in HUB_KEYWORDS if name in kwargs}
    kind, place = _base_class(config), base_place(config, files, hub)
    try:
        found = find_base_files(place, max_bytes)
        name = place.name
        if place.subfolder:  # brought along by an adapter of the Hub
            place.fetch(PROCESSOR_FILE, MAX_PROCESSOR_BYTES)
            name = str(found.folder)
        return build_base(kind, found, name, **_with_dtype(config, kwargs))
    except HubError:
        raise
    except Exception as error:  # the code of any model may fail in any way
        raise ValueError(
            f"the base {short_repr(place.name)} that the adapter names cannot be loaded ({first_line(error)}): load a base "
            "yourself, then PromptPoolModel.from_pretrained(base, adapter)"
        ) from error


def _with_dtype(config: PromptPoolConfig, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`kwargs` with the `dtype` of the base in the adapter's training, unless the caller has chosen another than "auto"."""
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype", "auto"))
    if dtype in (None, "auto"):
        dtype = config.state.base_dtype
    rest = {name: value for name, value in kwargs.items() if name not in ("dtype", "torch_dtype")}
    return rest if dtype is None else rest | {"dtype": dtype}


def base_place(config: PromptPoolConfig, files: AdapterFiles | None, hub: Mapping[str, Any]) -> FileSource:
    """Where the base of an adapter lies.

    Args:
        config: of the adapter.
        files: of the adapter; None: only the base that the config names is looked for.
        hub: `token`, `cache_dir` and the like, for the Hub.

    Raises:
        ValueError: no base is named, or one that only its author has.
        cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
    """
    source, of_hub = config.base_model_name_or_path, files is not None and files.repo_id is not None
    if source:
        if files is not None and files.repo_id is not None:
            _refuse_path(source, files.repo_id)
        folder = None if of_hub or not Path(source).exists() else Path(source)  # a stranger names no folder of this machine
        return FileSource(source, folder, "", config.revision, hub)
    included = None
    if files is not None and of_hub:
        included = replace(files.place, subfolder=str(PurePosixPath(files.place.subfolder, BASE_FOLDER)))
    elif files is not None:
        included = FileSource(str(files.folder / BASE_FOLDER), files.folder / BASE_FOLDER)
    if included is None or included.size(BASE_CONFIG) is None:
        place = "" if files is None else f" in {files.repo_id or files.folder}"
        raise ValueError(
            f"the adapter{place} names no base model: load the base yourself, then "
            "PromptPoolModel.from_pretrained(base, adapter)"
        )
    return included


def _refuse_path(source: str, repo_id: str) -> None:
    try:
        validate_repo_id(source)
    except ValueError as error:
        raise ValueError(
            f"the adapter {repo_id} names the base {short_repr(source)}, which is no Hub id: load the base yourself, then "
            "PromptPoolModel.from_pretrained(base, adapter)"
        ) from error


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
