"""The settings of a run: defaults, overridden by a recipe, overridden by the command line."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from accelerate.tracking import get_available_trackers
from transformers import HfArgumentParser

from cl_prompts.baselines import BASELINES
from cl_prompts.continual import ContinualArguments
from cl_prompts.continual.arguments import key_values
from cl_prompts.heads import CLASSIFIERS
from cl_prompts.methods import METHODS
from cl_prompts.runs import BENCHMARKS, MICRO_VIT, RECIPES
from cl_prompts.runs.images import EMBEDDED, InputRange, OnBadImage, Resample, Scenario
from cl_prompts.runtime.images import MAX_PIXELS


FAST_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where it is installed
OPTIONS = ("config", "learning_rates", "optim_args")  # mappings in recipes
T = TypeVar("T")
Attention = Literal["sdpa", "eager"]


def setting(default: Any, text: str) -> Any:
    """A field with a help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class Arguments:
    """Settings of a run besides those of its trainer, `ContinualArguments`.

    A recipe overrides the defaults; the command line overrides the recipe. Without output_dir the results folder is
    results/<recipe>-<method>-seed<seed>, or results/<dataset>-<method>-seed<seed> if no recipe is named.
    """

    recipe: str | None = setting(
        None,
        "a recipe by name, or a YAML file; default: that of the embedded data, or of method and benchmark, else photos",
    )
    benchmark: str | None = setting(None, f"data and tasks of a benchmark of the papers: {', '.join(sorted(BENCHMARKS))}")
    resume: bool = setting(False, "continue the run in the results folder from its last checkpoint")

    model: str = setting(str(MICRO_VIT), "Hub id or folder of a vision transformer")
    attention: Attention = setting("sdpa", "eager trains faster on CPUs in bf16, whose fused backward is slow")
    shard_backbone: bool = setting(False, "shard the frozen backbone's blocks over the processes, to save memory")
    dataset: list[str] = field(
        default_factory=lambda: ["numbers"],
        metadata={"help": "numbers, digits, Hub ids, folders of parquet files or images; several for domains or datasets"},
    )
    streaming: bool = setting(False, "read the data set in order instead of loading it; for scenarios class, domain")
    train_images: list[int] = field(
        default_factory=list, metadata={"help": "training images of each task, which cannot be counted while streaming"}
    )
    image_column: str | None = setting(None, "default: the data set's image column")
    label_column: str | None = setting(None, "default: the data set's label column")
    held_out: float = setting(0.0, "test on this share of the training images instead: for choosing settings")
    input_range: InputRange = setting("processor", "processor: the model's own mean and std; unit: [0, 1], as the papers")
    resample: Resample = setting("processor", "how images are resized; processor: as the model's own processor does")
    augment: bool = setting(False, "random crops and flips of training images")
    crop_scale: float = setting(0.05, "smallest crop, as a share of the image's area")
    views: int = setting(0, "crops per image, one per epoch in turn, so that queries can be cached; 0: new ones each epoch")
    augment_on_device: bool = setting(False, "crop batches of resized images on the model's device")
    on_bad_image: OnBadImage = setting("stop", "at images that cannot be read; skip counts them")
    max_pixels: int = setting(MAX_PIXELS, "images with more pixels cannot be read")

    scenario: Scenario = setting("class", "what is new in each task; gaussian: no tasks, classes come and go")
    joint: bool = setting(False, "train on all images in one task: an upper bound for continual learning")
    tasks: list[int] = field(
        default_factory=lambda: [5],
        metadata={"help": "number of tasks, or the number of classes of each; for scenario class"},
    )
    class_order: list[str] = field(
        default_factory=lambda: ["natural"],
        metadata={
            "help": "natural (ascending), seed, pilot or coda (as these releases draw it), all classes, or a file that "
            "lists them; for scenarios class and gaussian"
        },
    )
    domain_column: str | None = setting(None, "column of the domain, where one data set holds all of them")
    order: list[str] = field(
        default_factory=list, metadata={"help": "domains or data sets in order; default: the order of the data"}
    )
    common_test: bool = setting(False, "test all domains on one test set")
    width: float = setting(0.05, "standard deviation of a class's times, as a share of the stream; for scenario gaussian")
    parts: int = setting(1, "cut the stream into so many tasks with overlapping classes; for scenario gaussian")

    method: str = setting(
        "hash",
        f"a prompt method ({', '.join(sorted(METHODS))}) or a baseline ({', '.join(sorted(BASELINES))})",
    )
    extra_classifiers: list[str] = field(
        default_factory=list,
        metadata={"help": f"classifiers to evaluate on the same features: {', '.join(sorted(CLASSIFIERS))}"},
    )
    config: list[str] = field(
        default_factory=list, metadata={"help": "settings of the method: pool_size=20 layers=[0,1,2]"}
    )

    trackers: list[str] = field(
        default_factory=list, metadata={"help": "tensorboard, wandb, trackio, ... besides log.jsonl"}
    )


