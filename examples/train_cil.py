"""Continual learning with a prompt pool on a frozen vision transformer, or with a baseline.

    accelerate launch examples/train_cil.py                                   # numbers on the micro ViT, two minutes
    accelerate launch examples/train_cil.py --model google/vit-base-patch16-224-in21k --dataset path/to/images
    accelerate launch examples/train_cil.py --recipe l2p_cifar100 --seed 1    # a recipe of the package, overridden
    accelerate launch examples/train_cil.py --resume                          # continue a run that was killed
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/train_cil.py # two processes on one CPU

Every task has new classes, domains or data sets. Images of old tasks are not available, and at test the task of an image is
not given. The results folder has settings, log, checkpoints, the accuracy matrix, a page with table and plots, and the
adapter. The table also has baselines on features of the untrained backbone, which a method should beat.

`cl-prompts train` does the same without a clone. Copy this file to change a step: all its parts are in `cl_prompts.runs`.
"""

import shlex
import sys

from transformers import AutoImageProcessor

from cl_prompts.runs.arguments import read_arguments
from cl_prompts.runs.building import build_learner, build_stream
from cl_prompts.runs.run import mistakes_in_one_line, open_run
from cl_prompts.runs.screen import quiet_libraries


def main() -> None:
    """Train on a stream of tasks and write the results."""
    args, training = read_arguments()
    command = shlex.join(["accelerate", "launch", "examples/train_cil.py", *sys.argv[1:]])
    with quiet_libraries(), open_run(args, training, command) as run:  # holds the results folder
        if run.shows_results():  # it was complete
            return
        with mistakes_in_one_line():
            processor = AutoImageProcessor.from_pretrained(args.model)
            stream = build_stream(args, processor, training.seed)
            learner = build_learner(args, stream, training.seed)
        trainer = run.prepare(learner, stream)
        run.train(trainer, stream)
        run.report(trainer, stream, processor)


if __name__ == "__main__":
    main()
