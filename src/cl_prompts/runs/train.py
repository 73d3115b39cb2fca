"""`cl-prompts train`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from transformers import AutoImageProcessor

from cl_prompts.runs.arguments import read_arguments
from cl_prompts.runs.building import build_learner, build_stream
from cl_prompts.runs.run import mistakes_in_one_line, open_run


COMMAND = "cl-prompts train"


def main(words: Sequence[str] | None = None) -> None:
    """Train on a stream of tasks and write the results; examples/train_cil.py has the same steps.

    Args:
        words: of the command line; None: those of this process. Mistakes in them exit with a message.
    """
    words = sys.argv[1:] if words is None else words
    args, training = read_arguments(words, COMMAND)
    with open_run(args, training, shlex.join([*COMMAND.split(), *words])) as run:
        if run.shows_results():
            return
        with mistakes_in_one_line():
            processor = AutoImageProcessor.from_pretrained(args.model)
            stream = build_stream(args, processor, training.seed)
            learner = build_learner(args, stream, training.seed)
        trainer = run.prepare(learner, stream)
        run.train(trainer, stream)
        run.report(trainer, stream, processor)
