"""The command `cl-prompts inspect`. It imports no torch, so that it answers at once."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from cl_prompts.runtime.text import LONGEST_NAME, terminal_text
from cl_prompts.sharing.inspect import describe_adapter


def inspect(args: argparse.Namespace) -> int:
    """Print facts about an adapter."""
    facts = describe_adapter(args.adapter, revision=args.revision)
    print(json.dumps(facts, indent=1) if args.json else "\n".join(terminal_text(line) for line in _lines(facts)))
    return 0


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    base = facts["base_model"]
    images = "x".join(map(str, base["image_size"])) if base["image_size"] else "of any size"
    yield f"method    {facts['title']}"
    yield from (f"paper     {paper}" for paper in facts["papers"])
    yield f"base      {base['name'] or 'not named'}" + (f" at {base['revision']}" if base["revision"] else "")
    kind = f"{base['class']}, {base['blocks']} blocks of width {base['width']}, {base['heads']} heads"
    yield f"          {kind}; images {images}"
    yield f"head      {facts['head']}, reads {facts['readout']}{', normalized' if facts['normalize_features'] else ''}"
    temperature = facts["temperature"]
    yield f"scores    calibrated, temperature {temperature:.3g}" if temperature else "scores    not calibrated"
    threshold = facts["novelty_threshold"]
    yield "unknown   " + ("no threshold" if threshold is None else f"beyond a novelty of {threshold:.3g}")
    yield f"format    {facts['format_version']}, written by cl_prompts {facts['written_by'] or 'unknown'}"
    yield f"tasks     {len(facts['tasks'])}" + (", the last still open" if facts["task_open"] else "")
    for number, task in enumerate(facts["tasks"], 1):
        names = [terminal_text(c["name"] or str(c["id"]), LONGEST_NAME) for c in task]
        yield f"  {number}: {', '.join(names) or '(forgotten)'}"
    if facts["num_labels"] is not None:
        yield f"  task-free, {facts['num_labels']} classes"
    yield "settings"
    yield from (f"  {name} = {value}" for name, value in facts["settings"].items())
    yield f"size      {facts['numbers']:,} numbers, {facts['bytes']:,} bytes"
    for name, part in facts["parts"].items():
        yield f"  {name}: {part['numbers']:,} numbers, {part['bytes']:,} bytes"
    for name, figures in facts["figures"].items():
        headings = {"faa": "FAA", "caa": "CAA", "forgetting": "forgetting", "learning_accuracy": "when just learned"}
        yield f"figures   {name}: " + ", ".join(f"{words} {figures[key]:.1f}" for key, words in headings.items())
