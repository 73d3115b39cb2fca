"""A Hub on this machine for tests: the real huggingface_hub client talks to it over HTTP.

What it keeps stands in hub_storage.py, what it answers in hub_reads.py and hub_writes.py: what huggingface_hub 2.4,
transformers 5.23 and peft 0.21 ask of model repositories. Here are the connection and the faults that a test sets.
"""

import re
import sys
import threading
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from support import hub_reads, hub_writes
from support.hub_routing import Answer, Caller, Request, Store
from support.hub_storage import Refusal, Repo


@dataclass
class Fault:
    """What happens to requests whose "METHOD /path" has the pattern in it; `times` None: to every one."""

    kind: str
    pattern: str
    value: Any
    times: int | None


@dataclass
class Faults:
    """The faults that are still to happen."""

    waiting: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)  # ends the waits of slow answers

    def take(self, kind: str, line: str) -> Any:
        """The value of the first fault of this kind for this request, and one time less of it; None without one."""
        with self.lock:
            for fault in self.waiting:
                if fault.kind == kind and fault.times != 0 and re.search(fault.pattern, line):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault.value
        return None


class Hub:
    """The server, with a known user, and a stranger with an account. `empty` makes it a new one under the same address."""

    user, token, read_token = "me", "hf_write_token_of_me", "hf_read_token_of_me"
    stranger, stranger_token = "stranger", "hf_write_token_of_the_stranger"

    def __init__(self) -> None:
        self._server = _Server(("127.0.0.1", 0), _Connection)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.faults = Faults()
        self.empty()
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True, name="hub").start()

    def empty(self) -> None:
        """Forget all repositories, faults and requests."""
        self.faults.over.set()
        self.faults, self.store, self.lock = Faults(), Store(self.url), threading.Lock()
        self.log: list[tuple[str, str]] = []  # method and path of each request, as they came
        self.errors: list[str] = []  # tracebacks of errors in the server itself

    @property
    def repos(self) -> dict[str, Repo]:
        """All repositories by id."""
        return self.store.repos

    def fail(self, pattern: str, status: int = 503, times: int | None = 1) -> None:
        """Answer requests like `pattern` with an error status, `times` times."""
        self.faults.waiting.append(Fault("fail", pattern, status, times))

    def cut(self, pattern: str, after_bytes: int, times: int | None = 1) -> None:
        """Close the connection after so many bytes of a download's or an upload's content. HEAD is left alone.

        An upload that is no longer than that is carried out, and its answer lost.
        """
        self.faults.waiting.append(Fault("cut", pattern, after_bytes, times))

    def slow(self, pattern: str, seconds: float, times: int | None = None) -> None:
        """Wait before the answer."""
        self.faults.waiting.append(Fault("slow", pattern, seconds, times))

    def caller(self, authorization: str | None) -> Caller:
        """Who holds the token; 401 for one that nobody holds, whatever is asked with it."""
        known = {
            self.token: Caller(self.user, True),
            self.read_token: Caller(self.user, False),
            self.stranger_token: Caller(self.stranger, True),
        }
        if authorization is None:
            return Caller()
        if authorization.removeprefix("Bearer ") not in known:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return known[authorization.removeprefix("Bearer ")]

    def close(self) -> None:
        self.faults.over.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that the client has dropped is no error of the server's."""
        if not isinstance(sys.exception(), ConnectionError):
            self.hub.errors.append(traceback.format_exc())


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: the second would wait 40 ms for the first's receipt
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def handle_call(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.log.append((self.command, path))
        line = f"{self.command} {path}"
        cut = hub.faults.take("cut", line) if self.command != "HEAD" else None
        body = self._body(cut)
        self.close_connection = self.close_connection or cut is not None
        if body is None:
            return
        hub.faults.over.wait(hub.faults.take("slow", line) or 0)
        found = self._answer(hub, body, hub.faults.take("fail", line))
        if cut is not None and self.command != "GET":
            return
        content = found.body()
        self.send_response(found.status)
        for name, value in found.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/octet-stream" if found.data is content else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_call

    def _answer(self, hub: Hub, body: bytes, failure: int | None) -> Answer:
        url = urlsplit(self.path)
        try:
            if failure is not None:
                raise Refusal(failure, f"the test wants {failure} here")
            caller = hub.caller(self.headers["Authorization"])
            function = hub_reads.routes.find(self.command, url.path) or hub_writes.routes.find(self.command, url.path)
            if function is None:
                other_kind = re.match("(/api)?/(datasets|spaces|kernels)/", url.path)
                message = f"the test Hub has nothing at {self.command} {url.path}"
                raise Refusal(404, message, "RepoNotFound" if other_kind else None)
            with hub.lock:
                return function(Request(hub.store, caller, self.headers, dict(parse_qsl(url.query)), body))
        except Refusal as refusal:
            one_line = " ".join(refusal.message.encode("ascii", "backslashreplace").decode().split())
            headers = {"X-Error-Message": one_line} | refusal.headers
            headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
            return Answer({"error": refusal.message}, refusal.status, headers)
        except Exception:
            hub.errors.append(traceback.format_exc())
            return Answer({"error": "an error of the test Hub itself"}, 500)

    def _body(self, limit: int | None) -> bytes | None:
        """The request's content; None if it is longer than `limit` bytes, of which no more are read."""
        if self.headers["Transfer-Encoding"] != "chunked":
            size = int(self.headers["Content-Length"] or 0)
            body = self._read(size if limit is None else min(size, limit))
            return body if len(body) == size else None
        body = b""
        while size := int(self.rfile.readline() or b"0", 16):
            body += self._read(size + 2)[:size]
            if limit is not None and len(body) > limit:
                return None
        self._read(2)
        return body

    def _read(self, size: int) -> bytes:
        content = self.rfile.read(size)
        if len(content) < size:
            raise ConnectionError("the client went away in the middle of its request")
        return content
