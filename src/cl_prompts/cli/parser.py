"""The arguments of the command. Imports no other library, so that `cl-prompts --help` takes no time."""

from __future__ import annotations

import argparse

from cl_prompts.version import __version__


def new_parser() -> argparse.ArgumentParser:
    """The parser of all commands. `command` of what it parses is the name of a function of `cl_prompts.cli.commands`."""
    parser = argparse.ArgumentParser(prog="cl-prompts", description="Prompt pools for frozen vision transformers.")
    parser.add_argument("--version", action="version", version=f"cl-prompts {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    commands.add_parser(
        "train", help="teach a vision transformer task after task; without arguments numbers, in two minutes"
    )
    commands.add_parser("compare", help="train with several methods and seeds, and write a table")
    predict = commands.add_parser("predict", help="the most likely classes of images")
    predict.set_defaults(command="predict")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="file or URL")
    predict.add_argument("--adapter", required=True, metavar="ID", help="folder or Hub id")
    predict.add_argument("--base", metavar="ID", help="base model instead of the one the adapter names: folder or Hub id")
    predict.add_argument("--top-k", type=int, default=5, metavar="N", help="classes for each image (default: %(default)s)")
    predict.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at a time (default: %(default)s)")
    predict.add_argument("--max-pixels", type=int, metavar="N", help="larger images are refused (default: 50 million)")
    predict.add_argument(
        "--unknown", choices=("flag", "refuse"), help="mark images that are probably of none of the classes, or refuse them"
    )
    predict.add_argument("--device", metavar="D", help="like cpu, cuda or mps (default: cpu)")

    learn = commands.add_parser("learn", help="teach an adapter new classes from a folder of images, as its next task")
    learn.set_defaults(command="learn")
    learn.add_argument("folder", metavar="FOLDER", help="has a folder of images for each new class, or those of one class")
    learn.add_argument("--output", metavar="DIR", help="of the new adapter (default: ADAPTER-FOLDER)")
    learn.add_argument("--check", metavar="FOLDER", help="images of known and new classes to measure the accuracy on")
    learn.add_argument("--epochs", type=int, metavar="N", help="passes over the images (default: as in its training)")
    learn.add_argument("--batch-size", type=int, metavar="N", help="images of a step (default: as in its training)")
    learn.add_argument("--learning-rate", type=float, metavar="R", help="(default: as in its training)")
    learn.add_argument("--seed", type=int, default=0, metavar="N", help="of orders and new values (default: %(default)s)")

    evaluate = commands.add_parser("evaluate", help="accuracy on a folder that has a folder of images for each class")
    evaluate.set_defaults(command="evaluate")
    evaluate.add_argument("folder", metavar="FOLDER", help="its folders are named like the adapter's classes")
    evaluate.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at a time (default: %(default)s)")
    for command in (learn, evaluate):
        command.add_argument("--adapter", required=True, metavar="ID", help="folder or Hub id")
        command.add_argument("--base", metavar="ID", help="base model instead of the one the adapter names")
        command.add_argument("--device", metavar="D", help="like cpu, cuda or mps (default: cpu)")

    inspect = commands.add_parser("inspect", help="method, tasks, classes, sizes and figures; no base model is loaded")
    inspect.set_defaults(command="inspect")
    inspect.add_argument("adapter", metavar="ID", help="folder or Hub id")
    for command in (predict, learn, evaluate, inspect):
        command.add_argument("--revision", metavar="R", help="branch, tag or commit of the adapter on the Hub")
        command.add_argument("--json", action="store_true", help="for programs: one JSON object for each image or adapter")

    push = commands.add_parser("push", help="put an adapter's folder on the Hub")
    push.set_defaults(command="push")
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

    convert = commands.add_parser("convert", help="a checkpoint of timm, Google, DINO, iBOT or MoCo v3 as a base model")
    convert.set_defaults(command="convert")
    convert.add_argument("source", metavar="SOURCE", help="a .npz, .safetensors or torch file, or a folder that has one")
    convert.add_argument("destination", metavar="DESTINATION", help="new folder, for --base and --model")
    convert.add_argument("--num-heads", type=int, metavar="N", help="attention heads (default: as usual for the width)")
    convert.add_argument(
        "--normalization", choices=("half", "imagenet"), help="of the images (default: as the layout usually has it)"
    )
    convert.add_argument("--without-head", action="store_true", help="leave a classifier out")
    convert.add_argument("--prefix", metavar="P", help="start of the names of the network, where a file holds several")
    return parser
