"""The settings of a run: defaults, overridden by a recipe, overridden by the command line."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from accelerate.tracking import get_available_trackers
from images import SCENARIOS
from transformers import HfArgumentParser

from cl_prompts.baselines import BASELINES
from cl_prompts.continual import ContinualArguments
from cl_prompts.heads import CLASSIFIERS
from cl_prompts.methods import METHODS
from cl_prompts.runtime.images import MAX_PIXELS


HERE = Path(__file__).parent
RECIPES = HERE / "recipes"
PAIRS = ("config", "learning_rates", "optim_args")  # lists of name=value, mappings in recipes


def setting(default: Any, text: str) -> Any:
    """A field with a help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class Arguments:
    """Settings of a run. A recipe overrides the defaults; the command line overrides the recipe."""

    recipe: str = setting("digits", "name in examples/recipes, or a YAML file")
    output: str | None = setting(None, "results folder; default: results/<recipe>-<method>-seed<seed>")
    resume: bool = setting(False, "continue the run in the results folder from its last checkpoint")

    model: str = setting(str(HERE / "micro_vit"), "Hub id or folder of a vision transformer")
    attention: str = setting("sdpa", "sdpa or eager; eager trains faster on CPUs in bf16, whose fused backward is slow")
    shard_backbone: bool = setting(False, "shard the frozen backbone's blocks over the processes, to save memory")
    dataset: list[str] = field(
        default_factory=lambda: ["digits"],
        metadata={"help": "digits, Hub ids, folders of parquet files or of image folders; several for domains or datasets"},
    )
    streaming: bool = setting(False, "read the data set in order instead of loading it; for scenarios class, domain")
    train_images: list[int] = field(
        default_factory=list, metadata={"help": "training images of each task, which cannot be counted while streaming"}
    )
    image_column: str | None = setting(None, "default: the data set's image column")
    label_column: str | None = setting(None, "default: the data set's label column")
    held_out: float = setting(0.0, "test on this share of the training images instead: for choosing settings")
    input_range: str = setting("processor", "processor: the model's own mean and std; unit: [0, 1], as the papers")
    resample: str = setting("processor", "processor, bilinear or bicubic")
    augment: bool = setting(False, "random crops and flips of training images")
    crop_scale: float = setting(0.05, "smallest crop, as a share of the image's area")
    views: int = setting(0, "crops per image, one per epoch in turn, so that queries can be cached; 0: new ones each epoch")
    augment_on_device: bool = setting(False, "crop batches of resized images on the model's device")
    on_bad_image: str = setting("stop", "stop or skip (and count) images that cannot be read")
    max_pixels: int = setting(MAX_PIXELS, "images with more pixels cannot be read")

    scenario: str = setting("class", "what is new in each task: " + ", ".join(SCENARIOS))
    joint: bool = setting(False, "train on all images in one task: an upper bound for continual learning")
    tasks: list[int] = field(
        default_factory=lambda: [5],
        metadata={"help": "number of tasks, or the number of classes of each; for scenario class"},
    )
    shuffle_classes: bool = setting(False, "class order by seed instead of ascending; for scenarios class and gaussian")
    domain_column: str | None = setting(None, "column of the domain, where one data set holds all of them")
    order: list[str] = field(
        default_factory=list, metadata={"help": "domains or data sets in order; default: the order of the data"}
    )
    common_test: bool = setting(False, "test all domains on one test set")
    width: float = setting(0.05, "standard deviation of a class's times, as a share of the stream; for scenario gaussian")

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

    num_train_epochs: int = setting(5, "epochs per task")
    batch_size: int = setting(64, "images of an optimizer step, over all processes")
    gradient_accumulation_steps: int = setting(1, "micro-batches per batch: less memory, for most methods the same step")
    optim: str = setting("adam", "adam, adamw or sgd, a new one for every task")
    optim_args: list[str] = field(
        default_factory=list, metadata={"help": "further options of torch's optimizer: weight_decay=0.01"}
    )
    keep_optimizer: bool = setting(False, "carry the optimizer's state from task to task")
    learning_rate: float = setting(5e-3, "learning rate")
    learning_rates: list[str] = field(
        default_factory=list, metadata={"help": "other rates by group: head=1e-3 prompts=1e-2"}
    )
    max_grad_norm: float = setting(1.0, "largest gradient norm; 0: no clipping")
    lr_scheduler_type: str = setting("constant", "constant, cosine, linear or coda; restarted for every task")
    warmup_steps: int = setting(0, "steps of a linear warm-up at the start of every task")
    mixed_precision: str = setting("no", "no, bf16 or fp16")
    cache_queries: bool = setting(True, "compute un-prompted features once if images repeat (no --augment, or --views)")
    query_cache: str | None = setting(
        None, "folder of these features, shared by runs; default: $CL_PROMPTS_CACHE/queries, else in memory only"
    )
    query_cache_bytes: int = setting(8 * 2**30, "limit on the size of that folder")
    memory_size: int = setting(0, "images kept for rehearsal in total")
    memory_per_class: int = setting(0, "images kept for rehearsal per class")
    memory_batch_size: int | None = setting(None, "rehearsed images added to each batch; default: batch_size")
    forward_transfer: bool = setting(False, "also evaluate a task before it is trained, if its classes are known")
    seed: int = setting(0, "random seed")
    dataloader_num_workers: int = setting(0, "data loader processes")
    logging_steps: int = setting(20, "steps between two log entries")
    save_steps: int = setting(100, "steps between two checkpoints; 0: only after every task")
    trackers: list[str] = field(
        default_factory=list, metadata={"help": "tensorboard, wandb, trackio, ... besides log.jsonl"}
    )

    @property
    def folder(self) -> Path:
        """The results folder."""
        return Path(self.output or f"results/{Path(self.recipe).stem}-{self.method}-seed{self.seed}")

    @property
    def rehearses(self) -> bool:
        """Whether images of earlier tasks are kept."""
        return bool(self.memory_size or self.memory_per_class)

    def of_trainer(self) -> ContinualArguments:
        """The trainer's settings.

        Raises:
            ValueError: a setting is out of range.
        """
        own = {f.name: getattr(self, f.name) for f in fields(ContinualArguments) if f.name != "output_dir"}
        own |= {name: pairs(own[name]) for name in ("learning_rates", "optim_args")}
        return ContinualArguments(output_dir=str(self.folder), **own)


