"""Metrics for Hugging Face `evaluate`. They are loaded from a path, without network access.

metric = evaluate.load(path_of("continual_accuracy"))
"""

from __future__ import annotations

from pathlib import Path


FOLDER = Path(__file__).parent


def path_of(name: str) -> str:
    """The path of the module called `name`, for `evaluate.load`.

    Raises:
        ValueError: there is no such module.
    """
    known = sorted(file.parent.name for file in FOLDER.glob("*/*.py") if file.stem == file.parent.name)
    if name not in known:
        raise ValueError(f"there is no evaluate module {name!r}: choose one of {known}")
    return str(FOLDER / name)
