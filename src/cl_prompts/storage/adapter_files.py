"""An adapter's files, found and read once per load: a local folder, or one commit of a Hub repository.

PEFT fetches file by file: config and weights may come from two commits, and where there are no safetensors it takes a
pickle. Here all files are of one commit, and a pickle is not asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias, TypeVar

from cl_prompts.runtime.arguments import refuse_unknown
from cl_prompts.storage.bounded_read import MAX_CONFIG_BYTES
from cl_prompts.storage.declared import CONFIG_FILE, WEIGHTS_FILE, Declared, declared_tensors, read_config_file
from cl_prompts.storage.file_source import HUB_KEYWORDS, FileSource
from cl_prompts.storage.staging import ATTEMPTS, finish_interrupted_save, versions


T = TypeVar("T")
# All arguments that are passed on by a load: those of the Hub, and PEFT's.
PEFT_KEYWORDS = ("autocast_adapter_dtype", "low_cpu_mem_usage", "torch_device", "key_mapping", "device_map", "max_memory")
LOAD_KEYWORDS = (*HUB_KEYWORDS, "subfolder", *PEFT_KEYWORDS, "offload_folder", "offload_dir", "offload_index")


@dataclass(frozen=True)
class AdapterFiles:
    """The files of one adapter, as `find_adapter` found them.

    Args:
        source: folder or Hub id as the caller gave it.
        folder: the local folder that holds config and weights.
        config: the content of `adapter_config.json`.
        tensors: what the header of `adapter_model.safetensors` declares, by name.
        found: versions of config and weights when they were read, see `staging.versions`.
        place: where its further files are fetched from: `folder`, or the same commit of the Hub repository.
    """

    source: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Declared]
    found: tuple[tuple[int, int] | None, ...]
    place: FileSource

    @property
    def repo_id(self) -> str | None:
        """The Hub repository; None for a local folder."""
        return self.source if self.place.folder is None else None

    def further_file(self, name: str, max_bytes: int = MAX_CONFIG_BYTES) -> Path | None:
        """One more file of the adapter, like `results.json`, of the same commit; None if it has none.

        Raises:
            ValueError: it is larger than `max_bytes`, or no regular file.
            cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
        """
        return self.place.fetch(name, max_bytes)

    def were_replaced(self) -> bool:
        """Whether a save has replaced config or weights since they were read."""
        return versions(_pair(self.folder)) != self.found


AdapterSource: TypeAlias = str | os.PathLike[str] | AdapterFiles


def find_adapter(
    source: AdapterSource, subfolder: str | None = None, *, max_bytes: int | None = None, **hub: Any
) -> AdapterFiles:
    """Find an adapter and read its config and the header of its weights, checked as far as that goes without a base.

    Args:
        source: a folder, or a Hub id like "name/pool". Files that were found before are returned as they are.
        subfolder: folder of the adapter in it.
        max_bytes: refuse larger weights before they are downloaded; None: no limit.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, as in `hf_hub_download`.

    Raises:
        TypeError: `source` is no path and no Hub id, or an argument is unknown.
        ValueError: there is no adapter, or it is truncated, foreign, a pickle, or too large.
        cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
    """
    refuse_unknown("find_adapter", hub, HUB_KEYWORDS)
    if isinstance(source, AdapterFiles):
        return source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"the adapter is a {type(source).__name__}: name its folder, or its Hub id")
    folder = Path(source, subfolder or "")
    finish_interrupted_save(folder)
    if folder.exists():
        return _read(os.fspath(source), folder)
    parts = PurePosixPath(subfolder or "").parts
    if ".." in parts or "/" in parts[:1]:
        raise ValueError(f"subfolder={subfolder!r} leaves the repository: name a folder inside it")
    # A path is never looked for on the Hub.
    if os.path.isabs(source) or os.fspath(source).startswith(".") or isinstance(source, Path):
        raise ValueError(f"{source} does not exist: name a folder written by `save_pretrained`, or a Hub id")
    keywords = {name: value for name, value in hub.items() if name != "revision"}
    place = FileSource(os.fspath(source), None, "/".join(parts), hub.get("revision"), keywords)
    folder, place = _fetch(place, max_bytes)
    return replace(_read(place.name, folder), place=place)


def load_with_retry(files: AdapterFiles, load: Callable[[AdapterFiles], T]) -> T:
    """What `load(files)` returns; tried again with the new files if it fails because a save has replaced them meanwhile."""
    for _ in range(ATTEMPTS - 1):
        try:
            return load(files)
        except (ValueError, OSError, RuntimeError):
            if files.repo_id is not None or not files.were_replaced():
                raise
            files = _read(files.source, files.folder)
    return load(files)


def _read(source: str, folder: Path) -> AdapterFiles:
    """The adapter in a local folder.

    Raises:
        ValueError: a file is missing, truncated, foreign, or a pickle.
    """
    finish_interrupted_save(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: name the folder that holds {CONFIG_FILE}")
    found, place = versions(_pair(folder)), FileSource(source, folder)
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"no {CONFIG_FILE} in {folder}: name a folder written by `save_pretrained`")
    config = read_config_file(folder / CONFIG_FILE)
    if not (folder / WEIGHTS_FILE).is_file():
        if (folder / "adapter_model.bin").exists():
            raise ValueError(f"{folder} holds adapter_model.bin, a pickle, which is never loaded: save as {WEIGHTS_FILE}")
        raise ValueError(f"no {WEIGHTS_FILE} in {folder}: name a folder written by `save_pretrained`")
    return AdapterFiles(source, folder, config, declared_tensors(folder / WEIGHTS_FILE), found, place)


def _pair(folder: Path) -> tuple[Path, Path]:
    return folder / CONFIG_FILE, folder / WEIGHTS_FILE


def _fetch(place: FileSource, max_bytes: int | None) -> tuple[Path, FileSource]:
    """Download config and weights of one commit; the folder in the cache that holds them, and the source at that commit."""
    named = PurePosixPath(place.name, place.subfolder)
    config = place.fetch(CONFIG_FILE, MAX_CONFIG_BYTES)
    if config is None:
        raise ValueError(f"no {CONFIG_FILE} in {named} on the Hub: is it an adapter of cl_prompts?")
    place = place.at_commit_of(config)
    if place.fetch(WEIGHTS_FILE, max_bytes) is None:
        raise ValueError(
            f"no {WEIGHTS_FILE} in {named} on the Hub (a pickle is never loaded): is it an adapter of cl_prompts?"
        )
    return config.parent, place
