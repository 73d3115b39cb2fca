"""The config of a model with a prompt pool: that of its base, with the classes of the active adapter.

transformers reads it: `pipeline` takes the names of the classes from it, and `Trainer` the outputs it must not gather.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from cl_prompts.learner.task_state import TaskState


NOT_GATHERED = ("losses", "prompt_ids", "prompt_weights", "scores", "query", "features")  # all outputs but loss and logits


def config_of_adapter(config: Any, tasks: TaskState) -> Any:
    """A view of a base's config, whose classes are those of an adapter.

    Several models may share the base and its config, so nothing is written there: `id2label`, `label2id`, `num_labels`,
    `problem_type` and `keys_to_ignore_at_inference` are answered by the view. All other attributes are the config's own,
    also when they are set. A copy of the view is an independent config with the values of both.

    Args:
        config: a transformers config.
        tasks: of the adapter.
    """
    kind: Any = type(config)
    view = _config(_view_of(kind), vars(config))
    object.__setattr__(view, "_tasks", tasks)
    return view


def _config(kind: type, attributes: dict[str, Any]) -> Any:
    """A config of class `kind` with these attributes, the dict itself."""
    config: Any = object.__new__(kind)
    object.__setattr__(config, "__dict__", attributes)
    return config


@cache
def _view_of(kind: Any) -> Any:
    """The class of the views of configs of class `kind`, a subclass of it."""

    def id2label(view: Any) -> dict[int, str]:
        labels: dict[int, str] = view._tasks.id2label
        return labels

    def label2id(view: Any) -> dict[str, int]:
        return {name: index for index, name in view._tasks.id2label.items()}

    def num_labels(view: Any) -> int:
        return len(view._tasks.id2label)

    def ignored(view: Any) -> list[str]:
        return [*getattr(kind, "keys_to_ignore_at_inference", ()), *NOT_GATHERED]

    def problem_type(view: Any) -> None:
        """With None, transformers chooses by `num_labels`; a value of the base's would be that of its own head."""

    def refuse(view: Any, value: Any) -> None:
        raise AttributeError(
            "the classes of this config are those of the active adapter: declare them, with their names, by "
            "model.begin_task(classes, class_names={id: name})"
        )

    def values(view: Any) -> dict[str, Any]:
        """Attributes of an independent config with the adapter's classes."""
        return vars(view) | {"id2label": view.id2label, "label2id": view.label2id, "problem_type": None}

    members: dict[str, Any] = {
        "__slots__": ("_tasks",),
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "id2label": property(id2label, refuse),
        "label2id": property(label2id, refuse),
        "num_labels": property(num_labels, refuse),
        "problem_type": property(problem_type),
        "keys_to_ignore_at_inference": property(ignored),
        "to_dict": lambda view: _config(kind, values(view)).to_dict(),
        "to_diff_dict": lambda view: _config(kind, values(view)).to_diff_dict(),
        "__reduce_ex__": lambda view, protocol: (_config, (kind, values(view))),  # for copies and pickles
    }
    return type(kind)(kind.__name__, (kind,), members)
