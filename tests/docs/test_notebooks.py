"""The notebooks run from top to bottom in a new kernel, warn of nothing, and show what their code gives.

Needs the extra `notebooks`; the command is in CONTRIBUTING.md. Each executed notebook is written beside its copy, and an
error names it: if its outputs are the right ones, copy it over the old file.
"""

import json
import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from support.hub_server import Hub
from support.paths import EXAMPLES


pytestmark = pytest.mark.notebooks

NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
MAX_BYTES = 200_000
# Other processors round otherwise, and trainings drift apart: points of accuracy, or a share of larger numbers.
POINTS, SHARE = 10, 0.05


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def execute(notebook: Path, room: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The notebook with new outputs, run in a copy of the examples; a cell that fails is an error that shows it."""
    import nbformat
    from nbclient import NotebookClient
    from traitlets.config import Config

    monkeypatch.setenv("IPYTHONDIR", str(room / "ipython"))
    folder = shutil.copytree(EXAMPLES, room / "examples") / "notebooks"
    content = nbformat.read(notebook, as_version=4)
    nbformat.validate(content)
    resources = {"metadata": {"path": str(folder)}}
    # Kernels that start at the same time may choose the same TCP ports. Names of Unix sockets must be short.
    with tempfile.TemporaryDirectory() as sockets:
        config = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}})
        client = NotebookClient(content, config=config, timeout=300, coalesce_streams=True, resources=resources)
        client.execute()
    for cell in code_cells(content):
        cell["metadata"].pop("execution", None)  # clock times
    executed = room / notebook.name
    nbformat.write(content, executed)
    return executed


def texts(cell: Any) -> list[str]:
    """A cell's outputs without their pixels: what is printed, and of anything else its kinds and its Markdown."""
    found = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            found.append(f"{output['name']}: {''.join(output['text'])}")
        else:
            data = output.get("data", {})
            found.append(f"{output['output_type']} {sorted(data)}: {''.join(data.get('text/markdown', ''))}")
    return found


def alike(shown: str, now: str) -> bool:
    """Whether two texts have the same words, and numbers that are close."""
    if NUMBER.sub("#", shown) != NUMBER.sub("#", now):
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(now), strict=True)
    numbers = [[float(text.replace(",", "")) for text in pair] for pair in pairs]
    return all(math.isclose(a, b, rel_tol=SHARE, abs_tol=POINTS) for a, b in numbers)


@every_notebook
def test_it_shows_what_its_code_gives(notebook: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executed = execute(notebook, tmp_path, monkeypatch)
    shown, now = (code_cells(json.loads(path.read_text())) for path in (notebook, executed))
    for number, (old, new) in enumerate(zip(shown, now, strict=True), start=1):
        where = f"code cell {number}; all of it as it is now: {executed}"
        for text in texts(new):
            assert not text.startswith("stderr"), f"{text}\n{where}"
        assert old["execution_count"] == number, f"the stored outputs are not of one run from top to bottom: {where}"
        before, after = texts(old), texts(new)
        if "varies" in old["metadata"].get("tags", []):  # words that hang on a number
            before, after = ([text.split(":")[0] for text in side] for side in (before, after))
        assert len(before) == len(after), where
        for one, other in zip(before, after, strict=True):
            assert alike(one, other), f"stored: {one}\nnow: {other}\n{where}"


@every_notebook
def test_it_is_small(notebook: Path) -> None:
    assert notebook.stat().st_size < MAX_BYTES


def test_without_a_token_nothing_is_sent(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    executed = execute(EXAMPLES / "notebooks" / "sharing_and_loading.ipynb", tmp_path, monkeypatch)
    assert "no token: saved in a folder" in executed.read_text()
    assert hub.log == []
