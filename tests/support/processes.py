"""Processes of tests: forked from a server that has imported the library once, since importing it takes seconds."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


multiprocessing.set_forkserver_preload(["datasets", "cl_prompts.baselines", "cl_prompts.continual", "support.small_runs"])


def in_two_processes(function: Callable[..., object], *arguments: Any) -> None:
    """Call `function(rank, *arguments)` in two new processes of one thread each; an error in one of them is raised."""
    torch.multiprocessing.start_processes(function, arguments, nprocs=2, start_method="forkserver")


def in_a_new_process(function: Callable[..., object], *arguments: Any) -> None:
    """Call `function(*arguments)` in a process that has none of this one's objects; an error in it is raised."""
    torch.multiprocessing.start_processes(_without_rank, (function, *arguments), nprocs=1, start_method="forkserver")


def _without_rank(rank: int, function: Callable[..., object], *arguments: Any) -> None:
    function(*arguments)


def script(path: Path, *line: str, log: Path) -> multiprocessing.process.BaseProcess:
    """`python path *line` in a process that has just been started; what it prints goes to the file `log`."""
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=(path, line, log, dict(os.environ)))
    process.start()
    return process


def _run(path: Path, line: tuple[str, ...], log: Path, environment: dict[str, str]) -> None:
    import runpy

    os.environ |= environment
    with log.open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.argv = [str(path), *line]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def become(rank: int, port: int) -> None:
    """Make this process that `rank` of two; the first trainer, or init_process_group, joins them."""
    torch.set_num_threads(1)
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
