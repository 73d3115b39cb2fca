"""Push and pull: the real client against the Hub on loopback, every method, another process."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from support.closed_form_models import answers, learn_task, new_model
from support.families import build
from support.hub_pools import shaken, small
from support.hub_server import Hub
from support.methods import EVERYWHERE, METHODS, WITH_CLASSIFIER
from support.processes import in_a_new_process
from transformers import ViTImageProcessorPil

from cl_prompts import AutoPromptPoolModel, L2PConfig, PromptPoolModel
from cl_prompts.continual import AccuracyMatrix
from cl_prompts.sharing.run_record import RunRecord
from cl_prompts.storage.hub_errors import HubError


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASKS = [[4, 2], [0], [5], [3], [1]]
EVERY = {**METHODS, **WITH_CLASSIFIER}
SOME = (*EVERYWHERE, "hash discriminant", "l2p analytic")


def repo_of(method: str, tasks: int) -> str:
    return f"me/{method.replace(' ', '-')}-{tasks}"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model in a folder, as it would lie in a clone, and its image processor."""
    folder = tmp_path_factory.mktemp("bases") / "vit"
    build("vit").save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return {"vit": folder}


@pytest.fixture
def vit_on_the_hub(hub: Hub, bases: dict[str, Path]) -> str:
    api = HfApi()
    api.create_repo("me/vit")
    api.upload_folder(repo_id="me/vit", folder_path=bases["vit"])
    return "me/vit"


# ---- every method, another process -----------------------------------------------------------------------------------


def pull(repos: Sequence[str], answered: Path) -> None:
    base = build("vit")
    save_file({repo: answers(PromptPoolModel.from_pretrained(base, repo)) for repo in repos}, answered)


