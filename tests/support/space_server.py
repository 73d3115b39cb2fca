"""The page of examples/space as a process of its own, and visitors that talk to it as the browser does, without one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.utils import httpx


def served(app: Path, temporary: Path, **environment: str) -> Iterator[str]:
    """The application in a process of its own, at a free port; stopped at the end, when no file of it may be left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    temporary.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GRADIO")}
    kept |= {
        "GRADIO_SERVER_PORT": str(port),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(temporary),
        "PYTHONPATH": "",
    } | environment
    log = temporary.with_suffix(".log")
    with log.open("w") as said:
        process = subprocess.Popen([sys.executable, str(app)], env=kept, stdout=said, stderr=said)
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()
                try:
                    httpx.get(url, timeout=5)
                    break
                except httpx.HTTPError:
                    time.sleep(0.2)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)
    assert "Traceback" not in log.read_text(), log.read_text()
    left = [path for path in temporary.rglob("*") if path.is_file()]
    assert not left, left


class Caller:
    """A visitor: sends the page's events, and gets the new values of its elements.

    Args:
        url: of the page.
    """

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=f"{url}/gradio_api", timeout=600)
        self.session = uuid.uuid4().hex
        config = httpx.get(f"{url}/config", timeout=60).json()
        self.names = {c["id"]: c["props"].get("elem_id") or str(c["id"]) for c in config["components"]}
        self.events = {self._name(event): event for event in config["dependencies"]}
        self.call("load")

    def _name(self, event: dict[str, Any]) -> str:
        (number, kind), *_ = event["targets"]
        return "load" if kind == "load" else self.names[number]

    def call(self, name: str, *values: Any) -> dict[str, Any]:
        """The elements of the page that an event changes, by name.

        Args:
            name: `elem_id` of the element that is clicked or filled, or "load".
            values: of the event's inputs behind the visit.
        """
        event = self.events[name]
        data = ([None, *values] if event["inputs"] else [])[: len(event["inputs"])]
        body = {"data": data, "fn_index": event["id"], "session_hash": self.session, "trigger_id": event["targets"][0][0]}
        self.http.post("/queue/join", json=body).raise_for_status()
        with self.http.stream("GET", "/queue/data", params={"session_hash": self.session}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    values = message["output"]["data"]
                    return {self.names[n]: v for n, v in zip(event["outputs"], values, strict=True)}
        raise AssertionError("the page gave no answer")

    def upload(self, name: str, paths: Sequence[Path]) -> dict[str, Any]:
        """The elements that change when files are dropped on a zone."""
        files = [("files", (path.name, path.read_bytes())) for path in paths]
        sent = self.http.post("/upload", files=files).raise_for_status().json()
        values = [
            {"path": place, "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}
            for place, path in zip(sent, paths, strict=True)
        ]
        return self.call(name, values)
