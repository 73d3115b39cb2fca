"""Which rows of a parametrized test run every time: the mark `by_turns`.

`@pytest.mark.by_turns(n)` keeps every n-th row, and the methods of `EVERYWHERE` on ViT; `always=()` keeps no
method for its name. The other rows are `slow`. Tests of one module keep the same rows, so that what a row sets up is
shared; other modules keep others, so that each method is tried somewhere in every run.
"""

from collections.abc import Collection, Iterable
from itertools import groupby
from zlib import crc32

import pytest

from support.methods import EVERYWHERE


def mark_turns(items: Iterable[pytest.Item]) -> None:
    """Mark `slow` the rows that are not in this run."""
    turned = [item for item in items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    for _, rows in groupby(turned, lambda item: (item.path, item.originalname)):
        found = list(rows)
        mark = found[0].get_closest_marker("by_turns")
        if mark is None:
            continue
        (every,) = mark.args
        first = crc32(found[0].path.name.encode()) % min(every, len(found))
        for number, item in enumerate(found):
            if number % every != first and not _always(item, mark.kwargs.get("always", EVERYWHERE)):
                item.add_marker(pytest.mark.slow)


def _always(item: pytest.Function, names: Collection[str]) -> bool:
    params = item.callspec.params
    return params.get("method") in names and params.get("family", "vit") == "vit"


def in_this_run(request: pytest.FixtureRequest, argument: str) -> list[str]:
    """Values of an argument in the module's tests of this run: what a fixture for all of them has to make."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return list(dict.fromkeys(item.callspec.params[argument] for item in items if argument in item.callspec.params))
