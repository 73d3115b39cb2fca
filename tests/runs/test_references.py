"""References that runs on the same features share through the folder of the query cache."""

import json
from pathlib import Path

import pytest
import torch
from support.small_runs import small_stream

from cl_prompts.continual import AccuracyMatrix, ContinualArguments
from cl_prompts.runs.arguments import Arguments
from cl_prompts.runs.references import references


STREAM = small_stream()


def found(
    folder: Path, say: list[str], *, shift: float = 0.0, cosine: bool = False, seed: int = 0
) -> dict[str, AccuracyMatrix]:
    generator = torch.Generator().manual_seed(5)
    train, test = (torch.randn(len(labels), 4, generator=generator) for labels in (STREAM.train_labels, STREAM.test_labels))
    args = Arguments(config=["head=cosine"] if cosine else [])
    training = ContinualArguments("unused", query_cache=str(folder), seed=seed, num_train_epochs=1)
    return references(train + shift, test, STREAM, args, training, say.append)


def test_a_second_run_reads_what_the_first_computed(tmp_path: Path) -> None:
    told: list[str] = []
    first = found(tmp_path, told)
    (file,) = tmp_path.glob("references-*.json")
    content = json.loads(file.read_text())
    again = {name: matrix.to_dict() for name, matrix in found(tmp_path, told).items()}
    assert again == content == {name: matrix.to_dict() for name, matrix in first.items()}
    content["nearest class mean"]["columns"][0][0] = 12.5
    file.write_text(json.dumps(content))
    assert found(tmp_path, told)["nearest class mean"].columns[0][0] == 12.5  # it was read
    assert told == []


@pytest.mark.parametrize("other", [{"shift": 0.1}, {"cosine": True}, {"seed": 1}], ids=["features", "head", "seed"])
def test_other_runs_have_a_file_of_their_own(other: dict[str, float], tmp_path: Path) -> None:
    found(tmp_path, [])
    found(tmp_path, [], **other)  # type: ignore[arg-type]
    assert len(list(tmp_path.glob("references-*.json"))) == 2


def test_a_damaged_file_is_told_and_replaced(tmp_path: Path) -> None:
    told: list[str] = []
    first = found(tmp_path, told)
    (file,) = tmp_path.glob("references-*.json")
    whole = file.read_text()
    file.write_text(whole[:50])
    assert {n: m.to_dict() for n, m in found(tmp_path, told).items()} == {n: m.to_dict() for n, m in first.items()}
    assert "truncated" in told[0]
    assert file.read_text() == whole
    assert len(told) == 1


def test_nothing_is_kept_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found("", [])
    assert list(tmp_path.iterdir()) == []
