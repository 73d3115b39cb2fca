"""How a call to the test Hub finds its answer, and who may ask for what.

Error answers carry X-Error-Code and X-Error-Message as the Hub's do. The client takes some 401 answers for "no such
repository" by a URL that begins with https; over http the same answers name the code themselves.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from typing import Any, NamedTuple
from urllib.parse import unquote

from support.hub_storage import Refusal, Repo


class Caller(NamedTuple):
    """Who asks; without a token nobody does."""

    name: str | None = None
    may_write: bool = False


@dataclass
class Store:
    """What the Hub keeps, and two settings."""

    url: str
    repos: dict[str, Repo] = field(default_factory=dict)
    lfs_threshold: int = 10 * 1024 * 1024  # bytes beyond which a text file is a large file too
    part_size: int | None = None  # bytes; given, large files come in parts of this size


@dataclass
class Request:
    """One call, with its body read."""

    store: Store
    caller: Caller
    headers: Message
    query: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def readable(self, repo_id: str) -> Repo:
        """The repository, if the caller may know of it."""
        repo = self.store.repos.get(repo_id)
        if repo is not None and (not repo.private or repo.owner == self.caller.name):
            return repo
        if self.caller.name is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        raise Refusal(404, "Repository not found", "RepoNotFound")

    def writable(self, repo_id: str, revision: str | None = "main") -> Repo:
        """The repository, if the caller may change this revision of it; None stands for a new pull request."""
        repo = self.readable(repo_id)
        if self.caller.name is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if not self.caller.may_write:
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        if repo.owner != self.caller.name and revision is not None and not revision.startswith("refs/pr/"):
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo


@dataclass
class Answer:
    """What goes back; data other than bytes goes as JSON."""

    data: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        return self.data if isinstance(self.data, bytes) else json.dumps(self.data).encode()


Route = Callable[..., Answer]
PLACES = {"repo": "[^/]+(?:/[^/]+)?", "revision": r"refs/pr/\d+|[^/]+", "path": ".+", "oid": "[0-9a-f]{64}", "part": r"\d+"}


class Routes:
    """Functions by the method and the path they answer."""

    def __init__(self) -> None:
        self._routes: list[tuple[str, re.Pattern[str], Route]] = []

    def on(self, method: str, template: str) -> Callable[[Route], Route]:
        """Register a function for paths like the template; it gets the request and, by name, the parts in braces."""
        pattern = re.sub(r"{(\w+)}", lambda place: f"(?P<{place[1]}>{PLACES[place[1]]})", template.replace(".", r"\."))

        def register(function: Route) -> Route:
            self._routes.append((method, re.compile(pattern), function))
            return function

        return register

    def find(self, method: str, path: str) -> Callable[[Request], Answer] | None:
        """The function for a path that is still quoted (a revision may have a slash in it). HEAD asks what GET asks."""
        for asked, pattern, function in self._routes:
            if asked == ("GET" if method == "HEAD" else method) and (found := pattern.fullmatch(path)):
                places = {name: unquote(part) for name, part in found.groupdict().items()}
                return lambda request, function=function, places=places: function(request, **places)
        return None