@pytest.mark.parametrize("methods", [SOME, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["some", "every"])
def test_a_method_comes_back_bit_equal_in_another_process(methods: Sequence[str], hub: Hub, tmp_path: Path) -> None:
    expected = {}
    for method in methods:
        model = new_model(method)
        for number, classes in enumerate(TASKS, start=1):
            learn_task(model, classes, train=method in WITH_CLASSIFIER)
            shaken(model)
            if number in (1, 5):
                model.push_to_hub(repo_of(method, number), base_model_id="me/vit")
                expected[repo_of(method, number)] = answers(model)
    assert len(expected) == 2 * len(methods)
    in_a_new_process(pull, list(expected), tmp_path / "logits")
    found = load_file(tmp_path / "logits")
    for repo, logits in expected.items():
        assert torch.equal(found[repo], logits), repo
        assert logits.isfinite().all(), repo
    for repo in expected:
        files = hub.repos[repo].files("main")
        tensors = sum(t.numel() * t.element_size() for t in load_bytes(files[WEIGHTS], tmp_path).values())
        assert len(files[CONFIG]) + len(files[WEIGHTS]) <= 1.02 * tensors + 64 * 1024, repo


def load_bytes(content: bytes, room: Path) -> dict[str, torch.Tensor]:
    (room / "weights").write_bytes(content)
    return load_file(room / "weights")


# ---- what is pushed --------------------------------------------------------------------------------------------------


def record(**more: Any) -> RunRecord:
    matrix = AccuracyMatrix()
    matrix.add([90.0], [50])
    return RunRecord({"l2p": matrix}, data="birds", command="python train.py --dataset /home/me/birds", **more)


def test_what_lies_on_the_hub(hub: Hub, bases: dict[str, Path], tmp_path: Path) -> None:
    """One commit with the whole layout; nothing names a folder of this machine."""
    base = type(build("vit")).from_pretrained(bases["vit"], add_pooling_layer=True)
    picture = tmp_path / "selection.png"
    Image.new("RGB", (4, 4)).save(picture)
    processor = ViTImageProcessorPil.from_pretrained(bases["vit"])
    small(base).push_to_hub(
        "me/birds",
        base_model_id="google/vit-tiny",
        license="cc-by-4.0",
        private=True,
        commit_message="Birds",
        record=record(datasets=["me/birds-data"], settings={"output": str(tmp_path), "lr": 0.1}),
        pictures=[picture],
        image_processor=processor,
    )
    repo = hub.repos["me/birds"]
    files = repo.files("main")
    assert set(files) == {".gitattributes", CONFIG, WEIGHTS, "README.md", "preprocessor_config.json", "results.json",
                          "selection.png", "curves.png", "matrix.png"}  # fmt: skip
    assert repo.private
    assert sum(path.startswith("/api/models/me/birds/commit/") for _, path in hub.log) == 1
    for name, content in files.items():
        for place in (str(tmp_path), str(bases["vit"]), str(Path.home()) + "/", "/home/me"):
            assert place.encode() not in content, name
    assert json.loads(files[CONFIG])["base_model_name_or_path"] == "google/vit-tiny"
    card = ModelCard(files["README.md"].decode())
    data = card.data.to_dict()
    assert data["library_name"] == "cl_prompts", "the Hub's code for peft does not import this library"
    assert (data["base_model"], data["base_model_relation"]) == ("google/vit-tiny", "adapter")
    assert data["pipeline_tag"] == "image-classification"
    assert data["license"] == "cc-by-4.0"
    assert data["datasets"] == ["me/birds-data"]
    assert {"cl_prompts", "continual-learning", "peft", "l2p", "base_model:adapter:google/vit-tiny"} <= set(data["tags"])
    assert [r.metric_value for r in card.data.eval_results] == [90.0, 90.0, 0.0]
    for said in (
        "**License**: cc-by-4.0",
        "cat, dog",
        "arxiv.org/abs/2112.08654",
        "python train.py --dataset birds",
        "![selection]",
        "that of this adapter; the data (birds",
        "me/birds",
    ):
        assert said in card.text


def test_a_second_push_leaves_nothing_stale(hub: Hub) -> None:
    """A push without results takes away the results of the one before; what others added stays."""
    small().push_to_hub("me/birds", base_model_id="me/vit", record=record())
    HfApi().upload_file(repo_id="me/birds", path_or_fileobj=b"mine", path_in_repo="notes.txt")
    assert "results.json" in hub.repos["me/birds"].files("main")
    small().push_to_hub("me/birds", base_model_id="me/vit")
    assert set(hub.repos["me/birds"].files("main")) == {".gitattributes", CONFIG, WEIGHTS, "README.md", "notes.txt"}


def test_the_code_on_the_card_runs(
    hub: Hub, vit_on_the_hub: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model = small()
    model.push_to_hub(
        "me/birds", base_model_id="me/vit", image_processor=ViTImageProcessorPil.from_pretrained(bases["vit"])
    )
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), (200, 30, 30)).save("image.jpg")
    blocks = re.findall(r"```python\n(.*?)```", hub.repos["me/birds"].files("main")["README.md"].decode(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        scope: dict[str, Any] = {}
        exec(block, scope)
        assert "cl_prompts" in block
    said = capsys.readouterr().out
    assert "'label': 'cat'" in said
    assert "'label': 'dog'" in said
    assert "[3, 1]" in said
    assert torch.equal(answers(scope["model"]), answers(model))


def test_a_local_base_is_named_or_pushed_along(hub: Hub, bases: dict[str, Path], tmp_path: Path) -> None:
    base = type(build("vit")).from_pretrained(bases["vit"])
    model = small(base)
    expected = answers(model)
    with pytest.raises(ValueError, match=r"base, '.*vit', cannot be loaded by others: .*base_model_id=.*include_base=True"):
        model.push_to_hub("me/birds")
    with pytest.raises(ValueError, match="exclude each other"):
        model.push_to_hub("me/birds", base_model_id="me/vit", include_base=True)
    assert not hub.repos
    model.push_to_hub("me/birds", include_base=True)
    assert {"base/config.json", "base/model.safetensors"} < set(hub.repos["me/birds"].files("main"))
    again = AutoPromptPoolModel.from_pretrained("me/birds", strict_base=True)
    assert torch.equal(answers(again), expected)
    model.push_to_hub("me/birds", base_model_id="me/vit")
    assert not any(name.startswith("base/") for name in hub.repos["me/birds"].files("main"))
    with pytest.raises(ValueError, match="'/nowhere'"):
        model.push_to_hub("me/birds", base_model_id="/nowhere")


def test_branches_and_pull_requests(hub: Hub) -> None:
    model = small()
    model.push_to_hub("me/birds", base_model_id="me/vit")
    first = answers(model)
    shaken(model.base_model.adapter.requires_grad_(True))
    model.push_to_hub("me/birds", base_model_id="me/vit", revision="shaken")
    branches = [branch.name for branch in HfApi().list_repo_refs("me/birds").branches]
    with pytest.raises(ValueError, match="create_pr opens a pull request against main, not against 'v2'"):
        model.push_to_hub("me/birds", base_model_id="me/vit", create_pr=True, revision="v2")
    assert [branch.name for branch in HfApi().list_repo_refs("me/birds").branches] == branches
    request = model.push_to_hub("me/birds", base_model_id="me/vit", create_pr=True)
    second = answers(model)
    assert not torch.equal(first, second)
    pulled = {
        revision: answers(PromptPoolModel.from_pretrained(build("vit"), "me/birds", revision=revision))
        for revision in (None, "main", "shaken", "refs/pr/1", request.oid)
    }
    assert [torch.equal(found, first) for found in pulled.values()] == [True, True, False, False, False]
    assert all(torch.equal(pulled[revision], second) for revision in ("shaken", "refs/pr/1", request.oid))
    with pytest.raises(HubError, match="me/birds has no revision 'none'"):
        PromptPoolModel.from_pretrained(build("vit"), "me/birds", revision="none")


def test_an_adapter_of_another_name_is_pushed_as_the_repositorys_own(hub: Hub) -> None:
    model = small()
    model.add_adapter("other", L2PConfig(pool_size=3, top_k=1))
    model.set_adapter("other")
    model.begin_task([8])
    model.end_task()
    model.push_to_hub("me/other", base_model_id="me/vit")
    with pytest.raises(
        ValueError, match=r"record= is of the active adapter, \['other'\]; saved are \['default'\]: call set_"
    ):
        model.push_to_hub("me/default", base_model_id="me/vit", adapter_name="default", record=record())
    model.push_to_hub("me/default", base_model_id="me/vit", adapter_name="default")
    assert PromptPoolModel.from_pretrained(build("vit"), "me/other").classes == [8]
    assert PromptPoolModel.from_pretrained(build("vit"), "me/default").classes == [3, 1]


def test_peft_pulls_it_too_and_a_downloaded_folder_loads(hub: Hub, tmp_path: Path) -> None:
    model = small()
    model.push_to_hub("me/birds", base_model_id="me/vit")
    snapshot_download("me/birds", local_dir=tmp_path / "birds")  # hf download
    assert torch.equal(answers(PromptPoolModel.from_pretrained(build("vit"), tmp_path / "birds")), answers(model))
    assert torch.equal(answers(PeftModel.from_pretrained(build("vit"), "me/birds")), answers(model))


# ---- what is pulled --------------------------------------------------------------------------------------------------


def test_both_files_are_of_one_commit(hub: Hub) -> None:
    commit = small().push_to_hub("me/birds", base_model_id="me/vit").oid
    hub.log.clear()
    PromptPoolModel.from_pretrained(build("vit"), "me/birds")
    got = [path for method, path in hub.log if method == "GET"]
    assert got == [f"/me/birds/resolve/{commit}/{name}" for name in (CONFIG, WEIGHTS)] or got == [
        f"/me/birds/resolve/main/{CONFIG}",
        f"/me/birds/resolve/{commit}/{WEIGHTS}",
    ]


def test_the_cache_answers_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    model.push_to_hub("me/birds", base_model_id="me/vit")
    PromptPoolModel.from_pretrained(build("vit"), "me/birds")
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(answers(PromptPoolModel.from_pretrained(build("vit"), "me/birds")), answers(model))
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set and me/other is not in the cache: unset it, or name"):
        PromptPoolModel.from_pretrained(build("vit"), "me/other")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        model.push_to_hub("me/other", base_model_id="me/vit")
    assert not hub.log


def test_a_pickle_is_not_even_fetched(hub: Hub, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "pool")
    torch.save(load_file(tmp_path / "pool" / WEIGHTS), tmp_path / "pool" / "adapter_model.bin")
    (tmp_path / "pool" / WEIGHTS).unlink()
    HfApi().create_repo("me/pickle")
    HfApi().upload_folder(repo_id="me/pickle", folder_path=tmp_path / "pool", ignore_patterns=["README.md"])
    for kind in (PromptPoolModel, PeftModel):
        with pytest.raises(ValueError, match=r"no adapter_model.safetensors in me/pickle on the Hub .a pickle is never"):
            kind.from_pretrained(build("vit"), "me/pickle")
    assert not any("adapter_model.bin" in path and "resolve" in path for _, path in hub.log)


def test_a_large_adapter_is_refused_before_it_is_fetched(hub: Hub) -> None:
    small().push_to_hub("me/birds", base_model_id="me/vit")
    hub.log.clear()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors has [\d,]+ bytes, more than the limit of 100: raise"):
        PromptPoolModel.from_pretrained(build("vit"), "me/birds", max_adapter_bytes=100)
    assert not any(method == "GET" and WEIGHTS in path for method, path in hub.log)


def test_names_that_are_none(hub: Hub) -> None:
    HfApi().create_repo("me/empty")
    with pytest.raises(ValueError, match=r"'a/b/c' is neither a folder nor a Hub id like 'name/pool'"):
        PromptPoolModel.from_pretrained(build("vit"), "a/b/c")
    with pytest.raises(ValueError, match=r"./nowhere does not exist: name a folder written by `save_pretrained`, or a Hub"):
        PromptPoolModel.from_pretrained(build("vit"), "./nowhere")
    with pytest.raises(ValueError, match=r"subfolder='../x' leaves the repository"):
        PromptPoolModel.from_pretrained(build("vit"), "me/birds", subfolder="../x")
    with pytest.raises(HubError, match=r"there is no me/nothing for you: check the name; if it is private, run `hf auth"):
        PromptPoolModel.from_pretrained(build("vit"), "me/nothing")
    with pytest.raises(ValueError, match=r"no adapter_config.json in me/empty on the Hub: is it an adapter of cl_prompts?"):
        PromptPoolModel.from_pretrained(build("vit"), "me/empty")
    with pytest.raises(TypeError, match=r"call AutoPromptPoolModel.from_pretrained"):
        AutoPromptPoolModel()
