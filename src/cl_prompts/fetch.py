"""Where an adapter's files are: a local folder as it is, or one commit of a Hub repository in the client's cache.

PEFT fetches file by file: config and weights may come from two commits, and where there are no safetensors it takes a
pickle. Here both files are of one commit, and nothing but them is asked for.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import DryRunFileInfo, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from cl_prompts.hub_errors import explained
from cl_prompts.integrity import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE, check_adapter_files
from cl_prompts.saving import recover


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
        cl_prompts.hub_errors.HubError: the Hub cannot be reached or refuses.
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


def _fetch(repo_id: str, subfolder: str | None, max_bytes: int | None, where: dict[str, Any]) -> Path:
    revision = where.get("revision")
    with explained(repo_id, revision):
        config = _file(repo_id, CONFIG_FILE, subfolder, MAX_CONFIG_BYTES, where)
        folder = config.parent
        commit = config.parents[len(PurePosixPath(subfolder or "").parts)].name
        _file(repo_id, WEIGHTS_FILE, subfolder, max_bytes, where | {"revision": commit})
    return folder


def _file(repo_id: str, name: str, subfolder: str | None, max_bytes: int | None, where: dict[str, Any]) -> Path:
    whole = f"{repo_id}{'/' + subfolder if subfolder else ''}"
    try:
        ask = {"filename": name, "subfolder": subfolder, **where}
        told: DryRunFileInfo = hf_hub_download(repo_id, dry_run=True, **ask)
        if max_bytes is not None and (told.file_size or 0) > max_bytes:
            raise ValueError(
                f"{name} of {whole} has {told.file_size:,} bytes, more than the limit of {max_bytes:,}: raise "
                "max_adapter_bytes if you trust it"
            )
        return Path(hf_hub_download(repo_id, **ask | {"revision": told.commit_hash}))
    except EntryNotFoundError as error:
        if isinstance(error, FileNotFoundError):  # not in the cache, and nobody to ask
            raise
        found = " (a pickle is never loaded)" if name == WEIGHTS_FILE else ""
        raise ValueError(f"no {name} in {whole} on the Hub{found}: is it an adapter of cl_prompts?") from error
