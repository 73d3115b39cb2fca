"""Teach a pool one more class from a few pictures. After an error the pool is restored."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import count
from typing import Any

import torch
from answering import keeps_tasks_apart
from opening import OpenPool
from PIL import Image
from torch import Tensor


CLOSED_FORM, TRAINING = "Closed form, nothing is trained", "Short prompt training"
MIN_IMAGES = 3
MAX_NAME = 40
EPOCHS = 10
BATCH = 8
LR = 5e-3
LEARNED = 0.3  # loss below which training stops: further steps only reduce the accuracy on old classes
MAX_SECONDS = 120.0

Tick = Callable[[float, str], None]


def ways(pool: OpenPool) -> tuple[list[str], str]:
    """The ways in which a pool can learn one more class, the better one first, and a note for visitors.

    If there is no way, the note says why.
    """
    model, config = pool.model, pool.model.adapter.config
    if config.num_labels is not None:
        return [], "This adapter was made for a fixed number of classes, without tasks. It cannot learn another one."
    if config.state.task_open:
        return [], "This adapter was saved in the middle of a task. Finish its training first."
    try:
        if model.adapter.classifier is not None:
            model.adapter.classifier.check_statistics()
    except ValueError as error:
        return [], f"It can answer but not learn: {error}."
    trains = model.trains_task(len(config.state.tasks))
    if not config.closed_form:
        return [TRAINING], (
            f"The {config.head} head of this adapter has no closed form, so only training is offered. The rows of old "
            "classes in the head stay as they are, but prompts that tasks share change, and the new class is not compared "
            "with old pictures, which are not available. Expect the new class to be predicted too often: "
            "on the digits such heads lost about half of their accuracy on the old classes."
        )
    if keeps_tasks_apart(model.adapter) and config.trained_tasks != "first":
        return [TRAINING], (
            "Each task of this method has its own prompts, which must be trained before the head can be computed. "
            "The statistics of the old classes are corrected with the change of features that the new pictures show."
        )
    said = "The head is computed from statistics of features. In closed form only those of the new class are added. "
    if not trains:
        return [CLOSED_FORM], said + "The prompts of this adapter are frozen, so there is nothing to train."
    return [CLOSED_FORM, TRAINING], said + (
        "Training also changes prompts that all tasks share: a few pictures can make them worse for old classes. This is "
        "not measured here, since the pictures of old classes are not available."
    )


def teach(pool: OpenPool, name: str, images: Sequence[Image.Image], way: str, tick: Tick = lambda done, text: None) -> str:
    """Teach one class.

    Args:
        pool: the pool; it is changed in place.
        name: name of the class.
        images: pictures of the class.
        way: `CLOSED_FORM` or `TRAINING`.
        tick: called with the progress from 0 to 1 and the name of the current step.

    Returns:
        A summary in one line.

    Raises:
        ValueError: no usable name, too few pictures, or a way that this pool does not offer.
    """
    offered, why = ways(pool)
    if way not in offered:
        raise ValueError(why if not offered else f"this pool cannot learn with {way!r}: choose {' or '.join(offered)}")
    name = checked_name(pool, name)
    if len(images) < MIN_IMAGES:
        raise ValueError(f"{len(images)} pictures are too few: give at least {MIN_IMAGES}")
    before = copy.deepcopy(pool.model.training_state_dict())
    mask = pool.model.adapter.config.class_mask
    try:
        said = _taught(pool, name, images, way, tick)
    except BaseException:
        pool.model.adapter.config.class_mask = mask  # a state of another config is refused
        pool.model.load_training_state_dict(before)
        raise
    finally:
        pool.model.adapter.config.class_mask = mask
        pool.model.eval()
    tick(1.0, "done")
    return said


def checked_name(pool: OpenPool, name: str) -> str:
    """The name of a new class, without unprintable characters.

    Raises:
        ValueError: empty, too long, or known already.
    """
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    if not name:
        raise ValueError("the new class needs a name")
    if len(name) > MAX_NAME:
        raise ValueError(f"the name has {len(name)} characters: at most {MAX_NAME}")
    state = pool.model.adapter.config.state
    if name in {state.class_names.get(str(c), str(c)) for c in pool.model.classes}:
        raise ValueError(f"the pool knows a class {name!r} already: choose another name")
    return name


def _taught(pool: OpenPool, name: str, images: Sequence[Image.Image], way: str, tick: Tick) -> str:
    model: Any = pool.model
    tick(0.0, "looking at the pictures")
    pixels = [pool.pipe.image_processor(images=image, return_tensors="pt")["pixel_values"] for image in images]
    if len({p.shape for p in pixels}) > 1:
        raise ValueError("the image processor gives the pictures different shapes: crop them to the same shape")
    number = next(c for c in count() if c not in set(model.classes))
    lesson = Lesson(torch.cat(pixels), number)
    if model.needs_features_before and model.classes:
        model.record_features(lesson.batches())
    model.begin_task([number], class_names={number: name})
    steps, seconds = _train(model, lesson, tick) if way == TRAINING else (_look(model, lesson), 0.0)
    model.eval()
    if model.needs_consolidation:
        tick(0.95, "computing the head")
        model.consolidate(lesson.batches())
    model.end_task()
    how = f"{steps} training steps in {seconds:.1f} s" if way == TRAINING else "closed form, no training"
    return f"task {len(model.adapter.config.state.tasks)}: one class from {len(images)} pictures ({how})"


class Lesson:
    """The pictures of one new class.

    Args:
        pixels: [n, 3, H, W].
        label: the class's id.
    """

    def __init__(self, pixels: Tensor, label: int) -> None:
        self.pixels, self.label = pixels, label

    def batches(self, order: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
        """All pictures in batches of `BATCH`."""
        for rows in (torch.arange(len(self.pixels)) if order is None else order).split(BATCH):
            yield {"pixel_values": self.pixels[rows], "labels": torch.full((len(rows),), self.label), "sample_ids": rows}


def _look(model: Any, lesson: Lesson) -> int:
    """Run the forwards of training, in which the method updates its statistics, without an optimizer step."""
    model.train()
    model.attach_optimizer(torch.optim.SGD(model.parameter_groups(learning_rate=0.0)))
    for batch in lesson.batches():
        model(**batch)
    return 0


def _train(model: Any, lesson: Lesson, tick: Tick) -> tuple[int, float]:
    """A few epochs of Adam, until the pictures are learned.

    The loss compares the new class with the old ones, whose rows of the head stay as they are.
    """
    model.adapter.config.class_mask = "none"  # a loss over the task's only class would always be zero
    model.train()
    optimizer = torch.optim.Adam(model.parameter_groups(learning_rate=LR))
    model.attach_optimizer(optimizer)
    with ExitStack() as hooks:
        for parameter in model.head.parameters():
            if parameter.requires_grad:
                hooks.callback(parameter.register_hook(_only_last_row).remove)
        return _steps(model, lesson, optimizer, tick)


def _steps(model: Any, lesson: Lesson, optimizer: torch.optim.Optimizer, tick: Tick) -> tuple[int, float]:
    """Train; return the number of steps and the seconds."""
    generator = torch.Generator().manual_seed(0)
    steps, started = 0, time.perf_counter()
    total = EPOCHS * -(-len(lesson.pixels) // BATCH)
    for _ in range(EPOCHS):
        losses = []
        for batch in lesson.batches(torch.randperm(len(lesson.pixels), generator=generator)):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            losses.append(loss.item())
            tick(0.9 * steps / total, f"step {steps} of at most {total}, loss {losses[-1]:.2f}")
        if max(losses) < LEARNED or time.perf_counter() - started > MAX_SECONDS:
            break
    return steps, time.perf_counter() - started


def _only_last_row(gradient: Tensor) -> Tensor:
    kept = torch.zeros_like(gradient)
    kept[-1] = gradient[-1]
    return kept
