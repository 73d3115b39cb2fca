"""The model card of an adapter, written from its own files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from cl_prompts.evaluation.plots import draw
from cl_prompts.evaluation.report import LEGEND, Result, comparison_table, headline, matrix_table, remarks
from cl_prompts.methods import PromptPoolConfig
from cl_prompts.runtime.files import write_atomically
from cl_prompts.runtime.text import first_line, markdown_block, markdown_code, markdown_text, plain_text
from cl_prompts.sharing.inspect import bytes_per_class, class_statistics, sizes_of_parts
from cl_prompts.sharing.run_record import RESULTS_FILE, RunRecord
from cl_prompts.storage.adapter_files import AdapterFiles, find_adapter
from cl_prompts.storage.bounded_read import MAX_CARD_BYTES, read_bounded
from cl_prompts.storage.declared import WEIGHTS_FILE
from cl_prompts.storage.integrity import SAVED_PREFIX


CARD_FILE = "README.md"
PICTURES = "*.png"
MAX_HEAD = 2**16  # characters of a card's metadata
MAX_DEPTH = 20  # of metadata
BEGIN = "<!-- Written by cl_prompts from the adapter's files; what stands outside these two lines is kept. -->"
END = "<!-- End of what cl_prompts writes. -->"
TAGS = ("cl_prompts", "continual-learning", "peft", "prompt-pool", "image-classification")
ADAPTER_TAG = "base_model:adapter:"
FIGURES = {
    "faa": "final average accuracy",
    "caa": "mean of the average accuracy over the stages",
    "forgetting": "forgetting",
}
HALVES = {"F16": "float16", "BF16": "bfloat16"}  # by their names in a safetensors header
_OPENING = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
# The rest is left out, so that the card of a large adapter stays below its limit.
CLASSES_SHOWN = 12  # names in a row of the table of tasks
TASKS_SHOWN, MATRIX_TASKS, LEARNERS_SHOWN, SETTINGS_SHOWN, PICTURES_SHOWN = 100, 50, 20, 100, 20


def write_card(folder: str | os.PathLike[str], *, name: str | None = None, license: str | None = None) -> None:
    """Write `README.md` of a local adapter folder, or bring it up to date.

    Only the part between two comment lines and the metadata that this library knows are replaced. The rest stays.

    Args:
        folder: written by `save_pretrained`.
        name: name in the card's code that loads the adapter, like its Hub id; None: the folder's name.
        license: identifier of the Hub, like "apache-2.0"; None: that of the existing card.

    Raises:
        ValueError: the folder holds no adapter, no results where `results.json` is, or a card that cannot be kept.
    """
    folder = Path(folder)
    files = find_adapter(folder)
    config, record = PromptPoolConfig.from_pretrained(files), known_run(files)
    name = name or folder.resolve().name
    file = folder / CARD_FILE
    data, old = _old_card(file)
    text = card_text(config, record, files, name, license or data.get("license"))
    tags = data.get("tags")
    own = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    own = [tag for tag in own if not tag.startswith(ADAPTER_TAG)]  # of a base that may have been another one
    data |= card_metadata(config, record, name).to_dict()
    data["tags"] = sorted({*data["tags"], *own})
    if record is None:
        data.pop("model-index", None)
    if license is not None:
        data["license"] = plain_text(license)
    before, after = _kept(old)
    head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    content = f"---\n{head}---\n{before}{BEGIN}\n\n{text}\n{END}\n{after}".encode(errors="replace")
    if len(content) > MAX_CARD_BYTES:  # the next save could not read it
        raise ValueError(f"{file} would have {len(content):,} bytes, more than {MAX_CARD_BYTES:,}: shorten your text in it")
    write_atomically(file, content)


def _old_card(file: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text of the existing card, which may come from an untrusted source."""
    if not file.exists():
        return {}, ""
    try:
        text = read_bounded(file, MAX_CARD_BYTES).decode("utf-8-sig").replace("\r\n", "\n")
        head = REGEX_YAML_BLOCK.search(text)
        if head is None:
            return {}, text
        _check_head(head[2])
        data = yaml.safe_load(head[2]) or {}
        if not isinstance(data, dict):
            raise ValueError("its metadata has no names")
        return data, text[head.end() :]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = first_line(error)
        raise ValueError(f"{file} is no card that can be kept ({reason}): mend its metadata, or remove it") from error


