"""The test Hub against the real client: what is pushed comes back, and its errors are the client's own."""

import os
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from peft import AutoPeftModel, LoraConfig, get_peft_model
from support.families import build, inputs
from support.hub_server import Hub
from transformers import AutoImageProcessor, AutoModel, ViTImageProcessorPil


WEIGHTS = bytes(range(256)) * 8
CARD = "---\nlicense: mit\nbase_model: me/vit\ntags: [vit]\n---\nA pool.\n"


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pool"
    (folder / "plots").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text("{}")
    (folder / "weights.safetensors").write_bytes(WEIGHTS)
    (folder / "plots" / "matrix.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture
def pushed(api: HfApi, folder: Path) -> str:
    """The id of a repository with the folder in it."""
    api.create_repo("me/pool")
    api.upload_folder(repo_id="me/pool", folder_path=folder)
    return "me/pool"


def add(path: str, content: bytes) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, content)]


def read(path: str, **where: object) -> bytes:
    return Path(hf_hub_download("me/pool", path, **where)).read_bytes()


def test_a_pushed_folder_comes_back_as_it_was(hub: Hub, api: HfApi, folder: Path, pushed: str) -> None:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    stored = hub.repos[pushed].at("main")
    assert {path: content for path, content in hub.repos[pushed].files().items() if path != ".gitattributes"} == files
    assert {path for path, file in stored.files.items() if file.lfs} == {"weights.safetensors", "plots/matrix.png"}
    snapshot = Path(snapshot_download(pushed))
    assert {path: (snapshot / path).read_bytes() for path in files} == files
    assert snapshot.name == stored.id
    assert sorted(api.list_repo_files(pushed)) == sorted(stored.files)
    assert {entry.path for entry in api.list_repo_tree(pushed)} == {path.split("/")[0] for path in stored.files}
    assert [entry.path for entry in api.list_repo_tree(pushed, "plots")] == ["plots/matrix.png"]
    assert [entry.size for entry in api.get_paths_info(pushed, ["weights.safetensors", "none"])] == [len(WEIGHTS)]
    info = api.model_info(pushed, files_metadata=True)
    assert (info.sha, info.private, info.card_data.base_model) == (stored.id, False, "me/vit")
    assert info.tags == ["vit", "base_model:me/vit"]
    sizes = {file.rfilename: (file.size, file.lfs is not None) for file in info.siblings}
    assert sizes["weights.safetensors"] == (len(WEIGHTS), True)
    assert sizes["config.json"] == (2, False)


def test_what_has_not_changed_is_not_sent_again(hub: Hub, api: HfApi, folder: Path, pushed: str) -> None:
    before = hub.repos[pushed].at("main").id
    hub.log.clear()
    assert api.upload_folder(repo_id=pushed, folder_path=folder).oid == before
    assert not [path for method, path in hub.log if method == "PUT" or "/commit/" in path]
    assert read("config.json") == read("config.json") == b"{}"
    assert hub.log.count(("GET", "/me/pool/resolve/main/config.json")) == 1


