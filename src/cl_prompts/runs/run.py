"""A run with its results folder: what happens before, during and after the training."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from cl_prompts.baselines import BASELINES
from cl_prompts.continual import (
    AccuracyMatrix,
    ContinualArguments,
    ContinualTrainer,
    Evaluation,
    IndexedStream,
    JointStream,
    ProgressBar,
    Stream,
)
from cl_prompts.continual.run_lock import FolderInUseError, run_lock
from cl_prompts.evaluation.diagnostics import (
    are_shares,
    prompt_similarity,
    selected_sets,
    selection_counts,
    selection_summary,
    weight_entropy,
)
from cl_prompts.evaluation.plots import draw, draw_selection
from cl_prompts.evaluation.report import SHORT_LEGEND, Result, comparison_table, headline, remarks, run_page
from cl_prompts.runs.arguments import Arguments, as_dict
from cl_prompts.runs.building import extra_classifiers
from cl_prompts.runs.references import features_of, references
from cl_prompts.runs.run_folder import (
    LOCK,
    begin,
    described,
    folder_of,
    is_complete,
    read_results,
    refuse_another_run,
)
from cl_prompts.runtime.disk_full import NO_ROOM
from cl_prompts.sharing.image_processor import save_processor
from cl_prompts.sharing.run_record import RunRecord
from cl_prompts.storage.staging import staging_folder
from cl_prompts.tuner.sharding import shard_frozen_blocks


@dataclass
class Run:
    """A run whose results folder this process holds; see `open_run`.

    Args:
        args: settings of the run.
        training: settings of its trainer.
        accelerator: of the run.
        command: command line that repeats the run.
        started: value of `time.perf_counter` at its start.
        matrices: accuracies of the learner and of the references, by name; filled by `train`.
        seconds: duration without the training itself.
    """

    args: Arguments
    training: ContinualArguments
    accelerator: Accelerator
    command: str
    started: float
    matrices: dict[str, AccuracyMatrix] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def folder(self) -> Path:
        """The results folder."""
        return folder_of(self.training)

    def shows_results(self) -> bool:
        """Whether a run to be resumed was complete; prints its table then. Exits if the folder has another run."""
        refuse_another_run(described(self.args, self.training), self.folder)
        if not (self.args.resume and is_complete(self.folder)):
            return False
        try:
            record = read_results(self.folder)
        except ValueError as error:
            sys.exit(str(error))
        print(comparison_table([Result(name, matrix, self.training.seed) for name, matrix in record.results.items()]))
        print(f"the run in {self.folder} was complete ({record.seconds:.0f} s); without --resume it starts over")
        return True

    def prepare(self, learner: Any, stream: Stream) -> ContinualTrainer:
        """The trainer. Writes run.json into the results folder; exits if that has another run."""
        args, accelerator = self.args, self.accelerator
        if args.shard_backbone:
            shard_frozen_blocks(learner.to(accelerator.device))
        facts = {"stream": stream.fingerprint(), "learner": learner.fingerprint(), "processes": accelerator.num_processes}
        description = described(args, self.training, **facts)
        refuse_another_run(description, self.folder)
        with mistakes_in_one_line():
            trainer = ContinualTrainer(
                learner,
                JointStream(stream) if args.method == "joint" and not args.joint else stream,
                self.training,
                accelerator=accelerator,
                callbacks=[ProgressBar()],
                trackers=args.trackers,
                classifiers=extra_classifiers(args, learner, self.training.seed),
            )
        accelerator.wait_for_everyone()  # all processes have checked the folder before it is written to
        if accelerator.is_main_process:
            begin(description, self.folder, resume=args.resume)
        return trainer

    def train(self, trainer: ContinualTrainer, stream: Stream) -> None:
        """Train, and evaluate the references on the same images. All processes must call it."""
        untrained = None
        if isinstance(stream, IndexedStream) and not trainer.feature_provider.base_is_frozen:
            untrained = features_of(trainer)  # before training changes the backbone
        before = time.perf_counter()
        trainer.train(resume=self.args.resume)
        trained = time.perf_counter()
        result = trainer.result()
        method = self.args.method
        self.matrices = {method: result.matrix}
        self.matrices |= {f"{method} + {name}": matrix for name, matrix in result.extra_matrices.items()}
        if isinstance(stream, IndexedStream):
            features = untrained or features_of(trainer)
            self.matrices |= references(*features, stream, self.args, self.training, self.accelerator.print)
        self.seconds = before - self.started + time.perf_counter() - trained

    def report(self, trainer: ContinualTrainer, stream: Stream, processor: Any) -> None:
        """Print the table and write page, plots, record and adapter, on the main process."""
        args, folder, method = self.args, self.folder, self.args.method
        learner: Any = trainer.model
        result = trainer.result()
        skipped = trainer.stream.count_skipped()
        processes = self.accelerator.num_processes
        self.accelerator.state.destroy_process_group()  # only the main process continues
        if not self.accelerator.is_main_process:
            return
        seconds = self.seconds + result.seconds
        trainable = {method: result.trainable_parameters}
        results = [Result(name, m, self.training.seed, trainable.get(name)) for name, m in self.matrices.items()]
        said = (headline(results, len(stream.classes)), comparison_table(results), SHORT_LEGEND, remarks(results))
        print("\n" + "\n\n".join(said) + "\n")
        if skipped:
            print(f"{skipped} images could not be read and were left out\n")

        settings = as_dict(args, self.training) | {"seconds": round(seconds, 1), "processes": processes, "skipped": skipped}
        data = f"{', '.join(args.dataset)} ({stream.scenario})"
        result.matrix.to_csv(folder / "matrix.csv")
        selection, chosen = report_selection(result.evaluations, learner, folder)
        pictures = [*draw(self.matrices, folder), *chosen]
        run_page(
            folder,
            results,
            command=self.command,
            model=args.model,
            data=data,
            arguments=settings,
            seconds=seconds,
            classes=len(stream.classes),
            evaluations=result.evaluations,
            selection=selection,
            plots=pictures,
        )
        record = RunRecord.of(
            result,
            method,
            results=self.matrices,
            data=data,
            datasets=[name for name in args.dataset if "/" in name and not Path(name).exists()],
            command=self.command,
            settings=settings,
            seconds=round(seconds, 1),
        )
        if method in BASELINES:
            with staging_folder(folder / "adapter") as staging:
                learner.save_pretrained(staging)
                save_processor(processor, staging)
        else:
            learner.save_pretrained(folder / "adapter", record=record, pictures=pictures, image_processor=processor)
        record.save(folder, None)  # last, because a folder with results.json counts as complete
        print(f"{seconds:.0f} s; results, plots and adapter in {folder}")


@contextmanager
def open_run(args: Arguments, training: ContinualArguments, command: str) -> Iterator[Run]:
    """Hold the run's results folder and set the seed. Exits with a message if it is in use, or the disk is full.

    Args:
        args: settings of the run.
        training: settings of its trainer.
        command: command line that repeats the run.
    """
    started = time.perf_counter()
    folder = folder_of(training)
    accelerator = Accelerator(mixed_precision=training.mixed_precision, project_dir=folder)
    try:
        with run_lock(folder, accelerator, name=LOCK):
            set_seed(training.seed)
            yield Run(args, training, accelerator, command, started)
    except FolderInUseError as error:
        sys.exit(str(error))
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        sys.exit(f"{error.strerror} (resume with --resume)")


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Exit with the message of an error that settings or data cause."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        sys.exit(" ".join(str(error).split()))


def report_selection(evaluations: Sequence[Evaluation], learner: Any, folder: Path) -> tuple[str, list[Path]]:
    """Text and plot of the prompts selected for each task; "" and no plot if the learner selects none."""
    chosen = [e.prompt_ids for e in evaluations if e.prompt_ids is not None]
    if not chosen:
        return "", []
    prompts = learner.adapter.pool.prompt_table().detach()
    tasks = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(ids) for ids in chosen]))
    size = prompts.shape[1]
    ids = torch.cat(chosen)
    counts = selection_counts(ids, tasks, size)
    similarity = prompt_similarity(prompts) if size <= 1000 else None  # its size is quadratic in the number of prompts
    weights = [e.prompt_weights for e in evaluations if e.prompt_weights is not None]
    mixing = weight_entropy(torch.cat(weights)) if weights and all(map(are_shares, weights)) else None
    summary = selection_summary(counts, similarity, selected_sets(ids), mixing)
    return summary, [draw_selection(counts, similarity, folder)]
