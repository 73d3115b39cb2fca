"""What each command does. An error is raised; the exit code is 0, or 1 where some images failed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from cl_prompts.cli.stderr import print_to_stderr
from cl_prompts.conversion import convert_checkpoint
from cl_prompts.pipeline import Predictions, PromptPoolPipeline
from cl_prompts.runtime.images import MAX_PIXELS
from cl_prompts.runtime.text import LONGEST_NAME, terminal_text
from cl_prompts.sharing.push import push_folder


def train(args: argparse.Namespace) -> int:
    """Train; the words are settings of a run."""
    _check_extra("train")
    from cl_prompts.runs.train import main  # imports the trainer, which other commands do not need

    main(args.words)
    return 0


def compare(args: argparse.Namespace) -> int:
    """Train with several methods and seeds."""
    _check_extra("compare")
    from cl_prompts.runs.comparison import main

    main(args.words)
    return 0


def _check_extra(command: str) -> None:
    missing = [name for name in ("matplotlib", "sklearn") if find_spec(name) is None]
    if missing:
        raise ImportError(f"{command} needs {', '.join(missing)}: pip install 'cl-prompts[train]'")


def predict(args: argparse.Namespace) -> int:
    """Print the most likely classes of images."""
    if args.batch_size < 1 or args.top_k < 1:
        raise ValueError(f"--batch-size {args.batch_size} and --top-k {args.top_k} must be at least 1")
    pipe = PromptPoolPipeline.from_pretrained(
        args.adapter,
        base=args.base,
        revision=args.revision,
        batch_size=args.batch_size,
        device=args.device,
        max_pixels=MAX_PIXELS if args.max_pixels is None else args.max_pixels,
    )
    pipe.check_unknown(args.unknown)
    failed = False
    with tqdm(total=len(args.images), unit="image", disable=sys.stdout.isatty() or not sys.stderr.isatty()) as bar:
        for images in _read_ahead(pipe, args.images, args.batch_size):
            read = [(name, image) for name, image in images if not isinstance(image, str)]
            answers = pipe.classify([image for _, image in read], args.top_k, args.unknown)
            for _, problem in images:
                if isinstance(problem, str):
                    print_to_stderr(problem)
                    failed = True
            for (name, _), answer in zip(read, answers, strict=True):
                _print_answer(name, answer, args.json)
            bar.update(len(images))
    return int(failed)


def _read_ahead(
    pipe: PromptPoolPipeline, names: Sequence[str], batch_size: int
) -> Iterator[list[tuple[str, dict[str, Tensor] | str]]]:
    """Batches of names with prepared images or what is wrong with them. A thread reads the next batch while one is used."""

    def read(start: int) -> list[tuple[str, dict[str, Tensor] | str]]:
        return [(name, _prepared(pipe, name)) for name in names[start : start + batch_size]]

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, 0)
        for start in range(batch_size, len(names) + batch_size, batch_size):
            images = ahead.result()
            ahead = reader.submit(read, start)  # at the end an empty batch
            yield images


def _prepared(pipe: PromptPoolPipeline, name: str) -> dict[str, Tensor] | str:
    try:
        return pipe.preprocess(name)
    except ValueError as error:
        return str(error)  # the error itself would hold what was decoded


def _print_answer(name: str, answer: Predictions, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"image": name, "predictions": answer}))
        return
    for a in answer:
        mark = "  (unknown?)" if a.get("unknown") else ""
        print(terminal_text(f"{name}  {a['score']:6.1%}  {terminal_text(a['label'], LONGEST_NAME)}{mark}"))
    if not answer:
        print(terminal_text(f"{name}  none of the classes"))


def learn(args: argparse.Namespace) -> int:
    """Teach an adapter the classes of a folder."""
    from cl_prompts.cli.learn import learn as teach  # imports the trainer, which other commands do not need

    name = Path(args.adapter).resolve().name if Path(args.adapter).exists() else args.adapter.rpartition("/")[2]
    folder = args.output or f"{name}-{Path(args.folder).resolve().name}"
    settings = {"num_train_epochs": args.epochs, "batch_size": args.batch_size, "learning_rate": args.learning_rate}
    done = teach(
        args.folder,
        args.adapter,
        folder,
        check=args.check,
        base=args.base,
        revision=args.revision,
        device=args.device,
        settings=settings | {"seed": args.seed},
    )
    if args.json:
        print(json.dumps(asdict(done), default=str))
        return 0
    print(terminal_text(f"knew {len(done.known)} classes: {_listed(done.known)}"))
    print(terminal_text(f"learned {len(done.new)} from {done.images} images in {done.seconds:.0f} s: {_listed(done.new)}"))
    if done.known_before is not None:
        print(f"accuracy on known classes: {done.known_after:.1f} % ({done.known_before:.1f} % before)")
    if done.new_after is not None:
        print(f"accuracy on new classes: {done.new_after:.1f} %")
    print(terminal_text(f"adapter in {done.folder}"))
    return 0


def _listed(names: Sequence[str]) -> str:
    shown = [terminal_text(name, LONGEST_NAME) for name in names[:10]]
    return ", ".join(shown) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def evaluate(args: argparse.Namespace) -> int:
    """Print the accuracy on a folder of images."""
    from cl_prompts.cli.labeled_images import count_correct, list_images, percent

    images = list_images(args.folder)
    pipe = PromptPoolPipeline.from_pretrained(
        args.adapter, base=args.base, revision=args.revision, batch_size=args.batch_size, device=args.device
    )
    strange = sorted(set(images) - {str(name) for name in pipe.model.adapter.tasks.id2label.values()})
    if strange:
        raise ValueError(f"the adapter knows no classes {strange[:10]}: name folders as `cl-prompts inspect` names classes")
    correct = count_correct(pipe, images)
    accuracy = percent(correct, images, list(images))
    by_class = {name: percent(correct, images, [name]) for name in images}
    number = sum(map(len, images.values()))
    if args.json:
        print(json.dumps({"accuracy": accuracy, "images": number, "by_class": by_class}))
        return 0
    print(f"accuracy {accuracy:.1f} % on {number} images of {len(images)} classes")
    for name, value in by_class.items():
        print(terminal_text(f"  {value:5.1f} %  {terminal_text(name, LONGEST_NAME)} ({len(images[name])} images)"))
    return 0


def push(args: argparse.Namespace) -> int:
    """Put an adapter's folder on the Hub."""
    commit = push_folder(
        args.folder,
        args.repo_id,
        private=args.private,
        revision=args.revision,
        commit_message=args.message,
        create_pr=args.create_pr,
        token=args.token,
        base_model_id=args.base_model_id,
        include_base=args.include_base,
        license=args.license,
    )
    print(commit.pr_url or commit.commit_url)
    return 0


def convert(args: argparse.Namespace) -> int:
    """Write a checkpoint as a folder of transformers."""
    done = convert_checkpoint(
        args.source,
        args.destination,
        num_heads=args.num_heads,
        normalization=args.normalization,
        with_head=not args.without_head,
        prefix=args.prefix,
    )
    config = done.config
    size = f"{config.num_hidden_layers} blocks of width {config.hidden_size}, {config.num_attention_heads} heads"
    images = f"images {config.image_size}x{config.image_size}"
    print(f"{config.architectures[0]}: {size}, patches of {config.patch_size}, {images}")
    assumed = "; assumed, see --normalization" if done.assumed else ""
    print(f"images are normalized with mean {done.mean} and std {done.std}{assumed}")
    if done.left_out:
        names = ", ".join(terminal_text(name, LONGEST_NAME) for name in done.left_out[:3])
        print(f"left out: {len(done.left_out)} tensors beside the network, such as {names}")
    print(terminal_text(f"base model in {done.folder}"))
    return 0