def read_arguments(line: Sequence[str] | None = None) -> Arguments:
    """Read the settings from defaults, recipe and command line `line` (None: that of this process).

    Exits with a message if a recipe or a setting does not exist.
    """
    parser = HfArgumentParser(Arguments, description="Continual learning with a prompt pool. " + str(Arguments.__doc__))
    words = list(sys.argv[1:] if line is None else line)
    first, unknown_words = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown_words:
        sys.exit(f"no such arguments: {unknown_words}; --help lists them all")
    path = Path(first.recipe) if first.recipe.endswith((".yaml", ".yml")) else RECIPES / f"{first.recipe}.yaml"
    if not path.is_file():
        sys.exit(f"no recipe {first.recipe!r}: choose one of {known_recipes()} or name a YAML file")
    settings = yaml.safe_load(path.read_text()) or {}
    unknown = sorted(set(settings) - {f.name for f in fields(Arguments)})
    if unknown:
        sys.exit(f"{path} sets {unknown}, which are no arguments of this script")
    settings = {name: as_words(name, value) for name, value in settings.items()}
    parser.set_defaults(**{name: value for name, value in settings.items() if name not in PAIRS})
    arguments: Arguments = parser.parse_args_into_dataclasses(words)[0]
    # A recipe's pairs are for its own method (or optimizer). The command line overrides single pairs.
    owner = {"config": "method", "learning_rates": "method", "optim_args": "optim"}
    for name in PAIRS:
        same = getattr(arguments, owner[name]) == settings.get(owner[name], getattr(Arguments(), owner[name]))
        setattr(arguments, name, merged(settings.get(name, []) if same else [], getattr(arguments, name)))
    check(arguments)
    return arguments


def check(arguments: Arguments) -> None:
    """Exit with a message if a setting is invalid. Settings of the method and the data are checked later."""
    for name, known in (
        ("scenario", SCENARIOS),
        ("method", sorted({*METHODS, *BASELINES})),
        ("trackers", [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]),
        ("extra_classifiers", sorted(CLASSIFIERS)),
    ):
        value = getattr(arguments, name)
        absent = sorted(set(value if isinstance(value, list) else [value]) - set(known))
        if absent:
            sys.exit(f"--{name} {' '.join(absent)}: there is {', '.join(known)}" + " (installed)" * (name == "trackers"))
    crops = [name for name in ("views", "augment_on_device") if getattr(arguments, name) != getattr(Arguments, name)]
    if crops and not arguments.augment:
        sys.exit(
            f"--{crops[0]} {getattr(arguments, crops[0])} has no effect without --augment True: add that, or leave it out"
        )
    if arguments.method in BASELINES and arguments.shard_backbone:
        sys.exit(f"--shard_backbone needs a prompt method, whose backbone is frozen: leave it out for {arguments.method}")
    if arguments.method in BASELINES and BASELINES[arguments.method].needs_memory and not arguments.rehearses:
        sys.exit(f"{arguments.method} needs remembered images: set --memory_size or --memory_per_class")
    try:
        arguments.of_trainer()
    except ValueError as error:
        sys.exit(str(error))


def known_recipes() -> list[str]:
    """Names of the recipes of single runs."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("compare"))


def as_words(name: str, value: Any) -> Any:
    """A recipe's value in the form of the command line: a list if the flag takes several words."""
    if name in PAIRS and isinstance(value, dict):
        return [f"{key}={as_word(entry)}" for key, entry in value.items()]
    several = isinstance(getattr(Arguments(), name), list)
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


def as_dict(arguments: Arguments) -> dict[str, Any]:
    """A JSON-able copy."""
    return asdict(arguments)
