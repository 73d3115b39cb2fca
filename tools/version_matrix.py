"""Run part of the tests with other versions of the libraries below ours, and print a table.

    python tools/version_matrix.py                # all rows; some minutes each on two cores
    python tools/version_matrix.py oldest         # one row
    python tools/version_matrix.py --overlay oldest "transformers 5.24"   # as CI does, a minute or two each

Each row has a virtual environment of its own, in a folder that is removed afterwards, with the versions of constraints.txt
except for those that the row names. A row that cannot be installed is a row of the table, too. With
--overlay, the versions of a row are laid over this environment instead, and fewer tests are run.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/contract/test_peft_contract.py",
    "tests/backbones/test_backbones.py",
    "tests/methods/test_every_method.py",
    "tests/continual/test_iterable_streams.py",
    "tests/sharing/test_hub.py",
)
FEW = TESTS[:1]  # with --overlay
OLDEST = {
    "transformers": "5.10.4",
    "peft": "0.18.1",
    "accelerate": "1.10.1",
    "datasets": "4.4.2",
    "huggingface_hub": "1.31.0",
    "tokenizers": "0.22.2",
}
ROWS: dict[str, dict[str, str]] = {
    "pinned": {},
    "transformers 5.24": {"transformers": "5.24.0"},
    "transformers 5.22": {"transformers": "5.22.2"},
    "transformers 5.20": {"transformers": "5.20.2"},
    "transformers 5.17": {"transformers": "5.17.0", "huggingface_hub": "1.31.0"},
    "transformers 5.10": {"transformers": "5.10.4", "huggingface_hub": "1.31.0"},
    "peft 0.20": {"peft": "0.20.0"},
    "peft 0.18": {"peft": "0.18.1"},
    "torch 2.14": {"torch": "2.14.1"},  # 5.5 GB where only a build for CUDA is at hand
    "accelerate 1.10": {"accelerate": "1.10.1"},
    "huggingface_hub 1.31": {"huggingface_hub": "1.31.0"},
    "datasets 4.4": {"datasets": "4.4.2", "huggingface_hub": "1.31.0", "transformers": "5.17.0"},
    "oldest": OLDEST,
}
# Pins that follow from others; left to pip where a row names another version of something.
FOLLOWING = ("tokenizers", "huggingface_hub", "fsspec", "pyarrow", "gradio", "filelock")


def main() -> None:
    """Run the rows that are named and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help=f"default: all; {', '.join(ROWS)}")
    parser.add_argument("--overlay", action="store_true", help="lay the versions over this environment; fewer tests")
    options = parser.parse_args()
    names = options.rows or list(ROWS)
    unknown = sorted(set(names) - set(ROWS))
    if unknown:
        sys.exit(f"no rows {unknown}: choose among {', '.join(ROWS)}")
    print("| row | passed | failed |\n|---|---:|---:|")
    failed = []
    for name in names:
        passed, broken, said = (run_overlay if options.overlay else run_row)(ROWS[name])
        print(f"| {name} | {passed} | {broken} |", flush=True)
        if broken or not passed:
            failed.append(f"{name}:\n{said}")
    if failed:
        sys.exit("\n\n".join(failed))


def run_row(versions: dict[str, str]) -> tuple[int, int, str]:
    """Numbers of tests that passed and failed with these versions, and the end of what was printed."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder, "bin", "python"))
        constraints = Path(folder, "constraints.txt")
        constraints.write_text(constraints_of(versions))
        install = [python, "-m", "pip", "install", "-q", "-e", ".[test]", "-c", str(constraints)]
        installed = subprocess.run(install, cwd=ROOT, capture_output=True, text=True, check=False)
        if installed.returncode:
            return 0, 0, installed.stderr[-2000:]
        return run_tests(python, TESTS, {})


def run_overlay(versions: dict[str, str]) -> tuple[int, int, str]:
    """As `run_row`, with these versions and nothing else in front of this environment's, and fewer tests."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = [f"{name}=={version}" for name, version in versions.items()]
        install = [sys.executable, "-m", "pip", "install", "-q", "--target", folder]
        # huggingface_hub before 2 needs httpx, which this environment may lack.
        further = [[*install, "httpx"]] if versions.get("huggingface_hub", "2").startswith("1.") else []
        for line in [[*install, "--no-deps", *wanted], *further] if wanted else []:
            installed = subprocess.run(line, capture_output=True, text=True, check=False)
            if installed.returncode:
                return 0, 0, installed.stderr[-2000:]
        paths = [folder, str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        return run_tests(sys.executable, FEW, {"PYTHONPATH": os.pathsep.join(filter(None, paths))})


def run_tests(python: str, tests: Sequence[str], environment: dict[str, str]) -> tuple[int, int, str]:
    """Numbers of `tests` that passed and failed under an interpreter, and the end of what was printed."""
    command = [python, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", lines[-1] if lines else "")}
    summary = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-10:]
    return counts.get("passed", 0), counts.get("failed", 0) + counts.get("error", 0), "\n".join(summary)


def constraints_of(versions: dict[str, str]) -> str:
    """constraints.txt with the `versions` of a row, without pins that follow from them."""
    lines = []
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name = line.partition("==")[0]
        if name not in versions and not (versions and name in FOLLOWING):
            lines.append(line)
    return "\n".join([*lines, *(f"{name}=={version}" for name, version in versions.items())]) + "\n"


if __name__ == "__main__":
    main()
