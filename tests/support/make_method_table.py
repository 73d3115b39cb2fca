"""Writes `sharing/methods.json`, from which `cl-prompts inspect` knows our methods without importing them.

PYTHONPATH=tests python tests/support/make_method_table.py
"""

import json
import re
from dataclasses import MISSING, Field, fields
from typing import Any

from cl_prompts.methods import METHODS, PromptPoolConfig
from cl_prompts.sharing.config_facts import OF_PEFT, TABLE


def described(config: type) -> dict[str, list[Any]]:
    """Kind and default of each field that a file may have, by name."""
    return {
        field.name: [kind_of(field), field.default if field.default_factory is MISSING else field.default_factory()]
        for field in fields(config)
        if not field.metadata.get("runtime") and field.name not in (*OF_PEFT, "method", "state")
    }


def kind_of(field: "Field[Any]") -> str:
    """The annotation; PEFT writes "Optional[str]" for "str | None"."""
    kind = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", str(field.type))
    return kind.replace("Union[str, TaskType]", "None").replace("dict[str, Any]", "dict")


def table() -> dict[str, Any]:
    """What the config classes know."""
    shared = described(PromptPoolConfig)
    methods = {}
    for name, method in sorted(METHODS.items()):
        config: Any = method.config_class
        own = {key: value for key, value in described(config).items() if shared.get(key) != value}
        methods[name] = {
            "title": config.__doc__.splitlines()[0],
            "papers": list(config.papers),
            "retired_fields": list(config.retired_fields),
            "older_values": dict(config.older_values),
            "fields": own,
        }
    return {"shared": shared, "methods": methods}


def text() -> str:
    """The table as JSON, a field a line."""
    lists = re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", json.dumps(table(), indent=1))
    return re.sub(r'\[\n\s+("[^"\n]*"),\n\s+([^\n]*)\n\s+\]', r"[\1, \2]", lists) + "\n"


if __name__ == "__main__":
    TABLE.write_text(text())
