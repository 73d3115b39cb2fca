"""Freed memory stays with a process that trains: shown by page faults, not by clocks."""

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from support.small_runs import small_trainer

from cl_prompts.continual import TrainerCallback
from cl_prompts.runtime.memory import CHOICES, freed_memory_kept


PAGES = 40 * 2**20 // 4096  # of a block that glibc gives back by itself


def faults() -> int:
    """Page faults of taking and filling such a block once more."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(PAGES * 4096, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Pages that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1])


class Look(TrainerCallback):
    """Takes such a block after every step."""

    def __init__(self) -> None:
        self.faults: list[int] = []

    def on_step_end(self, *_: object) -> None:
        self.faults.append(faults())


def told() -> dict[str, int]:
    """Faults outside, inside, in the steps of a training and after it; pages that were given back.

    Several times where there should be none: a small block may take a piece of the one that was freed, and the next is then
    taken beside it, once. Without the keeping every block faults.
    """
    found = {"outside": min(faults(), faults())}
    with freed_memory_kept():
        faults()
        found["inside"] = min(faults() for _ in range(3))
        before = resident()
    found["given back"] = before - resident()
    look = Look()
    small_trainer("l2p", tasks=1, callbacks=[look]).train()
    return found | {"training": int(median(look.faults[1:])), "after": faults()}


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
@pytest.mark.parametrize(
    "choice", ["", *(pytest.param(name, marks=pytest.mark.slow) for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"))]
)
def test_only_a_training_keeps_what_it_frees(choice: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in CHOICES}
    if choice:
        environment[choice] = "glibc.malloc.mmap_threshold=1048576" if choice == "GLIBC_TUNABLES" else "1048576"
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert min(found["outside"], found["after"]) >= 0.9 * PAGES  # a part may lie in pages that are there
    if choice:
        assert min(found["inside"], found["training"]) >= 0.9 * PAGES
    else:
        assert max(found["inside"], found["training"]) < PAGES / 10
        assert found["given back"] >= 0.9 * PAGES


if __name__ == "__main__":
    print(json.dumps(told()))
