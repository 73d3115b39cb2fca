"""The command `cl-prompts`. An error is printed as one line on stderr, with exit code 1."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cl_prompts.pipeline import PromptPoolPipeline
from cl_prompts.runs.screen import quiet_libraries
from cl_prompts.runtime.images import MAX_PIXELS
from cl_prompts.runtime.text import LONGEST_NAME, terminal_text
from cl_prompts.sharing.inspect import describe_adapter
from cl_prompts.sharing.push import push_folder
from cl_prompts.version import __version__


# Errors of input, files, network, devices and memory. Any other error is a bug and is shown with its traceback.
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: arguments of the command line; None: those of this process.

    Returns:
        The exit code: 0, or 1 after an error. Wrong arguments exit with 2, in `train` and `compare` with 1.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["train"], ["compare"]):  # which read their own settings
        args = argparse.Namespace(run=_train if words[0] == "train" else _compare, words=words[1:])
    else:
        args = _parser().parse_args(words)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        with quiet_libraries(), _warnings_on_stderr():
            code = run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has closed the pipe, as in `cl-prompts ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except EXPECTED as error:
        _print_to_stderr(error)
        return 1
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        _print_to_stderr(error.code)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cl-prompts", description="Prompt pools for frozen vision transformers.")
    parser.add_argument("--version", action="version", version=f"cl-prompts {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    commands.add_parser(
        "train", help="teach a vision transformer task after task; without arguments digits, in two minutes"
    )
    commands.add_parser("compare", help="train with several methods and seeds, and write a table")
    predict = commands.add_parser("predict", help="the most likely classes of images")
    predict.set_defaults(run=_predict)
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="file or URL")
    predict.add_argument("--adapter", required=True, metavar="ID", help="folder or Hub id")
    predict.add_argument("--base", metavar="ID", help="base model instead of the one the adapter names: folder or Hub id")
    predict.add_argument("--top-k", type=int, default=5, metavar="N", help="classes for each image (default: %(default)s)")
    predict.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at a time (default: %(default)s)")
    predict.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help="larger images are refused (default: %(default)s)"
    )
    predict.add_argument("--device", metavar="D", help="like cpu, cuda or mps (default: cpu)")

    learn = commands.add_parser("learn", help="teach an adapter new classes from a folder of images, as its next task")
    learn.set_defaults(run=_learn)
    learn.add_argument("folder", metavar="FOLDER", help="has a folder of images for each new class, or those of one class")
    learn.add_argument("--output", metavar="DIR", help="of the new adapter (default: ADAPTER-FOLDER)")
    learn.add_argument("--check", metavar="FOLDER", help="images of known and new classes to measure the accuracy on")
    learn.add_argument("--epochs", type=int, metavar="N", help="passes over the images (default: as in its training)")
    learn.add_argument("--batch-size", type=int, metavar="N", help="images of a step (default: as in its training)")
    learn.add_argument("--learning-rate", type=float, metavar="R", help="(default: as in its training)")
    learn.add_argument("--seed", type=int, default=0, metavar="N", help="of orders and new values (default: %(default)s)")

    evaluate = commands.add_parser("evaluate", help="accuracy on a folder that has a folder of images for each class")
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("folder", metavar="FOLDER", help="its folders are named like the adapter's classes")
    evaluate.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at a time (default: %(default)s)")
    for command in (learn, evaluate):
        command.add_argument("--adapter", required=True, metavar="ID", help="folder or Hub id")
        command.add_argument("--base", metavar="ID", help="base model instead of the one the adapter names")
        command.add_argument("--device", metavar="D", help="like cpu, cuda or mps (default: cpu)")

    inspect = commands.add_parser("inspect", help="method, tasks, classes, sizes and figures; no base model is loaded")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("adapter", metavar="ID", help="folder or Hub id")
    for command in (predict, learn, evaluate, inspect):
        command.add_argument("--revision", metavar="R", help="branch, tag or commit of the adapter on the Hub")
        command.add_argument("--json", action="store_true", help="for programs: one JSON object for each image or adapter")

    push = commands.add_parser("push", help="put an adapter's folder on the Hub")
    push.set_defaults(run=_push)
    push.add_argument("folder", metavar="DIR", help="folder written by save_pretrained or by a training run")
    push.add_argument("repo_id", metavar="ID", help="name on the Hub, like me/birds")
    push.add_argument("--private", action="store_true", default=None, help="only you and your organization see it")
    push.add_argument("--revision", metavar="R", help="branch to push to (default: main)")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of pushing to the branch")
    push.add_argument("--message", metavar="M", help="of the commit")
    push.add_argument(
        "--base-model-id", metavar="ID", help="the base model on the Hub, if the adapter names a local folder"
    )
    push.add_argument("--include-base", action="store_true", help="push the base model along")
    push.add_argument("--license", metavar="L", help="for the card, like apache-2.0")
    push.add_argument("--token", metavar="T", help="instead of that of `hf auth login`")
    return parser


def _train(args: argparse.Namespace) -> int:
    _check_extra("train")
    from cl_prompts.runs.train import main as train  # imports the trainer, which other commands do not need

    train(args.words)
    return 0


def _compare(args: argparse.Namespace) -> int:
    _check_extra("compare")
    from cl_prompts.runs.comparison import main as compare

    compare(args.words)
    return 0


def _check_extra(command: str) -> None:
    missing = [name for name in ("matplotlib", "sklearn", "tqdm") if find_spec(name) is None]
    if missing:
        raise ImportError(f"{command} needs {', '.join(missing)}: pip install 'cl-prompts[train]'")


def _predict(args: argparse.Namespace) -> int:
    if args.batch_size < 1 or args.top_k < 1:
        raise ValueError(f"--batch-size {args.batch_size} and --top-k {args.top_k} must be at least 1")
    pipe = PromptPoolPipeline.from_pretrained(
        args.adapter,
        base=args.base,
        revision=args.revision,
        batch_size=args.batch_size,
        device=args.device,
        max_pixels=args.max_pixels,
    )
    failed = False
    for start in range(0, len(args.images), args.batch_size):
        names, prepared = [], []
        for name in args.images[start : start + args.batch_size]:
            try:
                prepared.append(pipe.preprocess(name))
                names.append(name)
            except ValueError as error:
                _print_to_stderr(error)
                failed = True
        for name, answer in zip(names, pipe.classify(prepared, args.top_k), strict=True):
            if args.json:
                print(json.dumps({"image": name, "predictions": answer}))
            else:
                for a in answer:
                    print(terminal_text(f"{name}  {a['score']:6.1%}  {terminal_text(a['label'], LONGEST_NAME)}"))
    return int(failed)


def _learn(args: argparse.Namespace) -> int:
    from cl_prompts.cli.learn import learn  # imports the trainer, which other commands do not need

    name = Path(args.adapter).resolve().name if Path(args.adapter).exists() else args.adapter.rpartition("/")[2]
    folder = args.output or f"{name}-{Path(args.folder).resolve().name}"
    settings = {"num_train_epochs": args.epochs, "batch_size": args.batch_size, "learning_rate": args.learning_rate}
    done = learn(
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


def _evaluate(args: argparse.Namespace) -> int:
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


def _inspect(args: argparse.Namespace) -> int:
    facts = describe_adapter(args.adapter, revision=args.revision)
    print(json.dumps(facts, indent=1) if args.json else "\n".join(terminal_text(line) for line in _lines(facts)))
    return 0


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    base = facts["base_model"]
    images = "x".join(map(str, base["image_size"])) if base["image_size"] else "of any size"
    yield f"method    {facts['title']}"
    yield from (f"paper     {paper}" for paper in facts["papers"])
    yield f"base      {base['name'] or 'not named'}" + (f" at {base['revision']}" if base["revision"] else "")
    kind = f"{base['class']}, {base['blocks']} blocks of width {base['width']}, {base['heads']} heads"
    yield f"          {kind}; images {images}"
    yield f"head      {facts['head']}, reads {facts['readout']}"
    temperature = facts["temperature"]
    yield f"scores    calibrated, temperature {temperature:.3g}" if temperature else "scores    not calibrated"
    yield f"format    {facts['format_version']}, written by cl_prompts {facts['written_by'] or 'unknown'}"
    yield f"tasks     {len(facts['tasks'])}" + (", the last still open" if facts["task_open"] else "")
    for number, task in enumerate(facts["tasks"], 1):
        yield f"  {number}: " + ", ".join(terminal_text(c["name"] or str(c["id"]), LONGEST_NAME) for c in task)
    if facts["num_labels"] is not None:
        yield f"  task-free, {facts['num_labels']} classes"
    yield "settings"
    yield from (f"  {name} = {value}" for name, value in facts["settings"].items())
    yield f"size      {facts['numbers']:,} numbers, {facts['bytes']:,} bytes"
    for name, part in facts["parts"].items():
        yield f"  {name}: {part['numbers']:,} numbers, {part['bytes']:,} bytes"
    for name, figures in facts["figures"].items():
        headings = {"faa": "FAA", "caa": "CAA", "forgetting": "forgetting", "learning_accuracy": "when just learned"}
        yield f"figures   {name}: " + ", ".join(f"{words} {figures[key]:.1f}" for key, words in headings.items())


def _push(args: argparse.Namespace) -> int:
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


@contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Print this library's warnings as one line each on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as DeprecationWarning of other libraries
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_: _print_to_stderr(message, "warning: ")
        yield


def _print_to_stderr(message: Warning | str | Exception, kind: str = "") -> None:
    text = str(message) or type(message).__name__
    print(terminal_text(f"cl-prompts: {kind}{' '.join(text.split())}"), file=sys.stderr)
