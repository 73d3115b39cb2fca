"""What the tables of docs/ say of fields, figures, sizes and model families is what the code and the measurements say."""

import re
from collections.abc import Iterator
from typing import Any, ClassVar, get_origin, get_type_hints

import pytest
import torch
import transformers as T
from support.families import build, inputs
from support.methods import METHODS as SMALL
from support.paths import DOCS

from cl_prompts import HashPromptConfig, NoPromptsConfig, get_prompt_pool_model
from cl_prompts.backbones.structure import find_structure
from cl_prompts.interfaces import BackboneShape
from cl_prompts.methods import METHODS, PromptPoolConfig
from cl_prompts.methods.head_config import ClassifierConfig
from cl_prompts.methods.outlier_config import OutlierConfig
from cl_prompts.methods.shared.prefix_config import PrefixPromptConfig, QueriedPrefixConfig
from cl_prompts.methods.shared.task_inference_config import TaskInferenceConfig


SHARED = (
    PromptPoolConfig,
    ClassifierConfig,
    OutlierConfig,
    PrefixPromptConfig,
    QueriedPrefixConfig,
    TaskInferenceConfig,
)
OF_METHODS = {
    name: method.config_class for name, method in METHODS.items() if method.config_class.__module__.startswith("cl_")
}
CONFIGS: dict[str, Any] = {config.__name__: config for config in (*OF_METHODS.values(), *SHARED)}
NOT_CHOSEN = {"method", "state", "max_adapter_bytes", "strict_base", "verify", "declared"}  # kept by the model, not saved

Row = dict[str, str]


