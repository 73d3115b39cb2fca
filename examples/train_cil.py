"""Continual learning with a prompt pool on a frozen vision transformer, or with a baseline.

    accelerate launch examples/train_cil.py                                   # digits on the micro ViT, two minutes
    accelerate launch examples/train_cil.py --model google/vit-base-patch16-224-in21k --dataset path/to/images
    accelerate launch examples/train_cil.py --recipe l2p_cifar100 --seed 1    # a YAML of examples/recipes, overridden
    accelerate launch examples/train_cil.py --resume                          # continue a run that was killed
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/train_cil.py # two processes on one CPU

Every task has new classes, domains or data sets. Images of old tasks are not available, and at test the task of an image is
not given. The results folder has settings, log, checkpoints, the accuracy matrix, a page with table and plots, and the
adapter. The table also has baselines on features of the untrained backbone, which a method should beat.
"""

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from arguments import Arguments, as_dict, pairs, read_arguments
from images import ToTensor, load_stream
from run_folder import LOCK, begin, described, folder_of, is_complete, read_results, refuse_another_run
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from cl_prompts import PromptPoolConfig, get_prompt_pool_model
from cl_prompts.baselines import BASELINES, get_baseline
from cl_prompts.continual import (
    AccuracyMatrix,
    ContinualArguments,
    ContinualTrainer,
    CropAndFlip,
    Evaluation,
    FrozenFeatures,
    IndexedStream,
    JointStream,
    ProgressBar,
    Stream,
    closed_form,
    joint_linear_probe,
    nearest_class_mean,
    sequential_probe,
)
from cl_prompts.continual.run_lock import FolderInUseError, run_lock
from cl_prompts.evaluation.diagnostics import prompt_similarity, selected_sets, selection_counts, selection_summary
from cl_prompts.evaluation.plots import draw, draw_selection
from cl_prompts.evaluation.report import Result, comparison_table, remarks, run_page
from cl_prompts.heads import CLASSIFIERS, DiscriminantClassifier, FeatureClassifier
from cl_prompts.runtime.disk_full import NO_ROOM
from cl_prompts.sharing.run_record import RunRecord
from cl_prompts.storage.staging import staging_folder
from cl_prompts.tuner.sharding import shard_frozen_blocks


def load_backbone(name: str, attention: str) -> Any:
    """Load a backbone without pooler. Many checkpoints have none, and transformers would initialize one at random."""
    config = AutoConfig.from_pretrained(name)
    config = getattr(config, "vision_config", config)
    parameters = signature(AutoModel._model_mapping[type(config)].__init__).parameters
    options = {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}
    return AutoModel.from_pretrained(name, config=config, attn_implementation=attention, **options)


def augmentation(args: Arguments) -> CropAndFlip:
    """The augmentation of training images."""
    return CropAndFlip(scale=(args.crop_scale, 1.0), views=args.views or None, on_device=args.augment_on_device)


def build_stream(args: Arguments, processor: Any, seed: int) -> Stream:
    """The stream of tasks."""
    stream = load_stream(
        args.scenario,
        args.dataset,
        ToTensor(processor, args.input_range, args.resample),
        tasks=args.tasks[0] if len(args.tasks) == 1 else args.tasks,
        shuffle_classes=args.shuffle_classes,
        seed=seed,
        image_column=args.image_column,
        label_column=args.label_column,
        domain_column=args.domain_column,
        order=args.order or None,
        common_test=args.common_test,
        width=args.width,
        held_out=args.held_out,
        augmentation=augmentation(args) if args.augment else None,
        on_bad_image=args.on_bad_image,
        streaming=args.streaming,
        train_images=args.train_images or None,
    )
    stream.max_pixels = args.max_pixels
    return JointStream(stream, only_last=True) if args.joint else stream


def build_learner(args: Arguments, stream: Stream, seed: int) -> Any:
    """A prompt pool on a frozen backbone, or a baseline on one that may be trained."""
    options = pairs(args.config)
    backbone = load_backbone(args.model, args.attention)
    if stream.task_free:
        options = {"num_labels": max(stream.classes) + 1} | options
    if args.method in BASELINES:
        return get_baseline(args.method, backbone, **options)
    options = {"classifier_seed": seed} | options
    if stream.task_free:
        options = {"class_mask": "batch"} | options
    return get_prompt_pool_model(backbone, PromptPoolConfig(method=args.method, **options))


def extra_classifiers(args: Arguments, learner: Any, own_seed: int) -> dict[str, FeatureClassifier]:
    """Classifiers to evaluate on the learner's features."""
    frozen = learner.features.frozen if args.method in BASELINES else learner.adapter.config.drift == "none"
    classifiers: dict[str, FeatureClassifier] = {}
    for name in args.extra_classifiers:
        make: Any = CLASSIFIERS[name]
        seed = {"seed": own_seed} if "seed" in signature(make).parameters else {}
        classifiers[name] = make(learner.head.weight.shape[1], drift="none" if frozen else "affine", **seed)
    return classifiers


