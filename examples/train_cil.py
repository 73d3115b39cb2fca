"""Class-incremental learning with a prompt pool on a frozen vision transformer.

    accelerate launch examples/train_cil.py                                   # digits on the micro ViT, two minutes
    accelerate launch examples/train_cil.py --model google/vit-base-patch16-224-in21k --dataset path/to/images
    accelerate launch examples/train_cil.py --recipe l2p_cifar100 --seed 1    # a YAML of examples/recipes, overridden
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/train_cil.py # two processes on one CPU

Every task brings new classes; old images are gone; at test nobody says which task an image belongs to. The results folder
holds the adapter, the accuracy matrix, the table and three plots. Three references on the same frozen features stand in the
table: a prompt pool that does not beat them is not worth its training.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from images import ImageData, load_image_data
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel, HfArgumentParser

from cl_prompts import PromptPoolConfig, PromptPoolModel, get_prompt_pool_model
from cl_prompts.configs import METHODS
from cl_prompts.continual import (
    AccuracyMatrix,
    ClassIncrementalStream,
    Evaluation,
    FrozenFeatures,
    evaluate,
    joint_linear_probe,
    nearest_class_mean,
    sequential_probe,
    split_classes,
    stream_features,
)
from cl_prompts.diagnostics import prompt_similarity, selection_counts, selection_summary
from cl_prompts.plots import draw, draw_selection
from cl_prompts.report import result_table


HERE = Path(__file__).parent


@dataclass
class Arguments:
    """Everything a run depends on. A recipe sets some of them; the command line has the last word."""

    recipe: str = field(default="digits", metadata={"help": "name in examples/recipes, or a YAML file"})
    model: str = field(default=str(HERE / "micro_vit"), metadata={"help": "Hub id or folder of a vision transformer"})
    attention: str = field(
        default="sdpa",
        metadata={"help": "sdpa or eager; eager trains faster on CPUs in bf16, whose fused backward is slow"},
    )
    dataset: str = field(
        default="digits", metadata={"help": "digits, a Hub id, a folder of parquet files, or a folder of image folders"}
    )
    image_column: str | None = field(default=None, metadata={"help": "default: the data set's image column"})
    label_column: str | None = field(default=None, metadata={"help": "default: the data set's label column"})
    held_out: float = field(
        default=0.0, metadata={"help": "test on this share of the training images instead: for choosing settings"}
    )
    input_range: str = field(
        default="processor", metadata={"help": "processor: the model's own mean and std; unit: [0, 1], as the papers"}
    )
    resample: str = field(default="processor", metadata={"help": "processor, bilinear or bicubic"})

    method: str = field(default="hash", metadata={"help": "one of " + ", ".join(sorted(METHODS))})
    config: list[str] = field(
        default_factory=list, metadata={"help": "fields of the method's config: pool_size=20 layers=[0,1,2]"}
    )
    tasks: int = field(default=5, metadata={"help": "number of tasks"})
    shuffle_classes: bool = field(default=False, metadata={"help": "class order by seed instead of ascending"})

    epochs: int = field(default=5, metadata={"help": "epochs per task"})
    batch_size: int = field(default=64, metadata={"help": "images of a global batch, over all processes"})
    lr: float = field(default=5e-3, metadata={"help": "learning rate of Adam, rebuilt for every task"})
    lrs: list[str] = field(default_factory=list, metadata={"help": "other rates by group: head=1e-3 prompts=1e-2"})
    clip: float = field(default=1.0, metadata={"help": "largest gradient norm; 0: no clipping"})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16"})
    seed: int = field(default=0, metadata={"help": "seed of everything"})
    workers: int = field(default=0, metadata={"help": "loader processes"})
    output: str | None = field(default=None, metadata={"help": "results folder; default: results/<recipe>-<method>"})


def read_arguments() -> Arguments:
    """Defaults, then the recipe, then the command line."""
    parser = HfArgumentParser(Arguments, description=__doc__.split("\n\n")[0] if __doc__ else None)
    recipe = parser.parse_args_into_dataclasses(return_remaining_strings=True)[0].recipe
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else HERE / "recipes" / f"{recipe}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in (HERE / "recipes").glob("*.yaml"))
        sys.exit(f"no recipe {recipe!r}: choose one of {known} or name a YAML file")
    settings = yaml.safe_load(path.read_text()) or {}
    unknown = sorted(set(settings) - set(asdict(Arguments())))
    if unknown:
        sys.exit(f"{path} sets {unknown}, which are no arguments of this script")
    for name in ("config", "lrs"):
        if isinstance(settings.get(name), dict):
            settings[name] = [f"{key}={value}" for key, value in settings[name].items()]
    parser.set_defaults(**settings)
    arguments: Arguments = parser.parse_args_into_dataclasses()[0]
    if arguments.method != settings.get("method", arguments.method):
        # The recipe's settings are those of its method; what is given for another one comes from the command line.
        parser.set_defaults(config=[], lrs=[])
        arguments = parser.parse_args_into_dataclasses()[0]
    return arguments


def pairs(items: list[str]) -> dict[str, Any]:
    """["a=1", "b=[2, 3]"] -> {"a": 1, "b": [2, 3]}."""
    if any("=" not in item for item in items):
        sys.exit(f"expected name=value, got {[item for item in items if '=' not in item]}")
    values = {name: yaml.safe_load(value) for name, _, value in (item.partition("=") for item in items)}
    return {name: float(v) if isinstance(v, str) and v[:1].isdigit() else v for name, v in values.items()}  # 1e-3


def load_backbone(name: str, attention: str) -> Any:
    """A frozen backbone without the pooler that many checkpoints lack and transformers then makes up."""
    config = AutoConfig.from_pretrained(name)
    config = getattr(config, "vision_config", config)
    takes = signature(AutoModel._model_mapping[type(config)].__init__).parameters
    options = {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
    return AutoModel.from_pretrained(name, config=config, attn_implementation=attention, **options)


def train_task(
    accelerator: Accelerator,
    model: PromptPoolModel,
    stream: ClassIncrementalStream,
    task: Any,
    args: Arguments,
    features: torch.Tensor,
) -> None:
    """Learn one task. The model has begun it; what begin_task added is wrapped and optimized from here on.

    Images are not augmented, so their un-prompted `features` are the queries of every epoch, where the method asks for any.
    """
    optimizer = torch.optim.Adam(model.parameter_groups(args.lr, **pairs(args.lrs)))
    model.attach_optimizer(optimizer)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    wrapped.train()
    queries = features if model.needs_query else None  # known now: some methods ask in tasks only, or in training only
    steps = args.epochs * -(-len(task.train_rows) // args.batch_size)
    bar = tqdm(
        total=steps,
        desc=f"task {task.number + 1}/{len(stream)}",
        unit="step",
        leave=False,
        disable=not accelerator.is_local_main_process,
    )
    for epoch in range(args.epochs):
        batches = stream.train_batches(
            task, args.batch_size, seed=args.seed, epoch=epoch, queries=queries, workers=args.workers
        )
        for batch in batches:
            on_device = {k: v.to(accelerator.device) if torch.is_tensor(v) else v for k, v in batch.items()}
            loss = wrapped(**on_device).loss
            accelerator.backward(loss)
            if args.clip:
                accelerator.clip_grad_norm_(wrapped.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            if bar.n % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
                model.check_labels()
    bar.close()
    accelerator.free_memory()


def references(
    stream: ClassIncrementalStream, train: torch.Tensor, test: torch.Tensor, config: PromptPoolConfig, args: Arguments
) -> dict[str, AccuracyMatrix]:
    """Comparison learners on the frozen features of the same images, with the head's own learning rate."""
    data = FrozenFeatures(
        [(train[task.train_rows], torch.as_tensor(stream.train_labels[task.train_rows])) for task in stream],
        [(test[task.test_rows], torch.as_tensor(stream.test_labels[task.test_rows])) for task in stream],
    )
    lr = pairs(args.lrs).get("head", args.lr)
    settings: dict[str, Any] = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": lr, "seed": args.seed}
    found = {"sequential linear probe": sequential_probe(data, **settings)}
    if config.head == "cosine":
        found["sequential cosine probe"] = sequential_probe(data, **settings, cosine_scale=config.head_scale)
    found["nearest class mean"] = nearest_class_mean(data)
    found["joint linear probe"] = joint_linear_probe(data, **settings)
    return found