class OneLineParser(HfArgumentParser):
    """A parser that exits with the message of an error alone: its usage fills a screen."""

    def error(self, message: str) -> NoReturn:
        """Exit with the message."""
        sys.exit(message)


def read_arguments(line: Sequence[str] | None = None, command: str | None = None) -> tuple[Arguments, ContinualArguments]:
    """Read the settings from defaults, recipe and command line. Exits with a message if one does not exist or is invalid.

    Args:
        line: words of the command line; None: those of this process.
        command: name of the command in its help; None: that of this process.
    """
    parser = OneLineParser((Arguments, ContinualArguments), description=Arguments.__doc__, prog=command)
    add_help(parser, ContinualArguments)
    words = list(sys.argv[1:] if line is None else line)
    first, unknown_words = parser.parse_known_args(words)
    if unknown_words:
        sys.exit(f"no such arguments: {unknown_words}; --help lists them all")
    path = recipe_file(first)
    settings = read_recipe(path)
    if first.benchmark is not None and path.stem != f"{first.method}_{first.benchmark}":
        settings |= read_recipe(BENCHMARKS[first.benchmark])
    unknown = sorted(set(settings) - {f.name for kind in (Arguments, ContinualArguments) for f in fields(kind)})
    if unknown:
        sys.exit(f"{path} sets {unknown}, which are no arguments of a run")
    parser.set_defaults(**{name: as_words(name, value) for name, value in settings.items() if name not in OPTIONS})
    arguments, training = validated(lambda: parser.parse_args_into_dataclasses(words))
    # Options in a recipe are for its own method (or optimizer). The command line overrides single ones.
    of_method = settings.get("method", Arguments.method) == arguments.method
    of_optim = settings.get("optim", ContinualArguments.optim) == training.optim
    if of_method:
        arguments.config = merged(as_words("config", settings.get("config", [])), arguments.config)
    options = {
        "learning_rates": settings.get("learning_rates") if of_method else None,
        "optim_args": settings.get("optim_args") if of_optim else None,
    }
    training = validated(
        lambda: replace(
            training,
            output_dir=training.output_dir or f"results/{run_name(arguments, path)}-{arguments.method}-seed{training.seed}",
            **{name: {**key_values(name, value), **getattr(training, name)} for name, value in options.items()},
        )
    )
    check(arguments, training)
    return arguments, training


def recipe_file(arguments: Arguments) -> Path:
    """The recipe that is named, or that for the data set if none is. Exits with a message if there is none."""
    benchmark = arguments.benchmark
    if benchmark is not None and benchmark not in BENCHMARKS:
        sys.exit(f"no benchmark {benchmark!r}: choose one of {sorted(BENCHMARKS)}")
    embedded = len(arguments.dataset) == 1 and arguments.dataset[0] in EMBEDDED and benchmark is None
    name = arguments.recipe or (arguments.dataset[0] if embedded else "photos")
    if arguments.recipe is None and (RECIPES / f"{arguments.method}_{benchmark}.yaml").is_file():
        name = f"{arguments.method}_{benchmark}"
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        sys.exit(f"no recipe {name!r}: choose one of {known_recipes()} or name a YAML file")
    return path


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of a recipe. Exits with a message if the file is no mapping in YAML."""
    try:
        settings = yaml.load(path.read_text(), FAST_LOADER) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        sys.exit(f"{path} cannot be read as YAML: {' '.join(str(error).split())}")
    if not isinstance(settings, dict):
        sys.exit(f"{path} holds no settings: write lines like 'method: l2p'")
    return settings


def run_name(arguments: Arguments, recipe: Path) -> str:
    """First part of the results folder's name: recipe and benchmark, or the data sets if none is named."""
    if arguments.benchmark is not None:
        return "-".join(filter(None, [recipe.stem if arguments.recipe else "", arguments.benchmark]))
    names = [Path(name).name.replace(":", "-") for name in arguments.dataset]
    return recipe.stem if arguments.recipe else "-".join(names)


