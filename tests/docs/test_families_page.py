"""docs/families.md has every model of the matrix and every other vision model of `AutoModel`."""

import pytest
import transformers
from support.automodel_families import NEEDS, vision_models
from support.family_tables import HEADER, refused, works
from support.paths import DOCS


VERSION = "5.23"  # of transformers, for which the page was written
pytestmark = pytest.mark.skipif(
    not transformers.__version__.startswith(VERSION), reason=f"docs/families.md is of transformers {VERSION}"
)


def rows_below(mark: str) -> list[tuple[str, ...]]:
    """Cells of the rows of the table that stands behind a mark, header and line left out."""
    lines = (DOCS / "families.md").read_text().split(f"<!-- {mark} -->\n")[1].splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))] if "" in lines else lines
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in (table[0], *table[2:])]


@pytest.mark.slow
def test_the_models_that_work_are_as_the_page_says() -> None:
    """Mend: python docs/figures/families.py."""
    assert rows_below("families") == [HEADER, *works()]
    assert len({row[1] for row in rows_below("families")[1:]}) >= 40


def test_every_vision_model_of_automodel_is_on_the_page() -> None:
    """Mend: python docs/figures/families.py."""
    working = {row[1].strip("`") for row in rows_below("families")[1:]}
    others = {row[0].strip("`") for row in rows_below("refused families")[1:]}
    assert not working & others
    assert others == set(vision_models()) - working


@pytest.mark.slow
def test_the_reasons_are_as_the_page_says() -> None:
    working = {row[1].strip("`") for row in rows_below("families")[1:]}
    found = dict(refused(working))
    for name, reason in rows_below("refused families")[1:]:
        # Other libraries are there on other machines.
        assert reason.startswith("not tried") or found[name].startswith(NEEDS) or found[name] == reason
