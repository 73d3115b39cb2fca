"""`cl-prompts learn`: an adapter learns the classes of a folder as its next task. No image of earlier tasks is needed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from datasets import ClassLabel, Dataset, Features, Image

from cl_prompts.cli.labeled_images import count_correct, list_images, percent
from cl_prompts.continual.arguments import ContinualArguments
from cl_prompts.continual.callbacks import ProgressBar
from cl_prompts.continual.streams.scenarios import ClassIncrementalStream
from cl_prompts.continual.trainer import ContinualTrainer
from cl_prompts.methods import PromptPoolConfig
from cl_prompts.pipeline import PromptPoolPipeline
from cl_prompts.runtime.text import short_repr
from cl_prompts.sharing.base_models import BASE_FOLDER
from cl_prompts.sharing.run_record import RESULTS_FILE, RunRecord
from cl_prompts.storage.adapter_files import AdapterFiles, find_adapter
from cl_prompts.storage.bounded_read import MAX_RESULTS_BYTES
from cl_prompts.storage.staging import staging_folder


# Settings of the run that made the adapter which apply to one more task of it as well.
OF_THE_ADAPTER = (
    *("num_train_epochs", "batch_size", "optim", "learning_rate", "learning_rates", "optim_args"),
    *("lr_scheduler_type", "max_grad_norm"),
)
DEFAULTS = ContinualArguments(num_train_epochs=5, batch_size=16, learning_rate=5e-3)
MAX_EPOCHS = 100  # of an adapter's own record, which a stranger may have written


@dataclass
class Learned:
    """What `learn` has done.

    Args:
        known: names of the classes that the adapter knew.
        new: names of the classes that it learned.
        images: number of training images.
        seconds: duration of the training.
        folder: the new adapter.
        known_before, known_after: accuracy on the known classes among the images to check, in percent; None without any.
        new_after: accuracy on the new classes among them.
    """

    known: list[str]
    new: list[str]
    images: int
    seconds: float
    folder: Path
    known_before: float | None = None
    known_after: float | None = None
    new_after: float | None = None


def learn(
    folder: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    check: str | os.PathLike[str] | None = None,
    base: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Learned:
    """Teach an adapter the classes of a folder and save the result as a new adapter.

    Args:
        folder: images of the new classes; see `list_images`.
        adapter: folder or Hub id of the adapter. It is not changed.
        output: folder of the new adapter, which must be new or empty.
        check: images of known and new classes, in one folder per class, on which the accuracy is measured.
        base: base model instead of the one that the adapter names.
        revision: branch, tag or commit of the adapter on the Hub.
        device: like "cuda"; None: the CPU.
        settings: of `ContinualArguments`. Others are those of the run that made the adapter, if its record is there.

    Raises:
        ValueError: a class is known already or of no known name, an image cannot be read, or `output` is in use.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists already: choose another folder for the new adapter")
    images = list_images(folder)
    to_check = {} if check is None else list_images(check)
    files = find_adapter(adapter, revision=revision, max_bytes=PromptPoolConfig.max_adapter_bytes)
    arguments = _arguments(files, settings or {})
    pipe = PromptPoolPipeline.from_pretrained(files, base=base, device=device)
    model = pipe.model
    tasks = model.adapter.tasks
    known = [str(name) for name in tasks.id2label.values()] if tasks.classes else []
    _check_names(known, list(images), list(to_check))
    before = count_correct(pipe, {name: to_check[name] for name in known if name in to_check})

    set_seed(arguments.seed)
    stream = _stream(images, 1 + max(tasks.classes, default=-1), pipe)
    trainer = ContinualTrainer(model, stream, arguments, callbacks=[ProgressBar(accuracies=False)])
    trainer.train()
    model.eval()
    result = trainer.result()

    brought = base is None and not PromptPoolConfig.from_pretrained(files).base_model_name_or_path
    with staging_folder(output) as staging:
        if brought:  # the base lies in the adapter's own folder
            base_model: Any = model.get_base_model()
            base_model.save_pretrained(staging / BASE_FOLDER)
            base_model.name_or_path = model.peft_config[model.active_adapters[0]].base_model_name_or_path = ""
        elif base is not None:  # where the new adapter finds it
            config = model.peft_config[model.active_adapters[0]]
            config.base_model_name_or_path, config.revision = base, None
        model.save_pretrained(staging, image_processor=pipe.image_processor)
    learned = Learned(known, list(images), sum(map(len, images.values())), result.seconds, output)
    if to_check:
        after = count_correct(pipe, to_check)
        old, new = ([name for name in names if name in to_check] for names in (known, images))
        if old:
            learned.known_before, learned.known_after = percent(before, to_check, old), percent(after, to_check, old)
        if new:
            learned.new_after = percent(after, to_check, new)
    return learned


def _check_names(known: Sequence[str], new: Sequence[str], to_check: Sequence[str]) -> None:
    twice = sorted(set(known) & set(new))
    if twice:
        raise ValueError(f"the adapter knows {short_repr(twice)} already: a task brings new classes, remove those folders")
    strange = sorted(set(to_check) - {*known, *new})
    if strange:
        raise ValueError(
            f"the folder to check has the classes {short_repr(strange)}, which are neither known nor new: "
            f"name its folders like the classes of the adapter ({short_repr(sorted(known))})"
        )


def _arguments(files: AdapterFiles, settings: Mapping[str, Any]) -> ContinualArguments:
    """The settings of the adapter's own run, where it has a record of one, overridden by `settings`."""
    record = files.further_file(RESULTS_FILE, MAX_RESULTS_BYTES)
    own = {} if record is None else RunRecord.load(record).settings
    given = {name: value for name, value in settings.items() if value is not None}
    chosen = {name: own[name] for name in OF_THE_ADAPTER if name in own} | given
    epochs = chosen.get("num_train_epochs", DEFAULTS.num_train_epochs)
    if "num_train_epochs" not in given and not (isinstance(epochs, int) and 0 < epochs <= MAX_EPOCHS):
        raise ValueError(f"the adapter's {RESULTS_FILE} says num_train_epochs={short_repr(epochs)}: choose with --epochs")
    return replace(DEFAULTS, **chosen)


def _stream(images: Mapping[str, Sequence[Path]], first: int, pipe: PromptPoolPipeline) -> ClassIncrementalStream:
    """One task of the classes, with ids from `first` on. Its test set, one image of each class, is not used."""
    names = [*(f"\0{n}" for n in range(first)), *images]  # a ClassLabel names all ids from 0 on
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    rows = [(str(file), first + n) for n, of_class in enumerate(images.values()) for file in of_class]
    paths, labels = [path for path, _ in rows], [label for _, label in rows]
    train = Dataset.from_dict({"image": paths, "label": labels}, features=features)
    classes = list(range(first, first + len(images)))
    test = train.select([labels.index(c) for c in classes])
    stream = ClassIncrementalStream(train, test, [classes], pipe.image_processor)
    stream.max_pixels = pipe.max_pixels
    return stream
