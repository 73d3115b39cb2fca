"""An adapter's files are found and read once per load, and handed down: pipeline -> auto -> model -> tuner."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from support.families import build
from support.file_opens import counted_opens
from support.hub_pools import small
from support.hub_server import Hub
from transformers import ViTImageProcessorPil, ViTModel

from cl_prompts import AutoPromptPoolModel, L2PConfig, PromptPoolConfig, PromptPoolModel, PromptPoolPipeline
from cl_prompts.sharing.inspect import describe_adapter
from cl_prompts.storage.adapter_files import find_adapter
from cl_prompts.storage.declared import CONFIG_FILE, WEIGHTS_FILE


PROCESSOR = "preprocessor_config.json"
# The weights are opened for the length of their header, for the header by safetensors, and for the tensors by PEFT, which
# takes a folder and neither tensors nor an open file.
HEADER, TENSORS = 2, 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model's folder, and that of an adapter on it with an image processor."""
    base, adapter = (tmp_path_factory.mktemp(name) for name in ("base", "adapter"))
    build("vit").save_pretrained(base)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    small(ViTModel.from_pretrained(base)).save_pretrained(adapter, image_processor=processor)
    return base, adapter


def as_second(folder: Path | str) -> PromptPoolModel:
    """An adapter that is added to a model."""
    model = PromptPoolModel(build("vit"), L2PConfig(pool_size=2, top_k=1))
    model.load_adapter(folder, "second")
    return model


LOADS: dict[str, tuple[Callable[[Path | str], object], int]] = {
    "config": (PromptPoolConfig.from_pretrained, HEADER),
    "inspect": (describe_adapter, HEADER),
    "model": (lambda source: PromptPoolModel.from_pretrained(build("vit"), source), HEADER + TENSORS),
    "auto": (AutoPromptPoolModel.from_pretrained, HEADER + TENSORS),
    "load_adapter": (as_second, HEADER + TENSORS),
    "pipeline": (PromptPoolPipeline.from_pretrained, HEADER + TENSORS),
    "pipeline on a base": (lambda source: PromptPoolPipeline.from_pretrained(source, base=build("vit")), HEADER + TENSORS),
}


@pytest.mark.parametrize("load", LOADS)
def test_each_local_file_is_opened_once(load: str, folders: tuple[Path, Path]) -> None:
    act, weights = LOADS[load]
    with counted_opens(folders[1]) as opened:
        act(folders[1])
    del opened[PROCESSOR]  # by transformers, several times
    assert opened == {CONFIG_FILE: 1, WEIGHTS_FILE: weights}


@pytest.mark.parametrize("load", LOADS)
def test_each_file_on_the_hub_is_asked_for_once(load: str, hub: Hub, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A download takes a question about the size, one of the client's own, and the content."""
    pool = tmp_path / "pool"
    shutil.copytree(folders[1], pool)
    config = json.loads((pool / CONFIG_FILE).read_text()) | {"base_model_name_or_path": "me/vit"}
    (pool / CONFIG_FILE).write_text(json.dumps(config))
    api = HfApi()
    for repo, folder in (("me/vit", folders[0]), ("me/pool", pool)):
        api.create_repo(repo)
        api.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns="README.md")
    hub.log.clear()
    LOADS[load][0]("me/pool")
    asked = Counter((method, path.rpartition("/")[2]) for method, path in hub.log if "me/pool/" in path)
    names = [CONFIG_FILE, WEIGHTS_FILE, *([PROCESSOR] if "pipeline" in load else [])]
    expected = Counter({("HEAD", name): 2 for name in names}) + Counter(("GET", name) for name in names)
    if load == "inspect":  # looks for figures, and learns that there are none
        expected["HEAD", "results.json"] += 1
    assert asked == expected


def test_files_that_were_found_are_not_changed_by_a_load(folders: tuple[Path, Path]) -> None:
    """They are handed to several loads."""
    files = find_adapter(folders[1])
    for _ in range(2):
        model = PromptPoolModel.from_pretrained(build("vit"), files, is_trainable=True)
        assert model.classes == [3, 1]
        model.begin_task([7, 8])
    assert files.config["state"]["tasks"] == [[3, 1]]
