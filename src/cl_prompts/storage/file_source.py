"""Files fetched by name from where an adapter or a base lies: a local folder, or one revision of a Hub repository.

The Hub's client is imported where the Hub is asked: a local folder needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from cl_prompts.storage.bounded_read import check_bounded, too_large


# Arguments of `hf_hub_download` that users pass to our `from_pretrained`.
HUB_KEYWORDS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


@dataclass(frozen=True)
class FileSource:
    """A local folder, or a folder of a Hub repository at one revision.

    Args:
        name: the folder, or the Hub id, as the caller gave it.
        folder: the local folder; None: the files are on the Hub.
        subfolder: folder in the Hub repository, without ".."; "": the repository itself.
        revision: branch, tag or commit; None: the main branch.
        hub: further arguments of `hf_hub_download`.
    """

    name: str
    folder: Path | None = None
    subfolder: str = ""
    revision: str | None = None
    hub: Mapping[str, Any] = field(default_factory=dict)

    def path(self, name: str) -> str:
        """The place of a file, for messages."""
        return str(self.folder / name if self.folder is not None else PurePosixPath(self.name, self.subfolder, name))

    def size(self, name: str) -> int | None:
        """Bytes of a file, which is not fetched; None if there is none.

        Raises:
            ValueError: it is no regular file.
            cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
        """
        if self.folder is not None:
            path = self.folder / name
            return check_bounded(path, None) if path.exists() else None
        from huggingface_hub import DryRunFileInfo, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        from cl_prompts.storage.hub_errors import explain_hub_errors

        with explain_hub_errors(self.name, self.revision):
            try:
                file: DryRunFileInfo = hf_hub_download(**self._arguments(name), dry_run=True)
                return file.file_size or 0
            except EntryNotFoundError as error:
                if isinstance(error, FileNotFoundError):  # not in the cache, and the Hub cannot be asked
                    raise
                return None

    def fetch(self, name: str, max_bytes: int | None) -> Path | None:
        """The local path of a file; None if there is none. Its size is checked before it is downloaded.

        Raises:
            ValueError: it is no regular file, or larger than `max_bytes` (None: any size).
            cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
        """
        size = self.size(name)
        if size is None:
            return None
        if max_bytes is not None and size > max_bytes:
            raise too_large(self.path(name), size, max_bytes)
        if self.folder is not None:
            return self.folder / name
        from huggingface_hub import hf_hub_download

        from cl_prompts.storage.hub_errors import explain_hub_errors

        with explain_hub_errors(self.name, self.revision):
            # Asked for by the name of its branch, so that the cache knows the commit of that branch when offline.
            return Path(hf_hub_download(**self._arguments(name)))

    def at_commit_of(self, path: Path) -> FileSource:
        """The same source, pinned to the commit that a fetched file is of."""
        if self.folder is not None:
            return self
        # The cache keeps a commit's files in a folder of its name.
        commit = path.parents[len(PurePosixPath(self.subfolder).parts)].name
        return replace(self, revision=commit)

    def _arguments(self, name: str) -> dict[str, Any]:
        known = {"repo_id": self.name, "filename": name, "subfolder": self.subfolder or None}
        return {**self.hub, **known, "revision": self.revision}
