"""Size, time and peak memory of a discriminant head's class statistics.

    python benchmarks/class_statistics.py --classes 100 1000 10000 --kinds low_rank --task 100

For each row a new process fits tasks of random features of width 768, and answers. The adapter is the
statistics and a trained head; it is not written.
The last column is the time of an answer beside that of a forward of ViT-B/16 in the same process, which is before
it in every answer. Peaks of the last fit, of its temperature (fits without a tenth of the images, and their answers) and of
the first answer are of all tensors: the statistics, what is computed from them and, while fitting, the features of the
task's images.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.profiler import profile
from transformers import ViTConfig, ViTModel

from cl_prompts.evaluation.report import machine
from cl_prompts.heads import DiscriminantClassifier


def peak_of(call: Callable[[], object], held: Sequence[Tensor]) -> float:
    """Largest number of bytes of all tensors while `call` runs, in MB; `held` are those that there are before."""
    with profile(profile_memory=True, use_cpu=True) as found:
        call()
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return (sum(t.numel() * t.element_size() for t in held) + max(accumulate(changes, initial=0))) / 1e6


def backbone_forward(width: int) -> float:
    """Median seconds of a forward of a ViT with 12 blocks of `width` (768: ViT-B/16) on an image of 224 pixels."""
    vit = ViTModel(ViTConfig(hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width)).eval()
    image, seconds = torch.zeros(1, 3, 224, 224), []
    with torch.no_grad():
        for _ in range(5):
            begun = time.perf_counter()
            vit(image)
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def measure(classes: int, kind: str, width: int, images: int, task: int, drift: str) -> str:
    """A row of the table."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    torch.linalg.eigh(torch.linalg.cholesky(torch.eye(64, dtype=torch.float64)))  # loads the libraries
    classifier = DiscriminantClassifier(width, kind=kind, drift=drift)
    for first in range(0, classes, task):
        own = list(range(first, min(first + task, classes)))
        targets = torch.tensor(own).repeat_interleave(images)
        features = torch.randn(len(targets), width, generator=generator)
        before = None if drift == "none" else features + 0.1 * torch.randn(len(targets), width, generator=generator)
        classifier.begin_task(own)
        if own[-1] < classes - 1:
            classifier.fit(features, targets, before)
    given = [*classifier.state_dict().values(), features, targets, *([] if before is None else [before])]
    scored = peak_of(partial(classifier.held_out_answers, features, targets, before), given)
    fitted = peak_of(partial(copy.deepcopy(classifier).fit, features, targets, before), given)
    begun = time.perf_counter()
    classifier.fit(features, targets, before)
    seconds = time.perf_counter() - begun
    del features, targets, before, given
    classifier.load_state_dict(classifier.state_dict())  # forgets what was computed at the fit
    seen = torch.randn(1, width, generator=generator)
    with torch.no_grad():
        answered = peak_of(partial(classifier, seen), list(classifier.state_dict().values()))
        classifier.load_state_dict(classifier.state_dict())
        begun = time.perf_counter()
        classifier(seen)
        first_answer = time.perf_counter() - begun
        begun = time.perf_counter()
        for _ in range(10):
            classifier(seen)
        answer = (time.perf_counter() - begun) / 10
    share = 100 * answer / backbone_forward(width)
    size = (
        sum(t.numel() * t.element_size() for t in classifier.state_dict().values()) / 1e6 + 4 * classes * (width + 1) / 1e6
    )
    memory = f"{size:.1f} | {fitted:.1f} | {scored:.1f} | {answered:.1f}"
    times = f"{seconds:.2f} | {first_answer:.2f} | {1e3 * answer:.1f} | {share:.1f}"
    return f"| {kind}, {classes:,} classes | {memory} | {times} |"


def main() -> None:
    """Print a table with a row per kind and number of classes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[20, 100, 1000])
    parser.add_argument("--kinds", nargs="+", default=["low_rank", "full"])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--images", type=int, default=100, help="images of a class")
    parser.add_argument("--task", type=int, default=10, help="classes of a task")
    parser.add_argument("--drift", choices=("none", "shift", "affine"), default="none", help="of old classes' statistics")
    parser.add_argument("--one", action="store_true", help="measure in this process")
    options = parser.parse_args()
    if options.one:
        sizes = options.width, options.images, options.task
        print(measure(options.classes[0], options.kinds[0], *sizes, options.drift), flush=True)
        return
    print(f"{machine()}\n")
    columns = (
        "adapter, MB | peak: fit | temperature | first answer | last fit, s | first answer, s | answer, ms | of ViT, %"
    )
    print(f"| statistics | {columns} |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    fixed = ["--width", str(options.width), "--images", str(options.images), "--task", str(options.task)]
    fixed += ["--drift", options.drift, "--one"]
    for kind in options.kinds:
        for classes in options.classes:
            command = [sys.executable, __file__, "--classes", str(classes), "--kinds", kind, *fixed]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
