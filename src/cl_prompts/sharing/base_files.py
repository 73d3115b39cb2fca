"""The files of a base model: its config, safetensors and image processor. Nothing else of a base is fetched or read.

transformers, given a folder or Hub id, follows what it finds there: an `adapter_config.json` leads it to another repository
and to a pickle, a config may name an index, kernels or a second model. Here the files are fetched by name, the config is
reduced to what describes the model, and both are checked against each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cl_prompts.runtime.text import short_repr
from cl_prompts.sharing.image_processor import BASE_CONFIG, PROCESSOR_FILE
from cl_prompts.storage.bounded_read import MAX_BASE_CONFIG_BYTES, read_json_object
from cl_prompts.storage.declared import Declared, declared_tensors
from cl_prompts.storage.file_source import FileSource
from cl_prompts.storage.hub_errors import HubError


BASE_WEIGHTS, BASE_INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARDS = 1000
LONGEST_NAME = 300  # characters of a tensor's name
SHARD = re.compile(r"[\w-][\w.-]{0,100}\.safetensors", re.ASCII)

MAX_BLOCKS = 1000
MAX_LABELS = 100_000
MAX_ENTRIES = 300_000  # of a config: the names of all labels, in both directions
MAX_NUMBER = 2**31
MAX_DEPTH = 10
BLOCKS = re.compile(r"(\w+_)?(layers|depths?|blocks|repeats|stages|experts)", re.ASCII)
# Fields of a config that make transformers fetch more files, patch its classes or read weights in another way.
REFUSED = ("quantization_config", "compression_config", "per_layer_config", "fusion_config", "kernel_config", "backbone")
REFUSED_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")  # of timm's architectures
# Fields that say nothing about the model's computation. Names that begin with "_" or end with "_plan" are left out, too.
LEFT_OUT = (
    "auto_map",
    "transformers_weights",
    "distributed_config",
    "experts_implementation",
    "use_kernels",
    "name_or_path",
)
ATTENTION = ("eager", "sdpa")  # others need kernels that transformers may fetch


@dataclass(frozen=True)
class BaseFiles:
    """The files of a base model.

    Args:
        folder: the local folder that holds them.
        config: content of `config.json`, without fields that do not describe the model.
        weights: safetensors files.
        tensors: what their headers declare, by name.
    """

    folder: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    tensors: Mapping[str, Declared]


def find_base_files(place: FileSource, max_bytes: int | None = None) -> BaseFiles:
    """Fetch the files of a base, all of one commit, and check them as far as that goes without building the model.

    Args:
        place: where they lie.
        max_bytes: refuse larger weights before they are fetched; None: no limit.

    Raises:
        ValueError: a file is missing, damaged or too large, or the config asks for more than a model of transformers.
        cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
    """
    path = place.fetch(BASE_CONFIG, MAX_BASE_CONFIG_BYTES)
    if path is None:
        raise ValueError(f"it has no {BASE_CONFIG}")
    place = place.at_commit_of(path)
    content = read_json_object(path, MAX_BASE_CONFIG_BYTES, MAX_ENTRIES)
    described = _Description(content)
    weights = _fetch_weights(place, max_bytes)
    tensors = {name: tensor for file in weights for name, tensor in declared_tensors(file).items()}
    wrong = [name for name in tensors if not (name.isprintable() and len(name) <= LONGEST_NAME)]
    if wrong:  # transformers prints the names of tensors that it does not know
        raise ValueError(f"its weights have a tensor named {short_repr(wrong[0])}")
    described.check_blocks(len(tensors), " tensors of its weights")
    return BaseFiles(path.parent, described.config, weights, tensors)


def base_file_names(place: FileSource) -> list[str]:
    """Names of the files of a base that are there: config, image processor and safetensors.

    Raises:
        ValueError: there are no safetensors, or a file is no regular file.
    """
    weights = [BASE_WEIGHTS] if place.size(BASE_WEIGHTS) is not None else [BASE_INDEX, *_shards(place)]
    return [name for name in (BASE_CONFIG, PROCESSOR_FILE, *weights) if place.size(name) is not None]


def _fetch_weights(place: FileSource, max_bytes: int | None) -> tuple[Path, ...]:
    names, whole = [BASE_WEIGHTS], None
    try:
        whole = place.size(BASE_WEIGHTS)
    except HubError:  # an offline cache does not know whether the file exists
        if place.fetch(BASE_INDEX, MAX_BASE_CONFIG_BYTES) is None:
            raise
    if whole is None:
        names = _shards(place)
        whole = sum(place.size(name) or 0 for name in names)
    if max_bytes is not None and whole > max_bytes:
        raise ValueError(f"its weights have {whole:,} bytes, more than the {max_bytes:,} that are taken here")
    files = [place.fetch(name, None) for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if file is None]
    if missing:
        raise ValueError(f"it has no {short_repr(missing)}")
    return tuple(file for file in files if file is not None)


def _shards(place: FileSource) -> list[str]:
    index = place.fetch(BASE_INDEX, MAX_BASE_CONFIG_BYTES)
    if index is None:
        raise ValueError(f"it has no {BASE_WEIGHTS} and no {BASE_INDEX}; a pickle is never loaded")
    named = read_json_object(index, MAX_BASE_CONFIG_BYTES, MAX_ENTRIES).get("weight_map")
    shards = list(dict.fromkeys(named.values())) if isinstance(named, dict) and _all_text(named.values()) else []
    wrong = [name for name in shards if not SHARD.fullmatch(name)]
    if not shards or wrong or len(shards) > MAX_SHARDS:
        raise ValueError(
            f"its {BASE_INDEX} does not name 1 to {MAX_SHARDS:,} safetensors files: {short_repr(wrong or named)}"
        )
    return shards


def _all_text(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


class _Description:
    """A config reduced to the fields that describe the model, each checked.

    Args:
        content: of `config.json`.

    Raises:
        ValueError: it asks for more than a plain model of transformers, or for one beyond all sizes.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self.blocks: dict[str, int] = {}  # fields that count blocks; transformers loops over them
        self.config: dict[str, Any] = self._reduced(content, "", 0)
        self.check_blocks(MAX_BLOCKS, "")

    def check_blocks(self, limit: int, unit: str) -> None:
        """Raise ValueError if a field that counts blocks is larger than `limit`."""
        for name, blocks in self.blocks.items():
            if blocks > limit:
                raise ValueError(f"its config has {blocks:,} blocks, more than {limit:,}{unit} ({name})")

    def _reduced(self, value: Any, name: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"its config is nested more than {MAX_DEPTH} levels deep")
        if isinstance(value, dict):
            return {key: self._reduced(part, key, depth + 1) for key, part in value.items() if _describes(key, part)}
        if isinstance(value, list):
            self._count(name, sum(part for part in value if type(part) is int))
            return [self._reduced(part, name, depth + 1) for part in value]
        if type(value) is int:
            self._count(name, value)
        _check_value(name, value)
        return value

    def _count(self, name: str, blocks: int) -> None:
        if BLOCKS.fullmatch(name):
            self.blocks[name] = max(blocks, self.blocks.get(name, 0))