def report_selection(model: PromptPoolModel, measured: list[Evaluation], output: Path) -> str:
    """Draw which prompts the last evaluation chose for which task; a few lines on it, none where a method chooses none."""
    chosen = [m.prompt_ids for m in measured if m.prompt_ids is not None]
    if not chosen:
        return ""
    tasks = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(ids) for ids in chosen]))
    size = model.adapter.pool.prompt_table().shape[1]
    counts = selection_counts(torch.cat(chosen), tasks, size)
    similarity = prompt_similarity(model) if size <= 1000 else None  # one number for every two prompts
    draw_selection(counts, similarity, output)
    return selection_summary(counts, similarity)


def main() -> None:
    """Run a stream of tasks and write its results."""
    args = read_arguments()
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    started = time.perf_counter()

    backbone = load_backbone(args.model, args.attention)
    processor = AutoImageProcessor.from_pretrained(args.model)
    data: ImageData = load_image_data(args.dataset, args.image_column, args.label_column, args.held_out, args.seed)
    stream = ClassIncrementalStream(
        data.train,
        data.test,
        split_classes(data.classes, args.tasks, args.seed if args.shuffle_classes else None),
        data.transform(processor, args.input_range, args.resample),
        image_column=data.image_column,
        label_column=data.label_column,
    )

    config = PromptPoolConfig(method=args.method, **pairs(args.config))
    model = get_prompt_pool_model(backbone, config).to(accelerator.device)

    def features(train: bool) -> torch.Tensor:
        batches = stream.all_images(train=train, batch_size=args.batch_size, workers=args.workers)
        bar = tqdm(batches, desc="frozen features", leave=False, disable=not accelerator.is_local_main_process)
        with accelerator.autocast():
            return stream_features(model, bar, len(data.train if train else data.test), accelerator.device)

    train_features, test_features = features(train=True), features(train=False)
    results = {args.method: AccuracyMatrix(), **references(stream, train_features, test_features, config, args)}

    for task in stream:
        model.begin_task(task.classes, class_names=data.names(task.classes))
        train_task(accelerator, model, stream, task, args, train_features)
        model.end_task()
        model.eval()
        with accelerator.autocast():
            measured = [
                evaluate(
                    model,
                    stream.test_batches(seen, args.batch_size, workers=args.workers),
                    model.classes,
                    accelerator.device,
                )
                for seen in stream.tasks[: task.number + 1]
            ]
        results[args.method].add([m.accuracy for m in measured], [m.images for m in measured])
        row = " ".join(f"{m.accuracy:5.1f}" for m in measured)
        accelerator.print(
            f"after task {task.number + 1}: average {results[args.method].curve()[-1]:5.1f} %   by task: {row}"
        )

    seconds = time.perf_counter() - started
    table = result_table(results, {args.method: sum(p.numel() for p in model.parameters() if p.requires_grad)})
    accelerator.print(f"\n{table}\n")
    faa, probe = (results[name].summary()["faa"] for name in (args.method, "sequential linear probe"))
    if faa <= probe:
        accelerator.print(f"{args.method} does not beat the sequential linear probe here ({faa:.1f} against {probe:.1f})")

    if accelerator.is_main_process:
        output = Path(args.output or f"results/{Path(args.recipe).stem}-{args.method}")
        output.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(output / "adapter")
        processor.save_pretrained(output / "adapter")
        settings = asdict(args) | {"seconds": round(seconds, 1), "processes": accelerator.num_processes}
        matrices = {name: matrix.to_dict() for name, matrix in results.items()}
        (output / "results.json").write_text(json.dumps({"arguments": settings, "results": matrices}, indent=1))
        lines = [table, report_selection(model, measured, output), f"{seconds:.0f} s, arguments in results.json\n"]
        (output / "results.md").write_text("\n\n".join(filter(None, lines)))
        draw(results, output)
        accelerator.print(f"{seconds:.0f} s; results, plots and adapter in {output}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
