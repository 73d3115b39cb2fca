"""What is known of an adapter without the classes of configs."""

import pytest
from support.make_method_table import text
from support.paths import ROOT

from cl_prompts.sharing.config_facts import TABLE, config_facts, facts_of_class, is_of_kind
from cl_prompts.storage.adapter_files import find_adapter


ADAPTERS = sorted(path.parent for path in (ROOT / "tests" / "adapters_v1").glob("*/adapter_config.json"))


def test_the_table_says_what_the_classes_say() -> None:
    assert TABLE.read_text() == text(), "run python tests/support/make_method_table.py"


def test_facts_are_those_of_the_class() -> None:
    for folder in ADAPTERS:
        files = find_adapter(folder)
        found, expected = config_facts(files), facts_of_class(files)
        assert found == expected, folder.name
        assert list(found.settings) == list(expected.settings)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, "int", True),
        (True, "int", False),
        (3, "float", True),
        (float("nan"), "float", False),
        (2**63, "int", False),
        (None, "int", False),
        (None, "int | None", True),
        ("x" * 1001, "str", False),
        ([0, 2], "list[int] | None", True),
        ([0, "2"], "list[int]", False),
        ([0] * 1001, "list[int]", False),
        ({"a": 1}, "dict | None", True),
        ({"a": [1]}, "dict", False),
        ([[1]], "list[list[int]]", True),
        (1, "Mapping[str, Declared]", False),
    ],
)
def test_kinds_of_values(value: object, kind: str, expected: bool) -> None:
    assert is_of_kind(value, kind) == expected
