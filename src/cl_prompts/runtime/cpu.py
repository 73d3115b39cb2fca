"""The name of the CPU."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """Name of the CPU: from /proc/cpuinfo, else `platform.processor()`, else the architecture."""
    cpus = Path("/proc/cpuinfo")
    if cpus.is_file():
        names = [line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
