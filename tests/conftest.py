"""Settings of all tests: a Hub of their own on this machine in place of the one on the internet."""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.chromium import launched, screenshot_folder
from support.hub_server import Hub


# Several workers share few cores; threads that wait for each other on tiny models made the suite four times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Scripts that tests start as processes of their own import `support`, too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))

RUNNING_HUB = pytest.StashKey[Hub]()


def pytest_configure(config: pytest.Config) -> None:
    """Start the Hub and point the libraries at it: one in each process that runs tests, none in xdist's controller."""
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return
    if "huggingface_hub" in sys.modules:
        raise pytest.UsageError("huggingface_hub was imported before tests/conftest.py: it would talk to the real Hub")
    home = tempfile.TemporaryDirectory(prefix="cl-prompts-hf-", ignore_cleanup_errors=True)
    config.add_cleanup(home.cleanup)
    config.stash[RUNNING_HUB] = hub = Hub()
    config.add_cleanup(hub.close)
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_"))]:
        del os.environ[name]
    os.environ |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": home.name,
        "HF_TOKEN": hub.token,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1",
    }


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before `-m` chooses: rows that take turns."""
    from support.turns import mark_turns  # imports the library, which must not happen before the Hub runs

    mark_turns(items)


def pytest_collection_finish() -> None:
    """Spare each garbage collection the libraries' objects: the trainers collect after every task, for half a second."""
    gc.freeze()


@pytest.fixture(autouse=True)
def any_precision() -> Iterator[None]:
    """A process is made for one precision: a test that asked for another gives it back to the tests after it."""
    yield
    if "accelerate.state" in sys.modules:  # which must not be imported before the Hub runs
        from accelerate.state import AcceleratorState

        if AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
            AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def running_hub(pytestconfig: pytest.Config) -> Hub:
    """The Hub as it stands: for fixtures of a whole module, which call `empty()` themselves."""
    return pytestconfig.stash[RUNNING_HUB]


@pytest.fixture
def hub(running_hub: Hub) -> Iterator[Hub]:
    """The Hub, empty, with the client's cache empty too."""
    running_hub.empty()
    shutil.rmtree(Path(os.environ["HF_HOME"]) / "hub", ignore_errors=True)
    yield running_hub
    assert not running_hub.errors, "\n".join(running_hub.errors)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The browser of the tests marked `browser`."""
    yield from launched()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of their screenshots."""
    return screenshot_folder(tmp_path_factory)