def cells(line: str) -> list[str]:
    return [cell.strip().replace("**", "") for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def tables(text: str) -> Iterator[tuple[str, list[Row]]]:
    """The line before each Markdown table, and its rows."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if number and re.fullmatch(r"\|[-:| ]*-[-:| ]*\|", line):
            header, body = cells(lines[number - 1]), []
            for row in lines[number + 1 :]:
                if not row.startswith("|"):
                    break
                body.append(dict(zip(header, cells(row), strict=True)))
            yield lines[number - 2] if number > 1 else "", body


def tables_marked(mark: str) -> list[tuple[str, str, list[Row]]]:
    """Page, what the comment before it names, and rows of each table that such a comment stands before."""
    found = []
    for page in sorted(DOCS.rglob("*.md")):
        for before, rows in tables(page.read_text()):
            named = re.fullmatch(rf"<!-- {mark}: (\S+) -->", before.strip())
            if named:
                found.append((str(page.relative_to(DOCS)), named[1], rows))
    return found


DEFAULTS = tables_marked("defaults")
QUOTED = tables_marked("from")


@pytest.mark.parametrize(("page", "name", "rows"), DEFAULTS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_defaults_on_a_page_are_those_of_the_config(page: str, name: str, rows: list[Row]) -> None:
    config = CONFIGS[name]
    own = {
        field
        for field, kind in get_type_hints(config).items()
        if field in config.__annotations__ and get_origin(kind) is not ClassVar and field not in NOT_CHOSEN
    }
    fields = config.__dataclass_fields__
    expected = {}
    for field in own:
        given = fields[field]
        factory = given.default_factory
        default = factory() if callable(factory) else given.default
        expected[f"`{field}`"] = f"`{default!r}`".replace("'", '"')
    assert {row["field"]: row["default"] for row in rows} == expected


def test_every_config_is_on_one_page() -> None:
    named = [name for _, name, _ in DEFAULTS]
    assert sorted(named) == sorted(set(CONFIGS) - {"NoPromptsConfig"})  # which has no field of its own


def test_every_method_is_in_the_table_of_methods() -> None:
    text = (DOCS / "methods" / "index.md").read_text()
    listed = next(rows for _, rows in tables(text) if rows and "`method=`" in rows[0])
    found = {re.sub(r"\[`(\w+)`\].*", r"\1", row["`method=`"]): row["config"].strip("`") for row in listed}
    assert found == {name: config.__name__ for name, config in OF_METHODS.items()}


@pytest.mark.parametrize(("page", "source", "rows"), QUOTED, ids=lambda value: value if isinstance(value, str) else "")
def test_figures_on_a_page_are_those_of_its_source(page: str, source: str, rows: list[Row]) -> None:
    known = [row for _, table in tables((DOCS / source).read_text()) for row in table]
    for row in rows:
        assert any(row.items() <= other.items() for other in known), f"{page}: {source} has no {row}"


def test_tables_are_found() -> None:
    assert len(DEFAULTS) >= 17
    assert len(QUOTED) >= 12


def table_below(page: str, mark: str) -> list[Row]:
    return next(rows for before, rows in tables((DOCS / page).read_text()) if mark in before)


# The names that docs/results.md has for what `--method` calls otherwise.
IN_RESULTS = {
    "coda": "CODA-Prompt",
    "vq_prompt": "VQ-Prompt",
    "layer_grouped": "layer-grouped prompts",
    "smope": "SMoPE",
    "hash": "Hash (cosine head)",
    "dualprompt": "DualPrompt",
    "vpt deep": "VPT deep: one prompt in every block",
    "l2p_prefix": "L2P with prefixes",
    "norga": "NoRGa",
    "hide": "HiDe-Prompt",
    "l2p": "L2P, mean of three seeds (below)",
}


def test_the_table_of_all_methods_says_what_was_measured() -> None:
    """The first table of each kind counts: bf16 stands before float32, all methods before single ones."""
    speed, loading = {}, {}
    for _, rows in tables((DOCS / "performance.md").read_text()):
        for row in rows:
            name = row.get("method", "").split(" (")[0]
            if "inference" in row:
                speed.setdefault(name, row)
            elif "adapter, MB" in row:
                loading[name] = row["adapter, MB"]
    every = [rows for _, rows in tables((DOCS / "results.md").read_text()) if rows and "arguments" in rows[0]]
    accuracy = {row["learner"]: row["FAA"] for row in every[0]}
    for row in table_below("choosing.md", "all methods"):
        name = re.sub(r"\[(.+)\]\(.*", r"\1", row["method"])
        cost = speed[name]
        assert row["FAA"] == accuracy[IN_RESULTS[name]], name
        assert row["answer"] == cost["inference"], name
        assert (row["step"], row["step, query at hand"]) == (cost["step"], cost["step, query at hand"]), name
        assert row["adapter, MB"] == loading.get(name, ""), name


def test_what_a_task_adds() -> None:
    """Bytes on ViT-B/16 from the second task of ten classes to the third."""
    shape = BackboneShape(width=768, num_layers=12, num_heads=12, head_dim=64)

    def size(pool: torch.nn.Module) -> int:
        return sum(t.numel() * t.element_size() for t in pool.state_dict().values())

    for row in table_below("choosing.md", "all methods"):
        name, _, deep = re.sub(r"\[(.+)\]\(.*", r"\1", row["method"]).partition(" ")
        with torch.device("meta"):
            config_class, pool_class = METHODS[name]
            pool = pool_class(config_class(**({"deep": True} if deep else {})), shape)
            pool.rebuild([range(10), range(10, 20)])
            before = size(pool)
            pool.rebuild([range(20, 30)])
        assert f"{(size(pool) - before) / 1000:,.0f}" == row["a task adds, kB"], name


def test_how_large_hash_is() -> None:
    """docs/methods/hash.md: numbers of prompts and routers after ten tasks, at width 768."""
    shape = BackboneShape(width=768, num_layers=12, num_heads=12, head_dim=64)
    for row in table_below("methods/hash.md", "ten tasks"):
        fields = re.fullmatch(r"`(\w+)=(\d+)`", row["fields"])
        with torch.device("meta"):
            config_class, pool_class = METHODS[row["method"]]
            pool = pool_class(config_class(**({fields[1]: int(fields[2])} if fields else {})), shape)
            pool.rebuild([range(10 * task, 10 * task + 10) for task in range(10)])
        sizes = {name: tensor.numel() for name, tensor in pool.state_dict().items()}
        counted = {part: sum(n for name, n in sizes.items() if part in name) for part in ("prompts", "router")}
        prompts, routers = counted.values()
        assert [f"{n:,}" for n in (prompts, routers, prompts + routers)] == list(row.values())[2:]


def refused() -> dict[str, Any]:
    """Small models of kinds that are not supported."""
    one = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    image = {**one, "image_size": 32, "patch_size": 16}
    text = {**one, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return {
        "PvtModel": T.PvtConfig(),
        "CLIPModel": T.CLIPConfig(text_config=text, vision_config=image),
        "ResNetModel": T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]),
    }


def test_models_are_refused_with_the_words_of_the_page() -> None:
    rows = {row["model"].strip("`"): row["what the error says"] for row in table_below("transformers.md", "refused")}
    configs = refused()
    assert rows.keys() == configs.keys()
    for name, config in configs.items():
        with pytest.raises(TypeError) as caught:
            find_structure(getattr(T, name)(config))
        assert str(caught.value).startswith(f"{rows[name]}. Supported are ViT, DeiT"), name


def test_what_runs_without_tasks() -> None:
    """docs/choosing.md: all methods; no head in closed form on features that change."""
    free: dict[str, Any] = {"num_labels": 4, "class_mask": "batch"}
    for name, config in SMALL.items():
        model = get_prompt_pool_model(build("vit"), config(**free))
        model.attach_optimizer(torch.optim.SGD(model.parameter_groups(learning_rate=0.1)))
        model.train()(**inputs("vit", 4), labels=torch.arange(4)).loss.backward()
        assert model.eval()(**inputs("vit", 4)).logits.shape == (4, 4), name
    for closed in ({"head": "discriminant"}, {"head": "analytic"}, {"alignment": "covariance"}):
        with pytest.raises(ValueError, match="without tasks there is no time to consolidate images"):
            HashPromptConfig(**free, **closed)
        NoPromptsConfig(**free, **closed)
