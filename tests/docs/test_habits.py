"""Files for those who carry the project on say what is so: versions, pins, extras, markers and commands."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.documentation_blocks import ROOT, Block, parts
from support.documentation_commands import check_shell

from cl_prompts import __version__
from cl_prompts.methods import METHODS


PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
pins = dict(
    line.lower().replace("-", "_").split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)


def test_all_files_say_the_same_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(heading for heading in headings if heading != "Unreleased") == __version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == __version__
    assert citation["license"] == PROJECT["project"]["license"]


def test_the_papers_of_all_methods_are_cited() -> None:
    cited = {reference.get("url") for reference in yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]}
    assert {paper for method in METHODS.values() for paper in method.config_class.papers} <= cited


def test_hooks_have_the_versions_of_ci() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    wanted = [one for repo in config["repos"] for hook in repo["hooks"] for one in hook.get("additional_dependencies", [])]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert len(wanted) >= 3
    for dependency in wanted:
        name, version = dependency.lower().replace("-", "_").split("==")
        assert pins.get(name) == version, f"{dependency}: constraints.txt has {pins.get(name)}"


def test_contributing_names_extras_and_markers_that_exist() -> None:
    extras = set(PROJECT["project"]["optional-dependencies"])
    assert set(re.findall(r"extra `(\w+)`", CONTRIBUTING)) <= extras
    markers = {line.split(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]} - {
        "by_turns(n, always=...)"
    }
    assert set(re.findall(r"pytest -m (\w+)", CONTRIBUTING)) == markers, "each marker has its command"


def test_contributing_names_files_that_exist() -> None:
    named = re.findall(r"`((?:src|tests|examples|docs|\.ci)/[\w./]*)`", CONTRIBUTING)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_a_folder_says_what_each_of_its_files_is_for(folder: str) -> None:
    told = (ROOT / folder / "README.md").read_text()
    scripts = [script.name for script in (ROOT / folder).glob("*.py")]
    assert scripts
    assert [name for name in scripts if name not in told] == []


def test_no_command_needs_a_folder_beside_the_repository() -> None:
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    files += [
        f for part in ("examples", "benchmarks", "src") for f in (ROOT / part).rglob("*") if f.suffix in (".md", ".py")
    ]
    assert len(files) > 100
    outside = re.compile(r"(?<!\w)\.\./shared|/work/")
    assert [str(file) for file in files if file.name != "development.md" and outside.search(file.read_text())] == []


def test_commands_of_contributing_are_commands() -> None:
    blocks = [part for part in parts(ROOT / "CONTRIBUTING.md") if isinstance(part, Block)]
    assert {block.language for block in blocks} == {"sh"}
    in_tables = re.findall(r"\| `((?:pytest|ruff|mkdocs|bash) ?.*?)` \|", CONTRIBUTING)
    for code in [block.code for block in blocks] + in_tables:
        check_shell(code, scripts=("tests/support/make_adapter_fixtures.py",))


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_issue_forms_have_what_a_code_host_wants(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert content.keys() == {"name", "description", "labels", "body"}
    fields = [part for part in content["body"] if part["type"] != "markdown"]
    ids = [part["id"] for part in fields]
    assert len(ids) == len(set(ids))
    for part in content["body"]:
        assert part["type"] in ("textarea", "input", "checkboxes", "markdown")
        assert part["attributes"].get("label") or part["attributes"].get("value") or part["attributes"].get("options")
    if form.stem in ("bug", "number"):
        assert "cl-prompts inspect" in form.read_text()
