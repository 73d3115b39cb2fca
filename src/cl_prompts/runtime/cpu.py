"""The name of the CPU, and its cores."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cores() -> int:
    """Number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def processor() -> str:
    """Name of the CPU: from /proc/cpuinfo, else `platform.processor()`, else the architecture."""
    cpus = Path("/proc/cpuinfo")
    if cpus.is_file():
        names = [line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
