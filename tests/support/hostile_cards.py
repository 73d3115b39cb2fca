"""Damage to what a model card is written from, drawn by hypothesis: other contents of files, by name."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from support.hostile_files import CONFIG
from support.hostile_values import TEXTS, VALUES


def fields_of_results(draw: Any, results: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Anything in any field."""
    for _ in range(draw(st.integers(1, 3))):
        results[draw(st.sampled_from([*sorted(results), *TEXTS]))] = draw(VALUES)
    return {"results.json": json.dumps(results)}


def matrices_of_results(draw: Any, results: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Anything in an accuracy matrix."""
    part = draw(st.sampled_from(["columns", "sizes", "task_incremental", "before", "baseline", "x"]))
    name = draw(st.sampled_from([*results["results"], *TEXTS]))
    results["results"][name] = {**results["results"]["l2p"], part: draw(VALUES)}
    return {"results.json": json.dumps(results)}


def bytes_of_results(draw: Any, results: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """A byte changed, or the end cut off."""
    content = bytearray(json.dumps(results).encode())
    place = draw(st.integers(0, len(content) - 1))
    content[place] ^= draw(st.integers(1, 255))
    return {"results.json": bytes(content) if draw(st.booleans()) else bytes(content[:place])}


def names_on_the_card(draw: Any, results: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Code, paths and control characters in all that a card shows."""
    hostile = st.sampled_from([*TEXTS, "<script>|\n# x", "<!-- End of what cl_prompts writes. -->", "---"])
    config["state"]["class_names"] = {"4": draw(hostile), "1": draw(hostile)}
    config["base_model_name_or_path"] = draw(hostile)
    config["auto_mapping"] = draw(st.sampled_from([None, {}, {"base_model_class": "x" * 99}, {"base_model_class": [1]}]))
    results |= {field: draw(hostile) for field in ("command", "data", "machine", "written")}
    results["datasets"] = draw(st.lists(st.one_of(hostile, hostile, VALUES), max_size=2))
    results["settings"] = {draw(hostile): draw(VALUES)}
    name = draw(hostile)
    results["results"] = {name: results["results"]["l2p"]}
    results["trainable"] = {name: draw(st.one_of(st.integers(), VALUES))}
    return {"results.json": json.dumps(results), CONFIG: json.dumps(config)}


HEADS = [
    "tags: [a, 1, null, {b: c}]",
    "tags: x",
    "tags: 3",
    "tags: !!set {a, b}",
    "model-index: 3",
    "model-index: [{name: x, results: [{}]}]",
    "a: &a [1]\nb: *a",
    "<<: {a: 1}",
    '!!python/object/apply:os.system ["touch /tmp/x"]',
    "a: [",
    "- 1",
    "self: 1",
    "to_dict: x",
    "1: 2",
    "? [a]\n: b",
    "license: [a]",
    "base_model: {a: b}",
    "date: 2020-13-41",
    "a: .nan",
    "x: " + "9" * 5000,
    "a: \u202eb",
]


def card_that_is_there(draw: Any, results: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """A card whose metadata is odd, or none."""
    head = st.one_of(st.sampled_from(HEADS), st.text(max_size=20))
    heads = head.map(lambda text: f"---\n{text}\n---\n# x".encode(errors="replace"))
    return {"README.md": draw(st.one_of(heads, heads, st.binary(max_size=30)))}


CARD_DAMAGES = (fields_of_results, matrices_of_results, bytes_of_results, names_on_the_card, card_that_is_there)