def _describes(name: str, value: Any) -> bool:
    """Whether a field is kept. Raises ValueError for one that is refused."""
    if name in REFUSED and value is not None:
        raise ValueError(f"its config has {name}={short_repr(value)}: only plain models of transformers are built")
    if name == "attn_implementation":
        for asked in value.values() if isinstance(value, dict) else (value,):
            if isinstance(asked, str) and "/" in asked:  # code of a repository
                raise ValueError(f"its config asks for the attention {short_repr(asked)} from the Hub")
        return isinstance(value, str) and value in ATTENTION
    return not (name in LEFT_OUT or name.startswith("_") or name.endswith("_plan"))


def _check_value(name: str, value: Any) -> None:
    """Raise ValueError for a value that makes transformers loop, allocate or fetch before it looks at the weights."""
    if isinstance(value, str) and value.startswith(REFUSED_PREFIXES):
        raise ValueError(f"its config names {short_repr(value)}, which is elsewhere: only its own files are read")
    if type(value) is int and abs(value) > MAX_NUMBER:
        raise ValueError(f"its config has {name}={short_repr(value)}, more than {MAX_NUMBER:,}")
    if name == "num_labels" and type(value) is int and value > MAX_LABELS:
        raise ValueError(f"its config has {value:,} labels, more than {MAX_LABELS:,}")
    if name in ("dtype", "torch_dtype") and value is not None:
        found = getattr(torch, value, None) if isinstance(value, str) else None
        if not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ValueError(f"its config has {name}={short_repr(value)}, which is no floating type of torch")
