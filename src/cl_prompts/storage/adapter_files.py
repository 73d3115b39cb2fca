"""Where an adapter's files are: a local folder as it is, or one commit of a Hub repository in the client's cache.

PEFT fetches file by file: config and weights may come from two commits, and where there are no safetensors it takes a
pickle. Here both files are of one commit, and nothing but them is asked for.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from huggingface_hub import DryRunFileInfo, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from cl_prompts.storage.atomic import recover
from cl_prompts.storage.hub_errors import explained
from cl_prompts.storage.integrity import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE, check_adapter_files


# Names of arguments that say where on the Hub; PEFT passes them on among others.
WHERE = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def adapter_folder(
    source: str | os.PathLike[str], subfolder: str | None = None, *, max_bytes: int | None = None, **where: Any
) -> Path:
    """The local folder of an adapter, checked as far as files can be without a base model.

    Args:
        source: a folder, or a Hub id like "name/pool".
        subfolder: folder of the adapter in it.
        max_bytes: refuse larger weights before they are downloaded; None: no limit.
        where: for the Hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, as in `hf_hub_download`.

    Returns:
        The folder that holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ValueError: there is no adapter, or it is truncated, foreign, a pickle, or too large.
        cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
    """
    folder = Path(source, subfolder or "")
    recover(folder)
    if not folder.exists():
        parts = PurePosixPath(subfolder or "").parts
        if ".." in parts or "/" in parts[:1]:
            raise ValueError(f"subfolder={subfolder!r} leaves the repository: name a folder inside it")
        # Somebody who names a path means a path, and no question about it should reach the Hub.
        if os.path.isabs(source) or os.fspath(source).startswith(".") or isinstance(source, Path):
            raise ValueError(f"{source} does not exist: name a folder written by `save_pretrained`, or a Hub id")
        folder = _fetch(os.fspath(source), "/".join(parts) or None, max_bytes, where)
    check_adapter_files(folder)
    return folder


def commit_of(source: str | os.PathLike[str], folder: Path, subfolder: str | None = None) -> str | None:
    """The commit that `adapter_folder` found a folder in, for further files of the same one; None for a local folder."""
    if Path(source).exists():
        return None
    # The cache keeps a commit's files under its name.
    return (folder / CONFIG_FILE).parents[len(PurePosixPath(subfolder or "").parts)].name


def further_file(
    source: str | os.PathLike[str],
    name: str,
    subfolder: str | None = None,
    *,
    max_bytes: int = MAX_CONFIG_BYTES,
    **where: Any,
) -> Path | None:
    """One more file of an adapter, like `results.json`; None if it has none.

    Args:
        source, subfolder, where: as in `adapter_folder`.
        name: of the file.
        max_bytes: refuse a larger one.

    Raises:
        ValueError: it is too large.
        cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
    """
    if not Path(source).exists():
        with explained(os.fspath(source), where.get("revision")):
            return _file(os.fspath(source), name, subfolder, max_bytes, where)
    path = Path(source, subfolder or "", name)
    if not path.is_file():
        return None
    _refuse_large(path, path.stat().st_size, max_bytes)
    return path


def _fetch(repo_id: str, subfolder: str | None, max_bytes: int | None, where: dict[str, Any]) -> Path:
    with explained(repo_id, where.get("revision")):
        for name, limit in ((CONFIG_FILE, MAX_CONFIG_BYTES), (WEIGHTS_FILE, max_bytes)):
            path = _file(repo_id, name, subfolder, limit, where)
            if path is None:
                found = " (a pickle is never loaded)" if name == WEIGHTS_FILE else ""
                whole = PurePosixPath(repo_id, subfolder or "")
                raise ValueError(f"no {name} in {whole} on the Hub{found}: is it an adapter of cl_prompts?")
            folder = path.parent
            where = where | {"revision": commit_of(repo_id, folder, subfolder)}
    return folder


def _file(repo_id: str, name: str, subfolder: str | None, max_bytes: int | None, where: dict[str, Any]) -> Path | None:
    ask = {"filename": name, "subfolder": subfolder, **where}
    try:
        told: DryRunFileInfo = hf_hub_download(repo_id, dry_run=True, **ask)
        _refuse_large(PurePosixPath(repo_id, subfolder or "", name), told.file_size or 0, max_bytes)
        # Asked for by the name of its branch, so that the cache knows the commit of that branch when offline.
        return Path(hf_hub_download(repo_id, **ask))
    except EntryNotFoundError as error:
        if isinstance(error, FileNotFoundError):  # not in the cache, and nobody to ask
            raise
        return None


def _refuse_large(path: PurePath, size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        mend = "raise max_adapter_bytes if you trust it" if path.name == WEIGHTS_FILE else "it cannot be what it is called"
        raise ValueError(f"{path} has {size:,} bytes, more than the limit of {max_bytes:,}: {mend}")
