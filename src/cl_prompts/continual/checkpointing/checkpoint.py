"""Checkpoints of a run: tensors in safetensors, the rest in JSON, no pickle, no copy of the backbone.

A checkpoint is a folder `<number>`. It is written under a temporary name and then renamed. `manifest.json` holds the sha256
of each file, to detect damage. A large tensor has a file of its own, named by its sha256. One that is as in the checkpoint
before, like statistics of old classes, is not written again: both checkpoints have the same file (a hard link).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from cl_prompts.runtime.disk_full import explain_disk_full
from cl_prompts.storage.staging import finish_interrupted_save, staging_folder


TENSORS, VALUES, MANIFEST = "tensors.safetensors", "values.json", "manifest.json"
SUFFIX = ".safetensors"
LARGE = 2**20  # bytes of a tensor with a file of its own
CONTINUE = "free some and resume the run"  # what to do when the disk of a run is full
REFERENCE = "$tensor"  # key of the JSON object that stands for a tensor; its value is the tensor's name


class Checkpoints:
    """The checkpoints of one run. Only the newest ones are kept.

    Args:
        folder: folder of the checkpoints.
        keep: number of checkpoints to keep.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep

    def save(self, number: int, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and remove all but the newest `keep`.

        Args:
            number: number of the checkpoint; newer checkpoints have larger numbers.
            state: nested dicts and lists of tensors and JSON-able values; keys are strings.

        Returns:
            The checkpoint's folder.

        Raises:
            OSError: the disk is full. The earlier checkpoints are kept.
        """
        target = self.folder / f"{number:09d}"
        tensors, values = split_tensors(state)
        # safetensors refuses views and shared storage, so every tensor is copied.
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        large = {name: own.pop(name) for name in list(own) if own[name].nbytes >= LARGE}
        files = {TENSORS: save(own), VALUES: json.dumps(values).encode()}
        contents = [save({name: tensor}) for name, tensor in large.items()]
        files |= {_sha256(content) + SUFFIX: content for content in contents}
        before = self._folders()[:1]
        files[MANIFEST] = json.dumps({name: _sha256(content) for name, content in files.items()}).encode()
        with explain_disk_full(target, CONTINUE), staging_folder(target) as staging:
            for name, content in files.items():
                if not any(_link(folder / name, staging / name, content) for folder in before):
                    (staging / name).write_bytes(content)
        for old in self._folders()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def latest(self) -> dict[str, Any] | None:
        """State of the newest intact checkpoint; None if there is none. Damaged ones are skipped with a warning."""
        for folder in self._folders():
            finish_interrupted_save(folder)
            try:
                manifest = json.loads((folder / MANIFEST).read_text())
                names = {TENSORS, VALUES, *manifest.keys(), *(file.name for file in folder.glob("*" + SUFFIX))}
                contents = {name: (folder / Path(name).name).read_bytes() for name in names}
                damaged = sorted(name for name, content in contents.items() if manifest.get(name) != _sha256(content))
                if damaged:
                    raise ValueError(f"{damaged} do not match {MANIFEST}")
                tensors: dict[str, Tensor] = {}
                for name, content in contents.items():
                    tensors |= load(content) if name.endswith(SUFFIX) else {}
                state: dict[str, Any] = join_tensors(tensors, json.loads(contents[VALUES]))
                return state
            except (OSError, ValueError, AttributeError) as error:
                warnings.warn(f"checkpoint {folder} is damaged ({error}): trying the one before", stacklevel=2)
        return None

    def clear(self) -> None:
        """Remove all checkpoints. Other files in the folder are kept."""
        for folder in self._folders():
            shutil.rmtree(folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """Folders of the checkpoints, newest first."""
        if not self.folder.is_dir():
            return []
        return sorted((f for f in self.folder.iterdir() if f.name.isdigit()), reverse=True)


def split_tensors(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Split a nested `state` into tensors by path ("optimizer/state/0/exp_avg") and a JSON-able state that refers to them.

    Raises:
        TypeError: a key is not a string; JSON would turn it into one.
    """
    tensors: dict[str, Tensor] = {}

    def values_of(part: Any, path: str) -> Any:
        if isinstance(part, Tensor):
            tensors[path] = part
            return {REFERENCE: path}
        if isinstance(part, Mapping):
            if not all(isinstance(key, str) for key in part):
                raise TypeError(f"the keys {list(part)} of {path or 'the state'} must be strings")
            return {key: values_of(entry, f"{path}/{key}" if path else key) for key, entry in part.items()}
        if isinstance(part, list | tuple):
            return [values_of(entry, f"{path}/{number}") for number, entry in enumerate(part)]
        return part

    return tensors, values_of(state, "")


def join_tensors(tensors: Mapping[str, Tensor], values: Any) -> Any:
    """The inverse of `split_tensors`, except that tuples become lists."""
    if isinstance(values, dict):
        if values.keys() == {REFERENCE}:
            return tensors[values[REFERENCE]]
        return {key: join_tensors(tensors, entry) for key, entry in values.items()}
    if isinstance(values, list):
        return [join_tensors(tensors, entry) for entry in values]
    return values


def _link(old: Path, new: Path, content: bytes) -> bool:
    """Make `new` another name of the file `old` if this has the `content`. Returns whether it did."""
    try:
        if old.stat().st_size != len(content) or old.read_bytes() != content:
            return False
        os.link(old, new)
    except OSError:  # there is none, or the file system has no hard links
        return False
    return True


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
