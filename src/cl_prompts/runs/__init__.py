"""A whole run on image data from settings: recipes, images, results folder, comparisons. Needs the extra `train`."""

from __future__ import annotations

from pathlib import Path


HERE = Path(__file__).parent
RECIPES = HERE / "recipes"
BENCHMARKS = {path.stem: path for path in sorted((HERE / "benchmarks").glob("*.yaml"))}
MICRO_VIT = HERE / "micro_vit"
