"""Passes of a run of the recipes `default_*`, and with the speed of a device their hours.

    python benchmarks/full_size.py
    python benchmarks/full_size.py --step 500 --forward 1500    # images/s that speed.py has measured there

benchmarks/full_size.md says what is counted. Nothing is run.
"""

import argparse
from dataclasses import dataclass

from cl_prompts.runs.arguments import read_arguments


STEP = 2.06  # a training step of APT in plain forwards, as benchmarks/full_size.md says
# Training and test images of each task; of equal tasks their sum.
SIZES: dict[str, tuple[list[float], list[float]]] = {
    "cifar100": ([50_000], [10_000]),
    "imagenet_r": ([24_000], [6_000]),
    "cub": ([5_994], [5_794]),
    "5datasets": ([73_257, 60_000, 50_000, 14_979, 60_000], [26_032, 10_000, 10_000, 3_745, 10_000]),
}


@dataclass(frozen=True)
class Passes:
    """Images of a run, each counted as often as it goes through the backbone.

    Args:
        steps: in training steps.
        answers: in passes without gradients.
    """

    steps: float
    answers: float

    @property
    def forwards(self) -> float:
        """All in plain forwards."""
        return STEP * self.steps + self.answers


def passes(name: str) -> Passes:
    """The passes of the recipe default_NAME."""
    arguments, training = read_arguments(["--recipe", f"default_{name}"])
    train, test = SIZES[name]
    if len(train) == 1:
        tasks = int(arguments.tasks[0])
        train, test = ([total[0] / tasks] * tasks for total in (train, test))
    end_of_tasks = sum(train)
    before_later_tasks = sum(train[1:])
    references = sum(train) + sum(test)
    evaluations = sum(sum(test[: task + 1]) for task in range(len(test)))
    answers = end_of_tasks + before_later_tasks + references + evaluations
    return Passes(training.num_train_epochs * sum(train), answers)


def table(step: float = 0.0, forward: float = 0.0) -> str:
    """A Markdown table of all recipes, with hours if images/s of a step and of a pass are given."""
    hours = "hours | " if step and forward else ""
    lines = [f"| recipe | epochs | images in steps | images in passes | plain forwards | {hours}"]
    lines.append("|---|---:|---:|---:|---:|" + "---:|" * bool(hours))
    for name in SIZES:
        counted = passes(name)
        epochs = read_arguments(["--recipe", f"default_{name}"])[1].num_train_epochs
        numbers = " | ".join(f"{round(count, -3):,.0f}" for count in (counted.steps, counted.answers, counted.forwards))
        taken = f"{(counted.steps / step + counted.answers / forward) / 3600:.2f} | " if hours else ""
        lines.append(f"| `default_{name}` | {epochs} | {numbers} | {taken}")
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=float, default=0.0, help="images/s of training steps")
    parser.add_argument("--forward", type=float, default=0.0, help="images/s of passes without gradients")
    options = parser.parse_args()
    if min(options.step, options.forward) < 0 or bool(options.step) != bool(options.forward):
        parser.error(f"--step {options.step} and --forward {options.forward} must be given both, as images/s above 0")
    print(table(options.step, options.forward))


if __name__ == "__main__":
    main()
