"""`cl-prompts train` and `compare`: what they say before a run starts."""

import pytest

from cl_prompts.cli import main


Output = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["train", "--benchmark", "nope"], "no benchmark 'nope': choose one of"),
        (["train", "--epoch", "3"], "no such arguments: ['--epoch', '3']"),
        (["compare", "nope"], "no comparison 'nope': choose one of ['compare_"),
    ],
)
def test_a_mistake_in_the_settings_of_a_run_is_one_line(line: list[str], said: str, capsys: Output) -> None:
    assert main(line) == 1
    assert capsys.readouterr().err.startswith(f"cl-prompts: {said}")


@pytest.mark.parametrize("command", ["train", "compare"])
def test_what_a_run_needs_is_named_before_it_starts(command: str, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl_prompts.cli.commands.find_spec", lambda name: None)
    assert main([command]) == 1
    assert capsys.readouterr().err == f"cl-prompts: {command} needs matplotlib, sklearn: pip install 'cl-prompts[train]'\n"


@pytest.mark.parametrize("command", ["train", "compare"])
def test_the_help_of_a_run_names_its_command(command: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: cl-prompts {command} [-h]")
