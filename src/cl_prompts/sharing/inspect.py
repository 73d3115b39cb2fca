"""Facts about an adapter from its files: no tensor is read, no base model is loaded, no code of the adapter is run.

Imports neither torch nor PEFT for adapters of our methods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cl_prompts.sharing.config_facts import config_facts
from cl_prompts.sharing.run_record import RESULTS_FILE, RunRecord
from cl_prompts.storage.adapter_files import AdapterSource, find_adapter
from cl_prompts.storage.adapter_state import AdapterState
from cl_prompts.storage.bounded_read import MAX_ADAPTER_BYTES, MAX_RESULTS_BYTES
from cl_prompts.storage.declared import Declared


# Bytes of a number by its type in a safetensors header.
NUMBER_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
# Parts of an adapter with statistics of classes, and their tensors that are none.
WITH_STATISTICS = ("classifier", "running_gaussians", "pool.prototypes", "pool.class_means")
NO_STATISTICS = ("projection", "solution", "chosen_ridge", "fitted", "counted")


def describe_adapter(source: AdapterSource, subfolder: str | None = None, **hub: Any) -> dict[str, Any]:
    """Facts about an adapter that JSON can hold.

    Args:
        source: folder or Hub id, or the files that `find_adapter` found.
        subfolder: folder of the adapter in it.
        hub: `revision`, `token` and the like, for the Hub.

    Returns:
        "method", "title", "papers"; "base_model" (name, revision, class, width, blocks, heads, fingerprint, image size,
        precision, arguments);
        "format_version", "written_by"; "tasks" (a list per task of {"id", "name"}); "task_open"; "head", "readout",
        "normalize_features";
        "temperature" of the scores (None: not calibrated); "novelty_threshold" (None: unknown images cannot be told);
        "settings" (the fields of the method: pool size, prompt length, layers, ...); "parts" (tensors, numbers and bytes of
        each part of the weights), "numbers" and "bytes" of all; "figures" (percent, by learner), {} without `results.json`.

    Raises:
        ValueError: files are missing, damaged or foreign.
        cl_prompts.storage.hub_errors.HubError: the Hub cannot be reached or refuses.
    """
    files = find_adapter(source, subfolder, max_bytes=MAX_ADAPTER_BYTES, **hub)
    config = config_facts(files)
    state, values = config.state, config.values
    parts = sizes_of_parts(files.tensors)
    results = files.further_file(RESULTS_FILE, MAX_RESULTS_BYTES)
    return {
        "adapter": files.source,
        "method": values["method"],
        "title": config.title,
        "papers": config.papers,
        "base_model": {
            "name": values["base_model_name_or_path"],
            "revision": values["revision"],
            "class": (values["auto_mapping"] or {}).get("base_model_class"),
            "width": state.base_width,
            "blocks": state.base_layers,
            "heads": state.base_heads,
            "fingerprint": state.base_fingerprint,
            "image_size": state.image_size,
            "precision": state.base_precision,
            "arguments": {**(values["base_arguments"] or {}), **state.base_arguments},
        },
        "format_version": state.format_version,
        "written_by": state.written_by,
        "tasks": [[{"id": c, "name": state.class_names.get(str(c))} for c in task] for task in state.tasks],
        "task_open": state.task_open,
        "num_labels": values["num_labels"],
        "head": values["head"],
        "normalize_features": values["head"] == "discriminant" and values["normalize_features"],
        "readout": values["readout"] if values["readout"] != "auto" else state.pooling or "auto",
        "temperature": state.temperature,
        "novelty_threshold": state.novelty_threshold,
        "settings": config.settings,
        "parts": parts,
        "numbers": sum(part["numbers"] for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()),
        "figures": _figures(results, state),
    }


def sizes_of_parts(declared: Mapping[str, Declared]) -> dict[str, dict[str, int]]:
    """Tensors, numbers and bytes of each part of an adapter's weights, like "pool.prompts" or "head"."""
    parts: dict[str, dict[str, int]] = {}
    for name, tensor in sorted(declared.items()):
        part = parts.setdefault(_part_of(name), {"tensors": 0, "numbers": 0, "bytes": 0})
        numbers = math.prod(tensor.shape)
        part["tensors"] += 1
        part["numbers"] += numbers
        part["bytes"] += numbers * NUMBER_BYTES.get(tensor.dtype, 1)
    return parts


def class_statistics(declared: Mapping[str, Declared]) -> dict[str, Declared]:
    """The tensors of an adapter that were computed from features of its classes' training images."""
    return {
        name: tensor
        for name, tensor in declared.items()
        if _part_of(name) in WITH_STATISTICS and name.rpartition(".")[2] not in NO_STATISTICS
    }


def bytes_per_class(statistics: Mapping[str, Declared]) -> int:
    """Bytes of a class in these tensors: of a row or, in the sums [M, C] of the ridge head, a column."""
    size = 0
    for name, (dtype, shape) in statistics.items():
        part, _, last = name.rpartition(".")
        if part.endswith("classifier"):  # beside it, the Gram matrix
            size += NUMBER_BYTES.get(dtype, 1) * math.prod(shape[:1]) * (last == "sums")
        elif last != "products" and not (last == "spread" and len(shape) == 2):  # one for all classes
            size += NUMBER_BYTES.get(dtype, 1) * math.prod(shape[1:])
    return size


def _part_of(name: str) -> str:
    _, own, path = name.partition(".prompt_pool.")
    if not own:
        return "modules of the base"
    part, _, rest = path.partition(".")
    return part if part != "pool" else f"pool.{rest.partition('.')[0]}"


def _figures(path: Path | None, state: AdapterState) -> dict[str, dict[str, float]]:
    if path is None:
        return {}
    record = RunRecord.load(path)
    if record.weights_sha256 != state.weights_sha256:  # it is of other weights
        return {}
    return {name: matrix.summary() for name, matrix in record.results.items()}