def features_of(trainer: ContinualTrainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Un-prompted features of all training and test images by row number, each [rows, D]. All processes must call it."""
    provider = trainer.feature_provider
    return provider.frozen_features(train=True).cpu(), provider.frozen_features(train=False).cpu()


def references(
    train: torch.Tensor, test: torch.Tensor, stream: IndexedStream, args: Arguments, training: ContinualArguments
) -> dict[str, AccuracyMatrix]:
    """Accuracies of classifiers without prompts on frozen features of the same images, with the head's learning rate."""
    data = FrozenFeatures(
        [(train[task.train_rows], torch.as_tensor(stream.train_labels[task.train_rows])) for task in stream],
        [(test[task.test_rows], torch.as_tensor(stream.test_labels[task.test_rows])) for task in stream],
    )
    settings: dict[str, Any] = {
        "num_train_epochs": training.num_train_epochs,
        "batch_size": training.batch_size,
        "learning_rate": training.to_dict()["learning_rates"].get("head", training.learning_rate),
        "seed": training.seed,
    }
    matrices = {"sequential linear probe": sequential_probe(data, **settings)}
    options = pairs(args.config)
    if options.get("head") == "cosine":
        scale = options.get("head_scale", PromptPoolConfig.head_scale)
        matrices["sequential cosine probe"] = sequential_probe(data, **settings, cosine_scale=scale)
    matrices["nearest class mean"] = nearest_class_mean(data)
    width = data.train[0][0].shape[1]
    matrices["discriminant analysis"] = closed_form(data, DiscriminantClassifier(width, drift="none"))
    matrices["joint linear probe"] = joint_linear_probe(data, **settings)
    return matrices


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
    return selection_summary(counts, similarity, selected_sets(ids)), [draw_selection(counts, similarity, folder)]


def main() -> None:
    """Train on a stream of tasks and write the results."""
    started = time.perf_counter()
    args, training = read_arguments()
    folder = folder_of(training)
    accelerator = Accelerator(mixed_precision=training.mixed_precision, project_dir=folder)
    try:
        with run_lock(folder, accelerator, name=LOCK):
            run(args, training, accelerator, started)
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


def run(args: Arguments, training: ContinualArguments, accelerator: Accelerator, started: float) -> None:
    """Run with these settings; the process has `started` at this value of `time.perf_counter`."""
    folder, seed = folder_of(training), training.seed
    refuse_another_run(described(args, training), folder)
    if args.resume and is_complete(folder):
        try:
            record = read_results(folder)
        except ValueError as error:
            sys.exit(str(error))
        print(comparison_table([Result(name, matrix, seed) for name, matrix in record.results.items()]))
        print(f"the run in {folder} was complete ({record.seconds:.0f} s); without --resume it starts over")
        return

    set_seed(seed)
    with mistakes_in_one_line():
        processor = AutoImageProcessor.from_pretrained(args.model)
        stream = build_stream(args, processor, seed)
        learner = build_learner(args, stream, seed)
    if args.shard_backbone:
        shard_frozen_blocks(learner.to(accelerator.device))
    facts = {"stream": stream.fingerprint(), "learner": learner.fingerprint(), "processes": accelerator.num_processes}
    description = described(args, training, **facts)
    refuse_another_run(description, folder)
    own_stream = JointStream(stream) if args.method == "joint" and not args.joint else stream
    with mistakes_in_one_line():
        trainer = ContinualTrainer(
            learner,
            own_stream,
            training,
            accelerator=accelerator,
            callbacks=[ProgressBar()],
            trackers=args.trackers,
            classifiers=extra_classifiers(args, learner, seed),
        )
    accelerator.wait_for_everyone()  # all processes have checked the folder before it is written to
    if accelerator.is_main_process:
        begin(description, folder, resume=args.resume)
    untrained = None
    if isinstance(stream, IndexedStream) and not trainer.feature_provider.base_is_frozen:
        untrained = features_of(trainer)  # before training changes the backbone
    before = time.perf_counter() - started
    trainer.train(resume=args.resume)
    trained = time.perf_counter()

    result = trainer.result()
    matrices = {args.method: result.matrix}
    matrices |= {f"{args.method} + {name}": matrix for name, matrix in result.extra_matrices.items()}
    if isinstance(stream, IndexedStream):
        matrices |= references(*(untrained or features_of(trainer)), stream, args, training)
    skipped = own_stream.count_skipped()
    accelerator.state.destroy_process_group()  # only the main process continues
    if not accelerator.is_main_process:
        return
    seconds = before + result.seconds + time.perf_counter() - trained
    trainable = {args.method: result.trainable_parameters}
    results = [Result(name, matrix, seed, trainable.get(name)) for name, matrix in matrices.items()]
    print(f"\n{comparison_table(results)}\n\n{remarks(results)}\n")
    if skipped:
        print(f"{skipped} images could not be read and were left out\n")

    settings = as_dict(args, training) | {
        "seconds": round(seconds, 1),
        "processes": accelerator.num_processes,
        "skipped": skipped,
    }
    command = f"accelerate launch examples/train_cil.py {shlex.join(sys.argv[1:])}".strip()
    data = f"{', '.join(args.dataset)} ({stream.scenario})"
    result.matrix.to_csv(folder / "matrix.csv")
    selection, pictures = report_selection(result.evaluations, learner, folder)
    run_page(
        folder,
        results,
        command=command,
        model=args.model,
        data=data,
        arguments=settings,
        seconds=seconds,
        evaluations=result.evaluations,
        selection=selection,
        plots=[*draw(matrices, folder), *pictures],
    )
    record = RunRecord.of(
        result,
        args.method,
        results=matrices,
        data=data,
        datasets=[name for name in args.dataset if "/" in name and not Path(name).exists()],
        command=command,
        settings=settings,
        seconds=round(seconds, 1),
    )
    if args.method in BASELINES:
        with staging_folder(folder / "adapter") as staging:
            learner.save_pretrained(staging)
            processor.save_pretrained(staging)
    else:
        learner.save_pretrained(folder / "adapter", record=record, pictures=pictures, image_processor=processor)
    record.save(folder, None)  # last, because a folder with results.json counts as complete
    print(f"{seconds:.0f} s; results, plots and adapter in {folder}")


if __name__ == "__main__":
    main()