@pytest.mark.parametrize("size", [100, len(WEIGHTS)])
def test_a_large_file_in_parts(hub: Hub, api: HfApi, size: int) -> None:
    hub.store.part_size, hub.store.lfs_threshold = 1000, 99
    api.create_repo("me/pool")
    api.create_commit("me/pool", add("a.txt", WEIGHTS[:size]), commit_message="parts")
    parts = [path for method, path in hub.log if method == "PUT"]
    assert len(parts) == -(-size // 1000)
    assert all("/part/" in path for path in parts)
    assert read("a.txt") == WEIGHTS[:size]


def test_every_commit_keeps_its_content(api: HfApi, pushed: str) -> None:
    first = api.model_info(pushed).sha
    api.create_branch(pushed, branch="old")
    second = api.create_commit(pushed, add("config.json", b"[2]"), commit_message="second").oid
    assert api.list_repo_commits(pushed)[0].title == "second"
    for revision, content in [(None, b"[2]"), (second, b"[2]"), ("old", b"{}"), (first, b"{}")]:
        assert read("config.json", revision=revision) == content
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(pushed, add("a", b"a"), commit_message="late", parent_commit=first)
    api.delete_file("plots/matrix.png", pushed)
    assert "plots/matrix.png" not in api.list_repo_files(pushed)
    assert "plots/matrix.png" in api.list_repo_files(pushed, revision=first)


def test_a_pull_request_changes_no_branch(hub: Hub, api: HfApi, pushed: str) -> None:
    stranger = HfApi(token=hub.stranger_token)
    before = api.model_info(pushed).sha
    proposed = stranger.create_commit(pushed, add("a.safetensors", b"new"), commit_message="try", create_pr=True)
    assert (proposed.pr_revision, proposed.pr_num) == ("refs/pr/1", 1)
    assert api.model_info(pushed).sha == before
    assert read("a.safetensors", revision="refs/pr/1") == b"new"
    stranger.create_commit(pushed, add("b", b"b"), commit_message="more", revision="refs/pr/1")
    assert read("b", revision="refs/pr/1") == b"b"
    refs = api.list_repo_refs(pushed, include_pull_requests=True)
    assert ([ref.name for ref in refs.branches], [ref.ref for ref in refs.pull_requests]) == (["main"], ["refs/pr/1"])
    with pytest.raises(EntryNotFoundError):
        read("a.safetensors")


def test_a_commit_is_whole_or_not_at_all(hub: Hub, api: HfApi, pushed: str) -> None:
    before = hub.repos[pushed].at("main")
    with pytest.raises(EntryNotFoundError):
        api.create_commit(pushed, [*add("new", b"1"), CommitOperationDelete("none")], commit_message="half")
    assert hub.repos[pushed].at("main") is before


def test_names_that_are_not_there(api: HfApi, pushed: str) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/other")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("gpt2", "config.json")
    for revision in ("v9", "日本\n"):
        with pytest.raises(RevisionNotFoundError):
            read("config.json", revision=revision)
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(pushed, revision="v9")
    with pytest.raises(RevisionNotFoundError):
        api.create_commit(pushed, add("a", b"a"), commit_message="a", revision="v9")
    with pytest.raises(EntryNotFoundError):
        read("other.json")
    assert not api.file_exists(pushed, "other.json")
    assert not api.repo_exists("me/other")


def test_who_may_not(hub: Hub, api: HfApi, pushed: str) -> None:
    assert api.whoami()["name"] == hub.user
    api.create_repo("me/secret", private=True)
    for token, error in [(hub.stranger_token, "404"), (False, "401")]:
        with pytest.raises(RepositoryNotFoundError, match=error):
            api.model_info("me/secret", token=token)
    for token in (hub.read_token, hub.stranger_token):
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            api.create_commit(pushed, add("a", b"a"), commit_message="a", token=token)
        with pytest.raises(HfHubHTTPError, match="403 Forbidden: You don't have the rights"):
            api.create_repo("me/new", token=token)
    for call in (api.model_info, api.create_repo):
        with pytest.raises(HfHubHTTPError, match="401") as refused:
            call(pushed, token="hf_of_nobody")
        assert not isinstance(refused.value, RepositoryNotFoundError)
    with pytest.raises(RepositoryNotFoundError, match="401"):
        api.create_commit(pushed, add("a", b"a"), commit_message="a", token=False)


def test_a_name_that_is_taken(api: HfApi, pushed: str) -> None:
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(pushed)
    assert api.create_repo(pushed, exist_ok=True).repo_id == pushed
    api.create_branch(pushed, branch="v1")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(pushed, branch="v1")
    api.create_branch(pushed, branch="v1", exist_ok=True)
    api.delete_repo(pushed)
    assert not api.repo_exists(pushed)


def test_a_gated_repository(hub: Hub, api: HfApi, pushed: str) -> None:
    api.update_repo_settings(pushed, gated="manual")
    for token in (hub.stranger_token, False):
        with pytest.raises(GatedRepoError):
            read("config.json", token=token)
    assert read("config.json") == b"{}"


@pytest.mark.parametrize(
    ("card", "complaint"), [("base_model: /home/me/vit", "not valid"), ("a: [", "expected"), ("- a", "object")]
)
def test_a_card_the_hub_does_not_take(api: HfApi, pushed: str, card: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)Invalid metadata in README.md.*{complaint}"):
        api.create_commit(pushed, add("README.md", f"---\n{card}\n---\n".encode()), commit_message="card")


def test_a_download_goes_on_where_it_was_cut(hub: Hub, pushed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # bytes; the client keeps whole chunks of what it got
    hub.cut("weights", after_bytes=1500)
    hub.cut("weights", after_bytes=len(WEIGHTS) - 1500)  # enough only for what is missing
    hub.log.clear()
    assert read("weights.safetensors") == WEIGHTS
    assert [method for method, _ in hub.log] == ["HEAD", "GET", "GET"]
    answer = httpx.get(f"{hub.url}/me/pool/resolve/main/weights.safetensors", headers={"Range": "bytes=1500-"})
    assert (answer.status_code, answer.content) == (206, WEIGHTS[1500:])
    assert answer.headers["Content-Range"] == f"bytes 1500-{len(WEIGHTS) - 1}/{len(WEIGHTS)}"
    for asked, status in [("bytes=0-9", 206), ("bytes=-9", 206), ("bytes=9999-", 416)]:
        assert httpx.get(answer.url, headers={"Range": asked}).status_code == status


@pytest.mark.slow
def test_a_service_that_comes_back_is_asked_again(hub: Hub, api: HfApi, pushed: str) -> None:
    hub.fail("preupload", status=503)
    hub.cut("PUT", after_bytes=5)
    api.create_commit(pushed, add("a.safetensors", b"0123456789"), commit_message="again")
    assert hub.repos[pushed].files()["a.safetensors"] == b"0123456789"
    assert len([path for method, path in hub.log if method == "PUT" and path.startswith("/lfs/")]) == 4


def test_a_cut_commit_is_none_and_a_lost_answer_is_one(hub: Hub, api: HfApi, pushed: str) -> None:
    for size, done in [(10, False), (10_000, True)]:
        hub.cut("POST .*/commit/", after_bytes=size)
        with pytest.raises(httpx.TransportError):
            api.create_commit(pushed, add("a", b"a"), commit_message="cut")
        assert ("a" in hub.repos[pushed].files()) == done


def test_a_client_that_goes_away_has_changed_nothing(hub: Hub, pushed: str) -> None:
    before = hub.repos[pushed].at("main")
    lines = b'{"key": "header", "value": {"summary": "half", "description": ""}}\n'
    lines += b'{"key": "file", "value": {"path": "a", "content": "YQ=="}}\n'
    head = f"POST /api/models/{pushed}/commit/main HTTP/1.1\r\nAuthorization: Bearer {hub.token}\r\n"
    host, port = hub.url.removeprefix("http://").split(":")
    size = len(lines)
    sent = [
        (f"Content-Length: {size + 1}\r\n\r\n".encode() + lines, False),
        (f"Transfer-Encoding: chunked\r\n\r\n{size:x}\r\n".encode() + lines + b"\r\n", False),
        (f"Content-Length: {size}\r\n\r\n".encode() + lines, True),
    ]
    for content, whole in sent:
        with socket.create_connection((host, int(port))) as client:
            client.sendall(head.encode() + content)
            client.shutdown(socket.SHUT_WR)
            answered = bool(client.recv(1))
        assert answered == (hub.repos[pushed].at("main") is not before) == whole


def test_an_upload_is_what_was_announced(hub: Hub, pushed: str) -> None:
    oid = hub.repos[pushed].at("main").files["weights.safetensors"].oid
    for name, status in [(oid, 400), ("0" * 64, 403)]:
        assert httpx.put(f"{hub.url}/lfs/{pushed}/{name}", content=b"other").status_code == status


def test_the_cache_serves_a_hub_that_does_not(hub: Hub, pushed: str) -> None:
    with pytest.raises(LocalEntryNotFoundError):
        snapshot_download(pushed, local_files_only=True)
    read("config.json")
    hub.slow("HEAD", seconds=30, times=1)
    assert read("config.json", etag_timeout=0.05) == b"{}"
    hub.fail("HEAD", status=500, times=None)
    assert read("config.json") == read("config.json", local_files_only=True) == b"{}"
    snapshot_download(pushed, allow_patterns="*.json")
    with pytest.raises(IncompleteSnapshotError):
        snapshot_download(pushed, local_files_only=True)


def test_transformers_loads_what_it_pushed(hub: Hub) -> None:
    model = build("vit")
    model.push_to_hub("me/vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).push_to_hub("me/vit")
    pixels = inputs("vit")
    for offline in (False, True):
        hub.log.clear()
        again = AutoModel.from_pretrained("me/vit", local_files_only=offline).eval()
        torch.testing.assert_close(again(**pixels).pooler_output, model(**pixels).pooler_output, rtol=0, atol=0)
        processor = AutoImageProcessor.from_pretrained("me/vit", local_files_only=offline)
        assert dict(processor.size) == {"height": 32, "width": 32}
        assert bool(hub.log) != offline


def test_peft_loads_what_it_pushed(hub: Hub) -> None:
    build("vit").push_to_hub("me/vit")
    base = AutoModel.from_pretrained("me/vit")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.push_to_hub("me/lora", create_pr=True)
    assert "adapter_config.json" not in hub.repos["me/lora"].files()
    model.push_to_hub("me/lora")
    pixels = inputs("vit")
    for revision in ("main", "refs/pr/1"):
        again = AutoPeftModel.from_pretrained("me/lora", revision=revision).eval()
        torch.testing.assert_close(again(**pixels).pooler_output, model(**pixels).pooler_output, rtol=0, atol=0)


def test_the_client_knows_no_other_hub(hub: Hub) -> None:
    assert constants.ENDPOINT == os.environ["HF_ENDPOINT"] == hub.url
    assert Path(constants.HF_HUB_CACHE).parent == Path(os.environ["HF_HOME"])
    assert not constants.is_offline_mode()
    assert httpx.get(f"{hub.url}/api/agent-harnesses").status_code == 404
