"""State of a whole run: capture, validate and restore its named parts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from cl_prompts.continual.arguments import ContinualArguments
from cl_prompts.continual.checkpointing.parts import Stateful
from cl_prompts.continual.extra_classifiers import ExtraClassifiers
from cl_prompts.continual.streams.stream import Stream
from cl_prompts.learner.protocol import Learner
from cl_prompts.runtime.distributed import world_size


FORMAT = 4  # version of the checkpoint format

# Settings that do not change the result of a run.
NOT_OF_THE_RUN = (
    "output_dir",
    "dataloader_num_workers",
    "logging_steps",
    "save_steps",
    "query_cache",
    "query_cache_bytes",
    "pixel_cache_bytes",
)


def run_identity(
    args: ContinualArguments, stream: Stream, learner: Learner, extra_classifiers: ExtraClassifiers
) -> dict[str, str]:
    """Fingerprints of settings, stream, transform, learner and classifiers. Runs with equal ones compute the same."""
    settings = {k: v for k, v in args.to_dict().items() if k not in NOT_OF_THE_RUN}
    return {
        "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "stream": stream.fingerprint(),
        "transform": _transform_settings(stream.transform),
        "learner": learner.fingerprint(),
        "processes": str(world_size()),
        **{f"classifier {name!r}": settings for name, settings in extra_classifiers.settings.items()},
    }


def _transform_settings(transform: Any) -> str:
    """Class and settings of the image transform; "" if it has no `settings()` or they are not JSON-able."""
    settings = getattr(transform, "settings", None)
    if not callable(settings):
        return ""
    kind = type(transform)
    try:
        return json.dumps([kind.__module__, kind.__qualname__, settings()], sort_keys=True)
    except (TypeError, ValueError):
        return ""


def capture(parts: Mapping[str, Stateful], identity: Mapping[str, str]) -> dict[str, Any]:
    """The state of a run, for a checkpoint. With several processes all of them must call it.

    Args:
        parts: parts of the run by name.
        identity: from `run_identity`.
    """
    states = {name: dict(part.state_dict()) for name, part in parts.items()}
    return {"format": FORMAT, "identity": dict(identity), "parts": states}


def validate(state: Mapping[str, Any], identity: Mapping[str, str], folder: str | os.PathLike[str] | None) -> None:
    """Check that a captured state belongs to this run.

    Args:
        state: from `capture`.
        identity: `run_identity` of this run.
        folder: the results folder, for the message.

    Raises:
        ValueError: the state belongs to another run, or has another format.
    """
    if state.get("format") != FORMAT:
        raise ValueError(
            f"the checkpoints in {folder} are of another version of cl_prompts (format {state.get('format', 1)}, "
            f"this one has {FORMAT}), which cannot be resumed: remove them, or choose another folder"
        )
    other = state["identity"]
    differing = [name for name in {**identity, **other} if identity.get(name) != other.get(name)]
    if differing:
        raise ValueError(
            f"the checkpoints in {folder} are of another run, whose {' and '.join(differing)} differ: resume "
            "with the same settings, data, classifiers and processes, or choose another folder"
        )


def restore(parts: Mapping[str, Stateful], state: Mapping[str, Any], folder: str | os.PathLike[str] | None) -> None:
    """Load a captured state into the parts of a new run, in order. Parts that are not in the state are not changed.

    Args:
        parts: by name.
        state: from `capture`.
        folder: the results folder, for the message.

    Raises:
        ValueError: a part's state lacks something, since other code wrote it.
    """
    for name, part in parts.items():
        if name not in state["parts"]:
            continue
        try:
            part.load_state_dict(state["parts"][name])
        except KeyError as error:
            raise ValueError(
                f"the checkpoints in {folder} cannot be resumed by this version of cl_prompts: the state of {name!r} has "
                f"no {error}. Resume with the version that wrote them, remove them, or choose another folder"
            ) from error
