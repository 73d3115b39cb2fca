"""Pushes and pulls that are refused or interrupted: nothing is half there, nothing is lost."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from support.closed_form_models import answers
from support.families import build
from support.hub_pools import small
from support.hub_server import Hub

from cl_prompts import PromptPoolModel
from cl_prompts.sharing.push import push_folder
from cl_prompts.storage.hub_errors import HubError


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def saved(hub: Hub, tmp_path: Path) -> Iterator[Path]:
    """An adapter in a folder, which stays as it is whatever happens to its pushes."""
    folder = tmp_path / "pool"
    small().save_pretrained(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    yield folder
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def no_wait(seconds: float) -> None:
    """In place of the client's pauses before it tries again, half a minute in all."""


def push(folder: Path, repo: str = "me/birds", **more: Any) -> Any:
    return push_folder(folder, repo, base_model_id="me/vit", **more)


def test_who_may_push_what(hub: Hub, saved: Path) -> None:
    with pytest.raises(HubError, match=r"the token may not do that with stranger/birds: use one with write permission"):
        push(saved, "stranger/birds")
    with pytest.raises(HubError, match="the token may not do that with me/birds"):
        push(saved, token=hub.read_token)
    with pytest.raises(HubError, match=r"the Hub does not know this token: run `hf auth login`, or pass token="):
        push(saved, token="hf_unknown")
    with pytest.raises(HubError, match=r"token.*run `hf auth login`, or pass token="):
        push(saved, token=False)
    assert not hub.repos
    push(saved, private=True)
    with pytest.raises(HubError, match="there is no me/birds for you: check the name; if it is private, run"):
        PromptPoolModel.from_pretrained(build("vit"), "me/birds", token=hub.stranger_token)


def test_a_name_that_is_taken(hub: Hub, saved: Path, tmp_path: Path) -> None:
    HfApi().create_repo("me/vit")
    build("vit").save_pretrained(tmp_path / "vit")
    HfApi().upload_folder(repo_id="me/vit", folder_path=tmp_path / "vit")
    before = hub.repos["me/vit"].files("main")
    with pytest.raises(HubError, match=r"me/vit holds something else \(config.json, ...\): choose another name"):
        push(saved, "me/vit")
    assert hub.repos["me/vit"].files("main") == before


def test_a_hub_that_is_down(hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", no_wait)
    hub.fail("/api/repos/create", status=503, times=None)
    with pytest.raises(HubError, match=r"the Hub is busy or down \(status 503\), nothing was changed: try again later"):
        push(saved)


@pytest.mark.parametrize("large", [False, True])
def test_an_interrupted_push_changes_nothing(hub: Hub, saved: Path, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", no_wait)
    push(saved)
    commit, before = hub.repos["me/birds"].refs["main"], hub.repos["me/birds"].files("main")
    monkeypatch.setattr(hub.store, "lfs_threshold", 0 if large else 10**9)
    hub.cut("PUT .*" if large else "POST .*/commit/", after_bytes=100, times=None)
    with pytest.raises(HubError, match=r"cannot reach http://127.0.0.1:\d+, nothing was changed: check the network, then"):
        push(saved, license="mit")
    assert hub.repos["me/birds"].files("main") == before
    assert hub.repos["me/birds"].refs["main"] == commit
    hub.faults.waiting.clear()
    push(saved, license="mit")
    assert hub.repos["me/birds"].refs["main"] != commit
    assert torch.equal(answers(PromptPoolModel.from_pretrained(build("vit"), "me/birds")), answers(small()))


def test_an_interrupted_pull_leaves_a_cache_that_works(hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", no_wait)
    push(saved)
    hub.cut(f"GET .*{WEIGHTS}", after_bytes=1000, times=None)
    base = build("vit")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(HubError, match=r"cannot reach http://127.0.0.1:\d+"):
        PromptPoolModel.from_pretrained(base, "me/birds")
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    hub.faults.waiting.clear()
    assert torch.equal(answers(PromptPoolModel.from_pretrained(base, "me/birds")), answers(small()))


def test_files_that_were_changed_on_the_way_are_refused(hub: Hub, saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    push(saved)
    other = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    room = saved.parent / "other"
    room.mkdir()
    save_file(other, room / WEIGHTS)
    HfApi().upload_file(repo_id="me/birds", path_or_fileobj=room / WEIGHTS, path_in_repo=WEIGHTS)
    with pytest.raises(ValueError, match=r"the checksum of adapter_model.safetensors does not match"):
        PromptPoolModel.from_pretrained(build("vit"), "me/birds")


def test_a_card_that_names_a_home_folder_is_not_pushed(hub: Hub, saved: Path) -> None:
    folder = saved.parent / "copy"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with (folder / "README.md").open("a") as card:
        card.write(f"\nMy images are in {Path.home()}{os.sep}birds.\n")
    with pytest.raises(ValueError, match=r"README.md names a folder below .*: take it out, it would be published"):
        push(folder)
    assert not hub.repos