def _check_head(head: str) -> None:
    """Raise ValueError for metadata that would take long to parse or expand to gigabytes."""
    if len(head) > MAX_HEAD:
        raise ValueError(f"its metadata has more than {MAX_HEAD:,} characters")
    depth = 0
    for token in yaml.scan(head):
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > MAX_DEPTH or isinstance(token, yaml.AliasToken):
            raise ValueError("its metadata is nested too deep, or repeats itself by aliases")


def add_pictures(folder: Path, record: RunRecord, pictures: Sequence[str | os.PathLike[str]]) -> None:
    """Put PNG files into an adapter's folder; those of its accuracies are drawn if not given and matplotlib is there."""
    given = [Path(picture) for picture in pictures]
    for picture in given:
        if picture.suffix != ".png":
            raise ValueError(f"{picture} is no .png file: the card shows PNG pictures only")
        write_atomically(folder / picture.name, picture.read_bytes())
    if "curves.png" not in {picture.name for picture in given} and find_spec("matplotlib") is not None:
        draw(record.results, folder)


def card_inputs(folder: Path) -> tuple[str, ...]:
    """Patterns of the files in an adapter's folder that its next card is made from."""
    return (CARD_FILE, RESULTS_FILE, PICTURES) if (folder / RESULTS_FILE).is_file() else (CARD_FILE,)


def known_run(files: AdapterFiles) -> RunRecord | None:
    """The record of the run that made an adapter's weights; None if there is none, or it is of other weights."""
    path = files.folder / RESULTS_FILE
    if not path.exists():
        return None
    record = RunRecord.load(path)
    sha256 = PromptPoolConfig.from_pretrained(files).state.weights_sha256
    return record if record.weights_sha256 == sha256 else None


def card_metadata(config: PromptPoolConfig, record: RunRecord | None, name: str) -> ModelCardData:
    """The YAML head of a card."""
    base = hub_base(config)
    known: dict[str, Any] = {"base_model": base, "base_model_relation": "adapter"} if base else {}
    if record is not None:
        if record.datasets:
            known["datasets"] = [plain_text(name) for name in record.datasets[:LEARNERS_SHOWN]]
        known |= {"model_name": plain_text(name.split("/")[-1]), "eval_results": _eval_results(record)}
    adapter_tag = [f"{ADAPTER_TAG}{base}"] if base else []
    return ModelCardData(
        library_name="cl_prompts",  # for "peft" the Hub shows code without our import, which ends in KeyError
        pipeline_tag="image-classification",
        tags=sorted({*TAGS, config.method, *adapter_tag}),
        **known,
    )


def hub_base(config: PromptPoolConfig) -> str | None:
    """The base model's Hub id; None if its name is no valid id or is a local folder."""
    name = config.base_model_name_or_path
    if not name:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() else name


def _eval_results(record: RunRecord) -> list[EvalResult]:
    summary = next(iter(record.results.values())).summary()
    words = [plain_text(name) for name in record.datasets] + [plain_text(word).rstrip(",") for word in record.data.split()]
    dataset = next(filter(None, words), "custom")
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=plain_text(record.data) or dataset,
            dataset_split="test",
            metric_type="accuracy" if key != "forgetting" else "forgetting",
            metric_name=f"{heading} (%)",
            metric_value=round(summary[key], 2),
        )
        for key, heading in FIGURES.items()
    ]


