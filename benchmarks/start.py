"""CPU seconds until the library is there: imports and commands, in processes of their own, beside `import torch`.

    python benchmarks/start.py --repeats 5

The least of the repeats is printed, since other processes only add.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

from cl_prompts.evaluation.report import machine


ADAPTER = str(Path(__file__).parents[1] / "tests" / "adapters_v1" / "hash")
LINES = {
    "pass": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import peft": ["-c", "import peft"],
    "import cl_prompts": ["-c", "import cl_prompts"],
    "from cl_prompts import PromptPoolModel": ["-c", "from cl_prompts import PromptPoolModel"],
    "cl-prompts --help": ["-m", "cl_prompts", "--help"],
    "cl-prompts --version": ["-m", "cl_prompts", "--version"],
    "cl-prompts inspect FOLDER": ["-m", "cl_prompts", "inspect", ADAPTER],
    "cl-prompts train --help": ["-m", "cl_prompts", "train", "--help"],
}


def cpu_seconds(line: list[str]) -> float:
    """CPU seconds of one process of Python."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *line], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    seconds = {name: min(cpu_seconds(line) for _ in range(args.repeats)) for name, line in LINES.items()}
    print(machine())
    print("| | CPU seconds | in units of `import torch` |\n|---|---:|---:|")
    for name, value in seconds.items():
        print(f"| `{name}` | {value:.2f} | {value / seconds['import torch']:.2f} |")


if __name__ == "__main__":
    main()
