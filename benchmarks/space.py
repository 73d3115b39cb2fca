"""Speed of prediction and of teaching a class on the page examples/space, and accuracies after teaching.

    python benchmarks/space.py                      # the embedded default
    python benchmarks/space.py --adapter DIR        # another adapter for the digits 0 to 7 on the micro ViT

Times are of the functions that the page calls, without the browser: median and largest of the repetitions. Accuracies are
on all test images of scikit-learn's digits: those of the digits 0 to 7, and those of the new digit.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as app.py does
sys.path[:0] = [str(EXAMPLES / "space"), str(EXAMPLES)]

import keeping  # noqa: E402
import opening  # noqa: E402
import teaching  # noqa: E402
import uploads  # noqa: E402
from answering import answer  # noqa: E402
from PIL import Image  # noqa: E402
from transformers.utils import logging  # noqa: E402

from cl_prompts.runs.images import digits  # noqa: E402


def main() -> None:
    """Measure and print times and accuracies."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    files = [args.adapter / name for name in uploads.ADAPTER_FILES] if args.adapter else []

    def opened() -> opening.OpenPool:
        return opening.open_files(files) if files else opening.open_digits()

    test = [(row["image"].convert("RGB"), row["label"]) for row in digits()["test"]]
    known = [pair for pair in test if pair[1] < 8]

    def correct(pool: opening.OpenPool, pairs: list[tuple[Image.Image, int]]) -> float:
        return 100 * statistics.mean(answer(pool, image).labels[0][0] == str(label) for image, label in pairs)

    pool = opened()
    some = uploads.take_images(sorted((opening.HERE / "samples" / "digits").glob("*.png")))[0]
    for image in some.values():  # warm-up
        answer(pool, image)
    report("one picture", args.repeats, lambda: answer(pool, next(iter(some.values()))))
    report("ten pictures", args.repeats, lambda: [answer(pool, image) for image in some.values()])
    print(f"digits 0 to 7 before: {correct(pool, known):.1f} %")
    for way in teaching.ways(pool)[0]:
        for digit in (8, 9):
            seconds = []
            for _ in range(args.repeats):
                pool = opened()
                handful = uploads.take_images(sorted((opening.HERE / "samples" / f"teach-{digit}").glob("*.png")))[0]
                with tempfile.TemporaryDirectory() as temporary:
                    started = time.perf_counter()
                    message = teaching.teach(pool, str(digit), list(handful.values()), way)
                    keeping.packed(pool, [message], Path(temporary))
                    seconds.append(time.perf_counter() - started)
            new = [pair for pair in test if pair[1] == digit]
            print(
                f"{digit}, {way}: {times(seconds)}, saved; digits 0 to 7 after {correct(pool, known):.1f} %, "
                f"the {len(new)} of {digit} {correct(pool, new):.1f} %"
            )


def report(what: str, repeats: int, call: Callable[[], object]) -> None:
    """Print the duration of a call."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    print(f"{what}: {times(seconds)}")


def times(seconds: list[float]) -> str:
    """Median and largest of durations, as text."""
    return f"{statistics.median(seconds):.3f} s, at most {max(seconds):.3f} s of {len(seconds)}"


if __name__ == "__main__":
    main()
