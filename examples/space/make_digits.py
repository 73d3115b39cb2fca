"""Make the built-in pool of the page, a Hash adapter of the digits 0 to 7, and its sample pictures.

    python examples/space/make_digits.py

Digits 8 and 9 are left for the visitor to teach. The adapter learns four tasks of two digits on the micro ViT with
`examples/train_cil.py` and the recipe for the digits, seed 0, on the CPU. Needs the extra `train`; one to two minutes.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cl_prompts.runs.images import digits


HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent
KNOWN, TASKS = range(8), 4
FILES = ("adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json", "results.json")
TO_TEACH = 10  # pictures of a digit
ONE_THREAD = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}  # rounding of sums depends on the number of threads


def main() -> None:
    """Write `digits/` and `samples/`."""
    splits = digits()
    with tempfile.TemporaryDirectory() as room:
        data, output = Path(room, "digits-0-to-7"), Path(room, "run")
        for split, rows in splits.items():
            rows.filter(lambda row: row["label"] in KNOWN).to_parquet(str(data / f"{split}.parquet"))
        line = ["--dataset", str(data), "--tasks", str(TASKS), "--output_dir", str(output), "--save_steps", "0"]
        subprocess.run([sys.executable, str(EXAMPLES / "train_cil.py"), *line], check=True, env=os.environ | ONE_THREAD)
        take_over(output / "adapter", HERE / "digits")
    write_samples(splits, HERE / "samples")


def take_over(made: Path, folder: Path) -> None:
    """Copy an adapter's files, with no path of this machine in them, and write its card."""
    from cl_prompts.sharing.card import write_card

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in FILES:
        shutil.copyfile(made / name, folder / name)
    config = folder / "adapter_config.json"
    content = json.loads(config.read_text()) | {"base_model_name_or_path": None, "revision": None}
    config.write_text(json.dumps(content, indent=2, sort_keys=True))
    write_card(folder, name="digits-pool", license="apache-2.0")


def write_samples(splits: Any, folder: Path) -> None:
    """Write one test image of each digit, and training images of the digits that the adapter has not seen."""
    labels = {split: np.asarray(rows["label"]) for split, rows in splits.items()}
    for digit in range(10):
        place = folder / "digits" / f"digit-{digit}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        splits["test"][int(np.flatnonzero(labels["test"] == digit)[0])]["image"].save(place)
    for digit in set(range(10)) - set(KNOWN):
        for number, row in enumerate(np.flatnonzero(labels["train"] == digit)[:TO_TEACH].tolist()):
            place = folder / f"teach-{digit}" / f"{digit}-{number}.png"
            place.parent.mkdir(exist_ok=True)
            splits["train"][row]["image"].save(place)


if __name__ == "__main__":
    main()
