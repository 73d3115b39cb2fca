"""A whole run on image data from settings: recipes, images, results folder, comparisons. Needs the extra `train`."""

from __future__ import annotations

from pathlib import Path


HERE = Path(__file__).parent
RECIPES = HERE / "recipes"
BENCHMARKS = {path.stem: path for path in sorted((HERE / "benchmarks").glob("*.yaml"))}
# Lies in the wheel; a checkout has it with the examples.
MICRO_VIT = next(
    (folder for folder in (HERE / "micro_vit", HERE.parents[2] / "examples" / "micro_vit") if folder.is_dir()),
    HERE / "micro_vit",
)
