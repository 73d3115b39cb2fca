"""What the test Hub keeps of a repository: its commits, branches and pull requests, and its large files."""

import base64
import hashlib
import itertools
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any


# Part of a commit's id: the client caches what it knows of a commit for ever, so no two may be alike in one session.
_COMMIT_NUMBERS = itertools.count()


class Refusal(Exception):
    """An error answer. The client picks its exception by `code` (X-Error-Code), else by `status`."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


def git_id(content: bytes) -> str:
    """Git's name of a blob: the ETag of a file that is not in LFS."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit; `lfs` says whether git holds it or a pointer to it."""

    content: bytes
    lfs: bool = False

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {len(self.content)}\n".encode()

    @cached_property
    def oid(self) -> str:
        """What tells two contents apart, and the ETag: sha256 of a large file, git's id of another."""
        return hashlib.sha256(self.content).hexdigest() if self.lfs else git_id(self.content)

    @cached_property
    def blob_id(self) -> str:
        return git_id(self.pointer) if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """One state of all files of a repository, by path."""

    files: dict[str, StoredFile]
    title: str = "initial commit"
    description: str = ""
    parent: "Commit | None" = None
    date: datetime = field(default_factory=lambda: datetime.now(UTC))
    number: int = field(default_factory=lambda: next(_COMMIT_NUMBERS))

    @cached_property
    def id(self) -> str:
        content = [(path, file.oid) for path, file in sorted(self.files.items())]
        return hashlib.sha1(repr((self.number, self.title, content)).encode()).hexdigest()

    def history(self) -> "list[Commit]":
        """This commit and those before it, newest first."""
        return [self, *(self.parent.history() if self.parent else [])]


class Repo:
    """A model repository, with a first commit as the Hub makes it."""

    def __init__(self, repo_id: str, private: bool = False) -> None:
        self.id, self.private, self.gated = repo_id, private, False
        self.large: dict[str, bytes] = {}  # sha256 -> content, uploaded whole; a commit may name it
        self.announced: dict[str, int] = {}  # sha256 -> size, promised by the client before it uploads
        self.parts: dict[str, dict[int, bytes]] = {}  # sha256 -> part number -> content
        first = Commit({".gitattributes": StoredFile(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")})
        self.refs = {"main": first}  # branches by name, pull requests as refs/pr/1
        self.commits = {first.id: first}

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def at(self, revision: str) -> Commit:
        """The commit of a branch, pull request or commit id."""
        commit = self.refs.get(revision) or self.commits.get(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content, for tests to look at."""
        return {path: file.content for path, file in self.at(revision).files.items()}

    def commit(self, revision: str, operations: list[dict[str, Any]], as_pull_request: bool) -> tuple[Commit, str]:
        """Apply all lines of the client's payload, header first, or none; returns the commit and the ref that holds it."""
        if revision not in self.refs:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        header, wanted = operations[0]["value"], operations[0]["value"].get("parentCommit")
        parent = self.at(wanted) if wanted and as_pull_request else self.refs[revision]
        if wanted and not parent.id.startswith(wanted):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations[1:]:
            self._apply(files, operation["key"], operation["value"])
        commit = Commit(files, header["summary"], header["description"], parent)
        ref = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in self.refs)}" if as_pull_request else revision
        self.refs[ref] = self.commits[commit.id] = commit
        return commit, ref

    def _apply(self, files: dict[str, StoredFile], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = StoredFile(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.large:
                raise Refusal(400, f"LFS pointer pointed to a file that does not exist. Offending file: - {path}")
            files[path] = StoredFile(self.large[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [path] if key == "deletedFile" else [name for name in files if name.startswith(f"{path.rstrip('/')}/")]
            if not gone or any(name not in files for name in gone):
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise Refusal(400, f"unknown operation {key!r}")

    def store_large(self, oid: str, content: bytes) -> None:
        """Keep an uploaded large file, if it is the one that was announced."""
        if hashlib.sha256(content).hexdigest() != oid or len(content) != self.announced.get(oid):
            raise Refusal(400, "the content is not the one that was announced: XAmzContentSHA256Mismatch")
        self.large[oid] = content
        self.parts.pop(oid, None)
