"""Folders of images are listed as `datasets` lists them, without its walks through the whole tree."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from datasets import Dataset, Image, load_dataset
from support.stream_data import pictures

from cl_prompts.runs.image_folders import OtherLayoutError, read_image_folder
from cl_prompts.runs.images import load_splits


(PICTURE,) = pictures(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def folder_of(folder: Path, names: Sequence[str]) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PICTURE.save(folder / name, "PNG")
    return str(folder)


def listed(rows: Dataset) -> list[tuple[str, str]]:
    names = rows.features["label"].names
    cells = rows.cast_column("image", Image(decode=False))
    return [(cell["path"], names[label]) for cell, label in zip(cells["image"], rows["label"], strict=True)]


KNOWN = {
    "splits": [
        "train/owl/2.png",
        "train/owl/1.png",
        "train/jay/10.png",
        "train/jay/9.JPG",
        "test/owl/1.png",
        "test/jay/1.png",
    ],
    "order of paths": ["train/b/1.png", "train/b-a/1.png", "train/b a/1.png", "train/B/1.png", "val/b/1.png"],
    "no splits": ["owl/1.png", "owl/.hidden.png", "jay/1.png", "wren/1.png", ".cache/x/1.png"],
    "another name of a split": ["training/owl/1.png", "training/jay/1.png", "eval/owl/1.png", "dev/jay/1.png"],
}
OTHER = {
    "a class of one split only": ["train/owl/1.png"],
    "splits in the names of files": ["owl/train_1.png", "jay/test_1.png", "owl/test_2.png", "jay/train_2.png"],
    "splits in the names of folders": ["my train/owl/1.png", "my train/jay/1.png", "my test/owl/1.png"],
    "deeper folders": ["train/birds/owl/1.png", "train/birds/jay/1.png", "test/birds/jay/1.png"],
}


@pytest.mark.parametrize("case", [*KNOWN, *OTHER])
def test_rows_are_those_of_datasets(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_of(tmp_path / "birds", (KNOWN | OTHER)[case])
    found = load_splits(source)
    assert (tmp_path / "cache").exists() == (case in OTHER), "datasets is asked where the layout is another"
    expected = load_dataset("imagefolder", data_dir=source)
    assert found.keys() == expected.keys()
    for split, rows in expected.items():
        assert found[split].features == rows.features
        if "label" in rows.features:
            assert listed(found[split]) == listed(rows)
            assert [row["label"] for row in load_splits(source, streaming=True)[split]] == rows["label"][:]
    monkeypatch.chdir(tmp_path)
    assert {split: rows.num_rows for split, rows in load_splits("birds").items()} == expected.num_rows


@pytest.mark.parametrize("other", ["metadata.csv", "train/metadata.jsonl", "train/owl/more.zip", "train/owl/notes.txt"])
def test_what_is_no_image_is_left_to_datasets(other: str, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "birds", KNOWN["splits"])
    (tmp_path / "birds" / other).touch()
    with pytest.raises(OtherLayoutError):
        read_image_folder(source)