def add_help(parser: HfArgumentParser, settings: type) -> None:
    """Give the options of a dataclass their help texts: those of its docstring."""
    section = str(inspect.getdoc(settings)).partition("Args:\n")[2].partition("\n\n")[0]
    texts = dict(re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE))
    for action in parser._actions:
        if action.help is None and action.dest in texts:
            action.help = " ".join(texts[action.dest].split()).replace("%", "%%")


def validated(make: Callable[[], T]) -> T:
    """`make()`. Exits with the message of a ValueError."""
    try:
        return make()
    except ValueError as error:
        sys.exit(str(error))


def check(arguments: Arguments, training: ContinualArguments) -> None:
    """Exit with a message if a setting is invalid. Settings of the method and the data are checked later."""
    choices = {name: get_args(kind) for name, kind in get_type_hints(Arguments).items() if get_origin(kind) is Literal}
    for name, known in (
        *choices.items(),
        ("method", sorted({*METHODS, *BASELINES})),
        ("trackers", [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]),
        ("extra_classifiers", sorted(CLASSIFIERS)),
    ):
        value = getattr(arguments, name)
        absent = sorted(set(value if isinstance(value, list) else [value]) - set(known))
        if absent:
            sys.exit(f"--{name} {' '.join(absent)}: there is {', '.join(known)}" + " (installed)" * (name == "trackers"))
    pairs(arguments.config)
    crops = [name for name in ("views", "augment_on_device") if getattr(arguments, name) != getattr(Arguments, name)]
    if crops and not arguments.augment:
        sys.exit(
            f"--{crops[0]} {getattr(arguments, crops[0])} has no effect without --augment True: add that, or leave it out"
        )
    if arguments.train_images and not arguments.streaming:
        sys.exit("--train_images has no effect without --streaming True: add that, or leave it out")
    if arguments.method in BASELINES and arguments.shard_backbone:
        sys.exit(f"--shard_backbone needs a prompt method, whose backbone is frozen: leave it out for {arguments.method}")
    if arguments.method in BASELINES and BASELINES[arguments.method].needs_memory and not training.rehearses:
        sys.exit(f"{arguments.method} needs remembered images: set --memory_size or --memory_per_class")


def known_recipes() -> list[str]:
    """Names of the recipes of single runs."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("compare"))


def as_words(name: str, value: Any) -> Any:
    """A recipe's value in the form of the command line: a list if the flag takes several words."""
    if name == "config" and isinstance(value, dict):
        return [f"{key}={as_word(entry)}" for key, entry in value.items()]
    several = isinstance(getattr(Arguments(), name, None), list)
    return [value] if several and not isinstance(value, list) else value


def as_word(value: Any) -> str:
    """A value as a word that `pairs` reads as the same value: `str(value)`, or JSON if YAML reads that differently."""
    word = str(value)
    return word if isinstance(value, str) or yaml.safe_load(word) == value else json.dumps(value)


def merged(items: Sequence[str], more: Sequence[str]) -> list[str]:
    """["a=1", "b=2"], ["b=3"] -> ["a=1", "b=3"]."""
    return list({item.partition("=")[0]: item for item in [*items, *more]}.values())


def pairs(items: Sequence[str]) -> dict[str, Any]:
    """["a=1", "b=[2, 3]"] -> {"a": 1, "b": [2, 3]}."""
    if any("=" not in item for item in items):
        sys.exit(f"expected name=value, got {[item for item in items if '=' not in item]}")
    values = {name: yaml.safe_load(value) for name, _, value in (item.partition("=") for item in items)}
    return {name: float(v) if isinstance(v, str) and v[:1].isdigit() else v for name, v in values.items()}  # 1e-3


def as_dict(arguments: Arguments, training: ContinualArguments) -> dict[str, Any]:
    """All settings by name, JSON-able."""
    return asdict(arguments) | training.to_dict()
