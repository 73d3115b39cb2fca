"""The two files of a saved baseline: `learner.json` and `learner.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cl_prompts.storage.bounded_read import MAX_CONFIG_BYTES, read_json_object
from cl_prompts.storage.staging import finish_interrupted_save, read_together, staging_folder


CONFIG_FILE, WEIGHTS_FILE = "learner.json", "learner.safetensors"


def write_files(folder: str | os.PathLike[str], name: str, options: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a baseline. Readers find the old files or the new ones.

    Args:
        folder: where to.
        name: of the baseline in `BASELINES`.
        options: its settings.
        state: its `training_state_dict`.
    """
    config = {"learner": name, "options": options, **state["values"]}
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state["tensors"].items()}
    with staging_folder(folder) as staging:
        save_file(tensors, staging / WEIGHTS_FILE)
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2))


def read_files(folder: str | os.PathLike[str]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name, options and training state of a saved baseline.

    Args:
        folder: where `write_files` wrote it.

    Raises:
        ValueError: a file is missing or damaged.
    """
    finish_interrupted_save(folder)

    def read() -> tuple[str, dict[str, Any], dict[str, Any]]:
        try:
            config = read_json_object(Path(folder, CONFIG_FILE), MAX_CONFIG_BYTES)
            if not all(isinstance(config.get(key), dict) for key in ("options", "state")):
                raise ValueError(f"{CONFIG_FILE} has no options or no state")
            state = {"tensors": load_file(Path(folder, WEIGHTS_FILE)), "values": {"state": config["state"]}}
            return config.get("learner", ""), config["options"], state
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"{folder} holds no baseline, or a damaged one ({error})") from error

    return read_together([Path(folder, CONFIG_FILE), Path(folder, WEIGHTS_FILE)], read)