def card_text(config: PromptPoolConfig, record: RunRecord | None, files: AdapterFiles, name: str, license: object) -> str:
    """The body of a card, in Markdown."""
    title = (type(config).__doc__ or "").splitlines()[0].rstrip(".")
    classes, tasks = config.num_labels or len(config.state.classes), len(config.state.tasks)
    sections = [
        f"# {markdown_text(name.split('/')[-1])}",
        "A prompt pool for a frozen vision transformer, made with [cl_prompts](https://pypi.org/project/cl-prompts/): "
        f"{classes:,} classes, learned {f'in {tasks} tasks one after the other' if tasks else 'without tasks'}. At test "
        "nobody has to say which task an image is from.",
        _facts(config, record, files, title, license),
        _use(name),
        _figures(record, files.folder) if record is not None else "",
        _tasks(config),
        _limits(config, record),
        _training(record) if record is not None else "",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _facts(config: PromptPoolConfig, record: RunRecord | None, files: AdapterFiles, title: str, license: object) -> str:
    state, declared = config.state, files.tensors
    parts = sizes_of_parts(declared)
    base = hub_base(config)
    kind = markdown_text((config.auto_mapping or {}).get("base_model_class", "vision transformer"))
    shape = f"{kind}, {state.base_layers} blocks, width {state.base_width}"
    papers = ", ".join(f"[{paper.split('/')[-1]}]({paper})" for paper in config.papers)
    numbers = sum(part["numbers"] for part in parts.values())
    size = in_bytes((files.folder / WEIGHTS_FILE).stat().st_size)
    readout = state.pooling if config.readout == "auto" else config.readout
    normalized = "normalized " if config.head == "discriminant" and config.normalize_features else ""
    facts = {
        "Method": f"{title} ({papers})" if papers else title,
        "Base model": f"[{base}](https://huggingface.co/{base}) ({shape})" if base else f"not on the Hub ({shape})",
        "Answers with": f"{config.head} head on the {normalized}{readout} feature",
        "Adapter": f"{numbers:,} numbers, {size}: "
        + ", ".join(f"{markdown_text(part)} {sizes['numbers']:,}" for part, sizes in parts.items()),
    }
    halves = {tensor.dtype for name, tensor in declared.items() if name.startswith(SAVED_PREFIX)} & set(HALVES)
    if halves:
        facts["Prompts are stored in"] = (
            f"{' and '.join(HALVES[kind] for kind in sorted(halves))}; loading makes them float32, rounded"
        )
    calibrated = "not calibrated"
    if state.temperature:
        each = " and by a scale of each image" if state.image_scale else ""
        values = [t for t, known in zip(state.task_temperatures, state.temperature_information, strict=True) if known]
        by_task = f" ({min(values):.3g} to {max(values):.3g} by task)" if len(values) > 1 and state.tasks else ""
        calibrated = f"calibrated: logits are divided by {state.temperature:.3g}{by_task}{each}"
    if state.novelty_threshold is not None:
        facts["Unknown images"] = (
            f'`pipe(image, unknown="flag")` marks images beyond a novelty of {state.novelty_threshold:.3g}'
        )
    facts["Scores"] = f"{calibrated}, as chosen on training images" if state.temperature else calibrated
    if record is not None and record.trainable:
        facts["Trained in the last task"] = f"{next(iter(record.trainable.values())):,} parameters"
    statistics = class_statistics(declared)
    if statistics:
        held = in_bytes(sum(part["bytes"] for part in sizes_of_parts(statistics).values()))
        each = in_bytes(bytes_per_class(statistics))
        facts["Statistics of the training images' features in it"] = (
            f"{held}, {each} for each class (means, covariances or sums; no images)"
        )
    known = markdown_text(license) if isinstance(license, str) else ""
    facts["License"] = known or "not stated"
    return "\n".join(f"- **{heading}**: {text}" for heading, text in facts.items())


def in_bytes(size: int) -> str:
    """ "19 kB", "4.2 MB"."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def _use(name: str) -> str:
    return f"""## Use it

```sh
pip install cl-prompts
```

```python
from cl_prompts import PromptPoolPipeline

classify = PromptPoolPipeline.from_pretrained({json.dumps(plain_text(name))})
print(classify("image.jpg", top_k=3))  # [{{"label": ..., "score": ...}}, ...]
```

As a model, to go on training (`begin_task` adds classes) or inside your own code:

```python
from cl_prompts import AutoPromptPoolModel

model = AutoPromptPoolModel.from_pretrained({json.dumps(plain_text(name))}, is_trainable=True)
print(model.classes)  # the ids that the columns of the logits stand for
```

PEFT's own classes load it, too, after `import cl_prompts`."""


def _figures(record: RunRecord, folder: Path) -> str:
    seed = record.seed or 0
    shown = list(record.results.items())[:LEARNERS_SHOWN]
    results = [Result(name, matrix, seed, record.trainable.get(name)) for name, matrix in shown]
    first = next(iter(record.results.values()))
    pictures = sorted(folder.glob(PICTURES))[:PICTURES_SHOWN]
    plots = [f"![{markdown_text(plot.stem)}]({quote(plot.name)})" for plot in pictures]
    few = len(first.columns) <= MATRIX_TASKS
    sections = [
        "## What it reaches",
        headline(results),
        LEGEND,
        comparison_table(results),
        remarks(results),
        "Accuracy on each task, in percent:" if few else f"The accuracy on each task is in `{RESULTS_FILE}`.",
        matrix_table(first) if few else "",
        "\n".join(plots),
    ]
    return "\n\n".join(filter(None, sections))


def _tasks(config: PromptPoolConfig) -> str:
    if not config.state.tasks:
        return ""
    tasks = config.state.tasks
    lines = [
        f"{number}. {_names(task, config.state.class_names)}" for number, task in enumerate(tasks[:TASKS_SHOWN], start=1)
    ]
    more = [f"\nand {len(tasks) - TASKS_SHOWN:,} more tasks."] if len(tasks) > TASKS_SHOWN else []
    return "## Tasks, in order\n\n" + "\n".join(lines + more)


def _limits(config: PromptPoolConfig, record: RunRecord | None) -> str:
    """What was not measured, and whose terms apply."""
    data = f"the data ({markdown_text(record.data, 300)})" if record is not None and record.data else "the training images"
    refuses = " unless it is asked to refuse unknown images" if config.state.novelty_threshold is not None else ""
    facts = {
        "Bias": "what the base model prefers is not changed by prompts; groups within a class were not compared",
        "Robustness": "test images come from the source of the training images; shifted, corrupted or adversarial images "
        "were not tested",
        "Unknown classes": f"it answers with one of its classes{refuses}",
        "Licenses": f"the license above is that of this adapter; {data} and the base model have terms of their own",
    }
    return "## Limits\n\n" + "\n".join(f"- **{heading}**: {text}." for heading, text in facts.items())


def _names(task: Sequence[int], names: dict[str, str]) -> str:
    if not task:
        return "(forgotten)"
    shown = [markdown_text(names.get(str(c), f"class {c}")) for c in task[:CLASSES_SHOWN]]
    return ", ".join(shown) + (f" and {len(task) - CLASSES_SHOWN} more" if len(task) > CLASSES_SHOWN else "")


def _training(record: RunRecord) -> str:
    facts = {
        "data": record.data,
        "seed": record.seed,
        "seconds": None if record.seconds is None else f"{record.seconds:,.0f}",
        "machine": record.machine,
        "written": record.written,
    }
    shown = list(record.settings.items())[:SETTINGS_SHOWN]
    settings = "\n".join(f"- {markdown_text(name)}: {markdown_code(json.dumps(value), 300)}" for name, value in shown)
    sections = [
        "## Training",
        "\n".join(f"- {name}: {markdown_text(value, 300)}" for name, value in facts.items() if value not in (None, "")),
        markdown_block(record.command, "sh") if record.command else "",
        f"<details><summary>All settings</summary>\n\n{settings}\n\n</details>" if settings else "",
    ]
    return "\n\n".join(filter(None, sections))


def _kept(text: str) -> tuple[str, str]:
    """The text before and after the part that is replaced, without further marks of such a part: a copied or cut-off one.

    A card without the two comment lines in their order is all before it.
    """
    end = text.find(END, text.find(BEGIN)) if BEGIN in text else -1
    if end < 0:
        before = _without_marks(text).strip()
        return (before + "\n\n" if before else ""), ""
    return _without_marks(text[: text.rfind(BEGIN, 0, end)]), _without_marks(text[end + len(END) :])


def _without_marks(text: str) -> str:
    return text.replace(BEGIN, "\n").replace(END, "\n").lstrip("\n")
