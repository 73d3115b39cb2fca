"""Damage of every kind to the two files of an adapter, drawn by hypothesis."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from cl_prompts.storage.integrity import CLASSES_SUFFIX, digest
from support.hostile_values import TEXTS, VALUES
from support.hostile_watch import PLANTED


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What must come of a load: it is refused; it is refused or answers as the undamaged adapter does; or it is refused or
# answers (another adapter than the original, but a whole one: nothing vouches for the values that a stranger writes).
REFUSED, SAME, ANY = "refused", "same", "any"


@dataclass
class Case:
    """An adapter's files, in memory.

    Args:
        config: parsed `adapter_config.json`.
        weights: content of `adapter_model.safetensors`.
        text: content of the config file, if it is not `config`.
        verify: what the load is told.
        act: done to the folder once the files are written.
        other: config of another method.
        mark: what hostile code would write.
    """

    config: dict[str, Any]
    weights: bytes
    other: dict[str, Any]
    mark: Path
    text: bytes | None = None
    verify: bool = True
    act: list[Callable[[Path], Any]] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / WEIGHTS).write_bytes(self.weights)
        (folder / CONFIG).write_bytes(json.dumps(self.config).encode() if self.text is None else self.text)
        for act in self.act:
            act(folder)


class Bomb:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


# ---- damages ------------------------------------------------------------------------------------------------------------
# Each changes a case and says what must come of it.


def bytes_of_the_weights(draw: Any, case: Case) -> str:
    """Cut, flipped, overwritten, put in, put behind: a third of it in the length, in the header, in the tensors."""
    content = bytearray(case.weights)
    header = 8 + int.from_bytes(content[:8], "little")
    place = draw(st.one_of(st.integers(0, 8), st.integers(8, header - 1), st.integers(header, len(content) - 1)))
    kind = draw(st.sampled_from(["cut", "flip", "flips", "overwrite", "insert", "append", "zero"]))
    if kind == "cut":
        del content[place:]
    elif kind == "flip":
        content[place] ^= 1 << draw(st.integers(0, 7))
        # In the bytes of a tensor, without the checksum, that is the user's own choice.
        case.verify = draw(st.integers(0, 3)) > 0
        return SAME if case.verify else ANY
    elif kind == "flips":
        for _ in range(draw(st.integers(2, 40))):
            content[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
    elif kind == "overwrite":
        some = draw(st.binary(min_size=1, max_size=64))
        content[place : place + len(some)] = some
    elif kind == "insert":
        content[place:place] = draw(st.binary(min_size=1, max_size=16))
    elif kind == "append":
        content += draw(st.binary(min_size=1, max_size=64))
    else:
        content[place:] = bytes(len(content) - place)
    case.weights = bytes(content)
    return SAME


DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U64", "BOOL", "C64", "F8_E4M3", "F8_E5M2", "F4"]
SHAPES = [[], [0], [-1], [2**63], [2**32, 2**32], [2**62, 4], [1.5], ["4"], None, [[4]], [10**9, 10**9], [1] * 1000, [True]]
OFFSETS = [[0, 0], [0, 8], [8, 0], [-8, 8], [0, 2**63], [2**64, 2**64], [0], [0, 1, 2], "0", [0.0, 8.0], None, [0, 10**30]]


def header_of_the_weights(draw: Any, case: Case) -> str:
    """Another type, shape or place of a tensor, other names, the same name twice, with checksum or without."""
    length = int.from_bytes(case.weights[:8], "little")
    header, data = json.loads(case.weights[8 : 8 + length]), case.weights[8 + length :]
    names = sorted(set(header) - {"__metadata__"})
    name = draw(st.sampled_from(names))
    kind = draw(
        st.sampled_from(["dtype", "shape", "offsets", "rename", "drop", "add", "twice", "metadata", "length", "deep"])
    )
    must = REFUSED
    if kind == "dtype":
        dtype = draw(st.sampled_from([*DTYPES, "torch.float32", "", None, 3]))
        must = SAME if dtype == header[name]["dtype"] else REFUSED
        header[name]["dtype"] = dtype
    elif kind == "shape":
        shape = draw(st.one_of(st.sampled_from(SHAPES), st.just([1, *header[name]["shape"]])))
        must = SAME if shape == header[name]["shape"] else REFUSED
        header[name]["shape"] = shape
    elif kind == "offsets":
        offsets = draw(st.one_of(st.sampled_from(OFFSETS), st.just(header[draw(st.sampled_from(names))]["data_offsets"])))
        must = SAME if offsets == header[name]["data_offsets"] else REFUSED
        header[name]["data_offsets"] = offsets
    elif kind == "rename":
        other = draw(st.one_of(st.sampled_from(TEXTS), st.sampled_from(names)))
        must = SAME if other == name else REFUSED
        header[other] = header.pop(name)
    elif kind == "drop":
        del header[name]
    elif kind == "add":
        header[draw(st.sampled_from(TEXTS))] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    elif kind == "metadata":
        # Nothing of it is read.
        header["__metadata__"] = draw(st.one_of(st.dictionaries(st.sampled_from(TEXTS), st.sampled_from(TEXTS)), VALUES))
        must = SAME
    text = json.dumps(header).encode()
    if kind == "twice":
        entry = {"dtype": draw(st.sampled_from(DTYPES)), "shape": [10**9], "data_offsets": [0, 8]}
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}".encode() + b"}"
    elif kind == "deep":
        text = b'{"a":' * draw(st.sampled_from([100, 10_000])) + text + b"}"
    size = len(text)
    if kind == "length":
        size = draw(st.sampled_from([0, 1, size - 1, size + 1, 2**20, 10**8, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]))
    if draw(st.booleans()):
        case.config["state"]["weights_sha256"] = None
    case.weights = struct.pack("<Q", size) + text + data
    return must


FLOATS, INTEGERS = [torch.float64, torch.float16, torch.bfloat16], [torch.int32, torch.uint8, torch.bool, torch.int16]
ODD = [torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]


def tensors(draw: Any, case: Case) -> str:
    """Another shape or type, NaN, Inf, one more or less; the checksum taken out, made anew, or that of the original."""
    found: dict[str, Tensor] = load(case.weights)
    name = draw(st.sampled_from(sorted(found)))
    tensor, must = found[name], REFUSED
    kind = draw(st.sampled_from(["shape", "dtype", "not finite", "more", "less", "other values"]))
    if kind == "shape":
        shape = [*tensor.shape]
        if shape and draw(st.booleans()):
            axis = draw(st.integers(0, len(shape) - 1))
            shape[axis] += draw(st.sampled_from([-1, 1, 7])) if shape[axis] else 1
        else:
            shape = [1, *shape]
        found[name] = torch.zeros(shape, dtype=tensor.dtype)
    elif kind == "dtype":
        dtype = draw(st.sampled_from([t for t in [*FLOATS, *INTEGERS, *ODD] if t != tensor.dtype]))
        found[name] = tensor.to(dtype)
        if tensor.is_floating_point() and dtype in FLOATS:
            must = ANY  # the same numbers, some of them rounded
        if tensor.dtype == torch.float64 and dtype == torch.float16:
            must = ANY  # Inf, some of them
    elif kind == "not finite":
        floating = sorted(n for n, t in found.items() if t.is_floating_point() and t.numel())
        name = draw(st.sampled_from(floating))
        place = draw(st.integers(0, found[name].numel() - 1))
        found[name].view(-1)[place] = draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
        case.verify = draw(st.booleans())
    elif kind == "more":
        other = draw(st.one_of(st.sampled_from([f"{name}.{t}" for t in ("", "..", "x")]), st.just("base_model.model.x")))
        found[other] = torch.zeros(draw(st.sampled_from([(), (1,), (2, 3)])))
    elif kind == "less":
        del found[name]
        if name.endswith(CLASSES_SUFFIX):
            must = ANY  # files of earlier versions have none; the config has the classes
    elif tensor.numel():
        must = ANY
        noise = torch.randint(-3, 4, tensor.shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        found[name] = (tensor + noise.to(tensor.dtype)).to(tensor.dtype)
    else:
        must = SAME
    case.weights = save(found)
    checksum = draw(st.sampled_from(["none", "new", "old"]))
    if checksum == "none":
        case.config["state"]["weights_sha256"] = None
    elif checksum == "new":
        case.config["state"]["weights_sha256"] = digest(found.items())
    return must


# Fields that say nothing of what the adapter answers.
TOLD = ["base_model_name_or_path", "revision", "auto_mapping", "peft_version"]
TOLD_STATE = ["written_by", "class_names", "image_size", "image_mean", "image_std"]


def names(draw: Any, case: Case) -> str:
    """Paths, code and control characters where names stand, and fields that nobody knows."""
    hostile = st.sampled_from(TEXTS)
    kind = draw(st.sampled_from(["told", "state", "unknown", "mapping", "class names"]))
    if kind == "told":
        case.config[draw(st.sampled_from(TOLD))] = draw(st.one_of(hostile, VALUES))
    elif kind == "state":
        case.config["state"][draw(st.sampled_from(TOLD_STATE))] = draw(st.one_of(hostile, VALUES))
    elif kind == "unknown":
        where = case.config if draw(st.booleans()) else case.config["state"]
        name = draw(st.sampled_from([*TEXTS, "auto_map", "trust_remote_code", "architectures", "runtime_config", "self"]))
        where[name] = draw(st.one_of(st.just({"AutoModel": f"{PLANTED}.Planted"}), VALUES))
        if name == "__class__" or name in ("default", "LORA"):
            return SAME
    elif kind == "mapping":
        keys = ["base_model_class", "parent_library", "auto_map", "AutoModel"]
        case.config["auto_mapping"] = draw(st.dictionaries(st.sampled_from(keys), hostile, max_size=4))
    else:
        ids = st.sampled_from(["0", "1", "-1", "x", *TEXTS])
        case.config["state"]["class_names"] = draw(st.dictionaries(ids, hostile, max_size=5))
    return SAME


SIZES = ["pool_size", "prompt_length", "top_k", "components_per_task", "projection_size", "num_labels", "bottleneck"]
SIZES += ["g_length", "e_length", "num_groups", "history_top", "ensemble"]


def settings_of_the_method(draw: Any, case: Case) -> str:
    """Other values of any field, fields taken out, sizes beyond all bounds."""
    fields = sorted(set(case.config) - {"state"})
    kind = draw(st.sampled_from(["value", "values", "less", "size", "kind"]))
    if kind == "less":
        for name in draw(st.lists(st.sampled_from(fields), min_size=1, max_size=6, unique=True)):
            del case.config[name]
    elif kind == "size":
        name = draw(st.sampled_from([n for n in SIZES if n in case.config]))
        case.config[name] = draw(st.sampled_from([10**4, 10**6, 10**7, 10**9, 10**12, 2**62, 2**63 - 1]))
        case.config["class_mask"] = "none"
        if draw(st.booleans()):
            case.config["state"]["weights_sha256"] = None
    elif kind == "kind":
        texts = [*TEXTS, "l2p", "hash", "coda", "LORA", "PROMPT_TUNING", "SEQ_CLS", "prompt_pool", ["hash"], {"a": 1}, None]
        case.config[draw(st.sampled_from(["method", "peft_type", "task_type"]))] = draw(st.sampled_from(texts))
    else:
        for _ in range(1 if kind == "value" else draw(st.integers(2, 4))):
            case.config[draw(st.sampled_from(fields))] = draw(VALUES)
    return ANY


def state(draw: Any, case: Case) -> str:
    """Other tasks, another base, another version, or no state at all."""
    values = case.config["state"]
    kind = draw(st.sampled_from(["field", "less", "tasks", "many tasks", "base", "whole"]))
    if kind == "field":
        values[draw(st.sampled_from(sorted(values)))] = draw(VALUES)
    elif kind == "less":
        for name in draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=4, unique=True)):
            del values[name]
    elif kind == "tasks":
        ids = st.one_of(st.integers(0, 9), st.sampled_from([-1, 2**63, 2**62, True, 1.0, "1", None]))
        values["tasks"] = draw(st.lists(st.lists(ids, max_size=4), max_size=6))
        values["task_open"] = draw(st.booleans())
    elif kind == "many tasks":
        count = draw(st.sampled_from([3, 10, 100, 2000]))
        new = draw(st.booleans())
        values["tasks"] = values["tasks"] + [[100 + i] if new else [0] for i in range(count)]
    elif kind == "base":
        name = draw(st.sampled_from(["base_width", "base_layers", "base_heads"]))
        values[name] = draw(st.sampled_from([0, 1, 64, 12, -1, 2**70]))
        return REFUSED
    else:
        case.config["state"] = draw(VALUES)
    return ANY


JSONS = [
    b"",
    b"{",
    b"null",
    b"[" * 10**5,
    b'{"peft_type":' * 10**4,
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{\x00}\x00",
    b'{"peft_type": "PROMPT_POOL"}',
    b'{"peft_type": "PROMPT_POOL", "method": "l2p", "pool_size": ' + b"9" * 5000 + b"}",
    b"\x80\x04\x95",
    b"<html>",
    b"!!python/object/apply:os.system ['true']",
]


def text_of_the_config(draw: Any, case: Case) -> str:
    """No JSON, other JSON, or JSON that was damaged on its way."""
    content = bytearray(json.dumps(case.config).encode())
    kind = draw(st.sampled_from(["other", "cut", "flip", "behind", "nested", "twice"]))
    if kind == "other":
        case.text = draw(st.sampled_from(JSONS))
        return REFUSED
    if kind == "cut":
        case.text = bytes(content[: draw(st.integers(0, len(content) - 1))])
        return REFUSED
    if kind == "flip":
        content[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
    elif kind == "behind":
        content += draw(st.binary(min_size=1, max_size=8))
    elif kind == "nested":
        depth = draw(st.sampled_from([10, 500, 10**4]))
        content = content[:-1] + b', "deep": ' + b"[" * depth + b"]" * depth + b"}"
    else:
        content = content[:-1] + b', "method": "vpt", "pool_size": 99}'
    case.text = bytes(content)
    return ANY


def files(draw: Any, case: Case) -> str:
    """Pickles, folders, links and other adapters' files where the two should be."""
    kind = draw(st.sampled_from(["pickle", "torch", "bin", "folder", "pipe", "loop", "mixed", "zip", "config gone"]))
    bomb = pickle.dumps(Bomb(case.mark))
    if kind == "pickle":
        case.weights = bomb
    elif kind == "torch":
        case.act.append(lambda folder: torch.save({"prompts": Bomb(case.mark)}, folder / WEIGHTS))
    elif kind == "bin":
        case.act += [
            lambda folder: (folder / WEIGHTS).unlink(),
            lambda folder: (folder / "adapter_model.bin").write_bytes(bomb),
        ]
    elif kind == "mixed":
        case.config = case.other
    elif kind == "zip":
        case.weights = b"PK\x03\x04" + draw(st.binary(max_size=64))
    elif kind == "config gone":
        case.act.append(lambda folder: (folder / CONFIG).unlink())
    else:
        make: dict[str, Callable[[Path], Any]] = {
            "folder": lambda path: path.mkdir(),
            "pipe": lambda path: os.mkfifo(path),
            "loop": lambda path: path.symlink_to(path.name),
        }
        name = draw(st.sampled_from([WEIGHTS, CONFIG]))
        case.act += [lambda folder: (folder / name).unlink(), lambda folder: make[kind](folder / name)]
    return REFUSED


DAMAGES = (
    bytes_of_the_weights,
    header_of_the_weights,
    tensors,
    names,
    settings_of_the_method,
    state,
    text_of_the_config,
    files,
)
