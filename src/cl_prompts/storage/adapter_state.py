"""State of an adapter besides its tensors: tasks, class names, and the base it was trained on."""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cl_prompts.runtime.text import short_repr
from cl_prompts.version import __version__


FORMAT_VERSION = 1
_OF_A_CALL = ("pixel_values", "labels", "query", "lower_blocks", "sample_ids", "num_items_in_batch")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_PRECISION = re.compile(r"[\w.+]{1,100}", re.ASCII)
POOLINGS = ("cls", "mean", "pooler")
MAX_CHANNELS = 1024
_VERSION = re.compile(r"\d[\w.+!]{0,40}", re.ASCII)
_KINDS: dict[str, type] = {
    "written_by": str,
    "base_fingerprint": str,
    "base_precision": str,
    "weights_sha256": str,
    "pooling": str,
    "base_width": int,
    "base_layers": int,
    "base_heads": int,
}


def check_base_arguments(name: str, arguments: Any) -> None:
    """Raise ValueError if `arguments` are no arguments of a base's forward that an adapter can remember.

    These are numbers, truth values and short texts. Images, labels and what the forward returns are not among them.
    """
    if (
        not isinstance(arguments, dict)
        or len(arguments) > 20
        or not all(map(is_base_argument, arguments, arguments.values()))
    ):
        raise ValueError(
            f"`{name}` must map arguments of the base's forward to numbers, true, false or short texts, like "
            f'{{"interpolate_pos_encoding": True}}, got {short_repr(arguments)}'
        )


def is_base_argument(name: Any, value: Any) -> bool:
    """Whether an adapter can remember an argument of its base's forward."""
    if not isinstance(name, str) or name in _OF_A_CALL or name.startswith(("output_", "return_")):
        return False
    return type(value) in (bool, int, float) or (isinstance(value, str) and len(value) <= 100)


