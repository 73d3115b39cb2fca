"""An adapter's files, found and read once per load: a local folder, or one commit of a Hub repository.

PEFT fetches file by file: config and weights may come from two commits, and where there are no safetensors it takes a
pickle. Here all files are of one commit, and a pickle is not asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeAlias, TypeVar

from huggingface_hub import DryRunFileInfo, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from cl_prompts.storage.hub_errors import explain_hub_errors
from cl_prompts.storage.integrity import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    Declared,
    declared_tensors,
    read_config_file,
)
from cl_prompts.storage.staging import ATTEMPTS, finish_interrupted_save, versions


T = TypeVar("T")
# Arguments of `hf_hub_download` that users pass to our `from_pretrained`.
HUB_KEYWORDS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# All that are passed on by a load: those, and PEFT's.
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
        subfolder: folder of the adapter in the Hub repository.
        commit: of the Hub repository; None for a local folder.
        hub: arguments of `hf_hub_download` but the revision.
    """

    source: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Declared]
    found: tuple[tuple[int, int] | None, ...]
    subfolder: str | None = None
    commit: str | None = None
    hub: Mapping[str, Any] = field(default_factory=dict)

    @property
    def repo_id(self) -> str | None:
        """The Hub repository; None for a local folder."""
        return self.source if self.commit is not None else None

    def further_file(self, name: str, max_bytes: int = MAX_CONFIG_BYTES) -> Path | None:
        """One more file of the adapter, like `results.json`, of the same commit; None if it has none.

        Raises:
            ValueError: it is larger than `max_bytes`.
            cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
        """
        if self.commit is not None:
            with explain_hub_errors(self.source, self.commit):
                keywords = {**self.hub, "revision": self.commit}
                return _download(self.source, name, self.subfolder, max_bytes, keywords)
        path = self.folder / name
        if not path.is_file():
            return None
        _refuse_large(path, path.stat().st_size, max_bytes)
        return path

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
        TypeError: `source` is no path and no Hub id.
        ValueError: there is no adapter, or it is truncated, foreign, a pickle, or too large.
        cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
    """
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
    repo_id, inside = os.fspath(source), "/".join(parts) or None
    folder, commit = _fetch(repo_id, inside, max_bytes, hub)
    keywords = {name: value for name, value in hub.items() if name != "revision"}
    return replace(_read(repo_id, folder), subfolder=inside, commit=commit, hub=keywords)


def load_with_retry(files: AdapterFiles, load: Callable[[AdapterFiles], T]) -> T:
    """What `load(files)` returns; tried again with the new files if it fails because a save has replaced them meanwhile."""
    for _ in range(ATTEMPTS - 1):
        try:
            return load(files)
        except (ValueError, OSError, RuntimeError):
            if files.commit is not None or not files.were_replaced():
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
    found = versions(_pair(folder))
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"no {CONFIG_FILE} in {folder}: name a folder written by `save_pretrained`")
    config = read_config_file(folder / CONFIG_FILE)
    if not (folder / WEIGHTS_FILE).is_file():
        if (folder / "adapter_model.bin").exists():
            raise ValueError(f"{folder} holds adapter_model.bin, a pickle, which is never loaded: save as {WEIGHTS_FILE}")
        raise ValueError(f"no {WEIGHTS_FILE} in {folder}: name a folder written by `save_pretrained`")
    return AdapterFiles(source, folder, config, declared_tensors(folder / WEIGHTS_FILE), found)


def _pair(folder: Path) -> tuple[Path, Path]:
    return folder / CONFIG_FILE, folder / WEIGHTS_FILE


def _fetch(repo_id: str, subfolder: str | None, max_bytes: int | None, hub: dict[str, Any]) -> tuple[Path, str]:
    """Download config and weights of one commit; the folder in the cache that holds them, and the commit."""
    place = PurePosixPath(repo_id, subfolder or "")
    with explain_hub_errors(repo_id, hub.get("revision")):
        config = _download(repo_id, CONFIG_FILE, subfolder, MAX_CONFIG_BYTES, hub)
        if config is None:
            raise ValueError(f"no {CONFIG_FILE} in {place} on the Hub: is it an adapter of cl_prompts?")
        # The cache keeps a commit's files in a folder of its name.
        commit = config.parents[len(PurePosixPath(subfolder or "").parts)].name
        if _download(repo_id, WEIGHTS_FILE, subfolder, max_bytes, hub | {"revision": commit}) is None:
            raise ValueError(
                f"no {WEIGHTS_FILE} in {place} on the Hub (a pickle is never loaded): is it an adapter of cl_prompts?"
            )
    return config.parent, commit


def _download(repo_id: str, name: str, subfolder: str | None, max_bytes: int | None, hub: Mapping[str, Any]) -> Path | None:
    keywords = {"filename": name, "subfolder": subfolder, **hub}
    try:
        file: DryRunFileInfo = hf_hub_download(repo_id, dry_run=True, **keywords)
        _refuse_large(PurePosixPath(repo_id, subfolder or "", name), file.file_size or 0, max_bytes)
        # Asked for by the name of its branch, so that the cache knows the commit of that branch when offline.
        return Path(hf_hub_download(repo_id, **keywords))
    except EntryNotFoundError as error:
        if isinstance(error, FileNotFoundError):  # not in the cache, and the Hub cannot be asked
            raise
        return None


def _refuse_large(path: PurePath, size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        mend = (
            "raise max_adapter_bytes if you trust it" if path.name == WEIGHTS_FILE else "the file is not what its name says"
        )
        raise ValueError(f"{path} has {size:,} bytes, more than the limit of {max_bytes:,}: {mend}")