def _is_list_of(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and all(type(x) in kinds for x in value)


def _are_numbers(value: Any, *kinds: type) -> bool:
    return _is_list_of(value, *kinds) and len(value) <= MAX_CHANNELS


@dataclass
class AdapterState:
    """The `state` object of `adapter_config.json`. A config with a non-empty one rebuilds all tensor shapes.

    Args:
        format_version: version of the file format; a newer one than this library knows is refused.
        written_by: version of cl_prompts that wrote the file.
        tasks: class ids of every task begun so far, in order, as they stand in `labels`.
        forgotten_tasks: numbers of the tasks all of whose classes were forgotten; their lists are empty.
        task_open: True between `begin_task` and `end_task`.
        class_names: name of a class by `str(id)`.
        base_fingerprint: `backbones.fingerprint.fingerprint` of the frozen tensors the adapter stands on; None if they
            could not be read.
        base_precision: the kinds of numbers in that base, the most frequent one first, like "bfloat16" or "qint8+float32".
        base_width, base_layers, base_heads: sizes of that base.
        pooling: how the base's un-prompted feature was taken ("cls", "mean" or "pooler").
        base_arguments: further arguments of the base's forward in training, like {"interpolate_pos_encoding": True}.
        image_size: height and width of the training images in pixels; None before training, or if there were several sizes.
        several_sizes: whether there were.
        image_mean, image_std: normalization of the input, one number per channel.
        temperature: mean over the tasks of what divides the logits at test, so that their softmax is calibrated; None: it
            was not chosen.
        task_temperatures: what divides the logits at test of images of each task's classes; without tasks, of each part of
            the stream.
        temperature_information: of the images that each of them was chosen on (`heads.calibration.information`); empty:
            `temperature` is that of all classes.
        score_width: of `log_scores`, for a head whose scores are those of a regression; None: the temperature divides the
            scores themselves.
        image_scale: whether the classifier's scale of each image (`FeatureClassifier.scale`) divides its logits, too.
        novelty_threshold: novelty beyond which an image is of none of the classes; None: it was not chosen.
        weights_sha256: `cl_prompts.storage.integrity.digest` of the saved tensors.
    """

    format_version: int = FORMAT_VERSION
    written_by: str | None = None
    tasks: list[list[int]] = field(default_factory=list)
    forgotten_tasks: list[int] = field(default_factory=list)
    task_open: bool = False
    class_names: dict[str, str] = field(default_factory=dict)
    base_fingerprint: str | None = None
    base_precision: str | None = None
    base_width: int | None = None
    base_layers: int | None = None
    base_heads: int | None = None
    pooling: str | None = None
    base_arguments: dict[str, Any] = field(default_factory=dict)
    image_size: list[int] | None = None
    several_sizes: bool = False
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    temperature: float | None = None
    task_temperatures: list[float] = field(default_factory=list)
    temperature_information: list[float] = field(default_factory=list)
    score_width: float | None = None
    image_scale: bool = False
    novelty_threshold: float | None = None
    weights_sha256: str | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AdapterState:
        """Check and take over a `state` object read from a file.

        Raises:
            ValueError: it was written by a newer format, its tasks are no lists of distinct class ids, or a value is
                of another kind than its field.
        """
        if not isinstance(values, dict):
            raise ValueError(f"`state` must be an object as `save_pretrained` writes it, got {short_repr(values)}")
        version = values.get("format_version", FORMAT_VERSION)
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            writer = values.get("written_by")
            # A command that is made to be copied holds nothing but a version.
            needed = f">={writer}" if isinstance(writer, str) and _VERSION.fullmatch(writer) else ""
            raise ValueError(
                f"the adapter has format version {short_repr(version)}, this cl_prompts {__version__} reads up to "
                f"{FORMAT_VERSION}: upgrade with `pip install -U 'cl-prompts{needed}'`"
            )
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            warnings.warn(f"unknown fields {short_repr(unknown)} in the adapter's state are ignored", stacklevel=2)
        state = cls(**{k: v for k, v in values.items() if k in known})
        tasks, forgotten = state.tasks, state.forgotten_tasks
        if not isinstance(forgotten, list) or not all(type(number) is int for number in forgotten):
            raise ValueError(f"`state.forgotten_tasks` must be a list of task numbers, got {short_repr(forgotten)}")
        if not isinstance(tasks, list) or not all(
            isinstance(task, list)
            and bool(task) == (number not in forgotten)
            and all(type(c) is int and 0 <= c < 2**63 for c in task)
            and len(set(task)) == len(task)
            for number, task in enumerate(tasks)
        ):
            raise ValueError(f"`state.tasks` must be lists of distinct class ids, got {short_repr(tasks)}")
        if tasks and not any(tasks):
            raise ValueError("`state.tasks` has no class left: an adapter without classes answers nothing")
        names = state.class_names
        if not isinstance(names, dict) or not all(type(x) is str for pair in names.items() for x in pair):
            raise ValueError(f"`state.class_names` must map str(class id) to a name, got {short_repr(state.class_names)}")
        check_base_arguments("state.base_arguments", state.base_arguments)
        for name in ("several_sizes", "image_scale"):
            if not isinstance(getattr(state, name), bool):
                raise ValueError(f"`state.{name}` must be true or false, got {short_repr(getattr(state, name))}")
        if not isinstance(state.task_open, bool) or (state.task_open and not tasks):
            raise ValueError(
                f"`state.task_open` must be true or false, false without tasks, got {short_repr(state.task_open)}"
            )
        for name, kind in _KINDS.items():
            value = getattr(state, name)
            if value is not None and type(value) is not kind:
                raise ValueError(f"`state.{name}` must be {kind.__name__} or null, got {short_repr(value)}")
        if state.pooling not in (None, *POOLINGS):
            raise ValueError(f"`state.pooling` must be one of {list(POOLINGS)} or null, got {short_repr(state.pooling)}")
        if state.base_precision is not None and not _PRECISION.fullmatch(state.base_precision):
            raise ValueError(
                "`state.base_precision` must name kinds of numbers, like 'bfloat16', got "
                f"{short_repr(state.base_precision)}"
            )
        for name in ("base_width", "base_layers", "base_heads"):
            value = getattr(state, name)
            if value is not None and not 1 <= value < 2**31:
                raise ValueError(f"`state.{name}` must be from 1 to 2**31 - 1 or null, got {short_repr(value)}")
        size = state.image_size
        if size is not None and not (_are_numbers(size, int) and len(size) == 2 and all(1 <= x < 2**31 for x in size)):
            raise ValueError(f"`state.image_size` must be height and width in pixels or null, got {short_repr(size)}")
        for name in ("image_mean", "image_std"):
            value = getattr(state, name)
            if value is not None and not (_are_numbers(value, int, float) and all(abs(x) <= 1e6 for x in value)):
                raise ValueError(f"`state.{name}` must be a number for each channel or null, got {short_repr(value)}")
        threshold = state.novelty_threshold
        if threshold is not None and not (type(threshold) in (int, float) and abs(threshold) <= 1e12):
            raise ValueError(f"`state.novelty_threshold` must be a number or null, got {short_repr(threshold)}")
        for name in ("temperature", "score_width"):
            value = getattr(state, name)
            if value is not None and not (type(value) in (int, float) and 1e-6 <= value <= 1e6):
                raise ValueError(f"`state.{name}` must be from 1e-6 to 1e6 or null, got {short_repr(value)}")
        of_tasks, weights = state.task_temperatures, state.temperature_information
        if not (_is_list_of(of_tasks, int, float) and all(1e-6 <= one <= 1e6 for one in of_tasks)):
            raise ValueError(f"`state.task_temperatures` must be numbers from 1e-6 to 1e6, got {short_repr(of_tasks)}")
        if not (_is_list_of(weights, int, float) and all(0 <= w < 1e18 for w in weights)) or len(weights) != len(of_tasks):
            raise ValueError(
                f"`state.temperature_information` must have a number from 0 on for each of the {len(of_tasks)} "
                f"`state.task_temperatures`, got {short_repr(weights)}"
            )
        return state

    @property
    def classes(self) -> list[int]:
        """Class ids in the order of the logits: by first appearance."""
        return list(dict.fromkeys(c for task in self.tasks for c in task))

    @property
    def base_dtype(self) -> str | None:
        """Name of the dtype of most of the base's numbers; None if that is unknown or they are quantized."""
        most = (self.base_precision or "").split("+")[0]
        return most if most in _DTYPES else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return asdict(self)
