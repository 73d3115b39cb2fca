"""Pushing an adapter to the Hub: one commit, with a card, and without paths of the local machine."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi

from cl_prompts.methods import PromptPoolConfig
from cl_prompts.sharing.base_files import base_file_names
from cl_prompts.sharing.base_models import BASE_FOLDER, load_base
from cl_prompts.sharing.card import CARD_FILE, PICTURES, hub_base, known_run, write_card
from cl_prompts.sharing.image_processor import PROCESSOR_FILE
from cl_prompts.sharing.run_record import RESULTS_FILE
from cl_prompts.storage.adapter_files import AdapterFiles, find_adapter
from cl_prompts.storage.bounded_read import MAX_CONFIG_BYTES, read_json_object
from cl_prompts.storage.declared import CONFIG_FILE, WEIGHTS_FILE
from cl_prompts.storage.file_source import FileSource
from cl_prompts.storage.hub_errors import HubError, explain_hub_errors


FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, PROCESSOR_FILE)
# Files of an earlier push that are deleted unless this push replaces them.
STALE = [RESULTS_FILE, PROCESSOR_FILE, PICTURES, f"{BASE_FOLDER}/*"]


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    base_model_id: str | None = None,
    include_base: bool = False,
    license: str | None = None,
) -> CommitInfo:
    """Push the adapter in a local folder, in one commit: all files arrive, or none.

    Args:
        folder: written by `save_pretrained`. Its card, image processor, `results.json` and pictures go along.
        repo_id: "name/pool"; made if it does not exist.
        private: whether a repository that is made is private.
        revision: branch; made if it does not exist.
        commit_message: default "Upload adapter".
        create_pr: open a pull request against the main branch instead of committing; not with `revision`.
        token: of the Hub; None: the one of `hf auth login`.
        base_model_id: Hub id of the base model, for an adapter whose base is a local folder.
        include_base: push the base model along, into the folder `base/`.
        license: identifier of the Hub, like "apache-2.0".

    Raises:
        ValueError: there is no adapter, its base is only on this machine, a file names a folder of this machine, or both
            `create_pr` and `revision` were given.
        HubError: the Hub cannot be reached or refuses, or the repository holds something else; no file there was changed.
    """
    if create_pr and revision is not None:
        raise ValueError(f"create_pr opens a pull request against main, not against {revision!r}: leave one of the two out")
    files = find_adapter(Path(folder))
    base = _base_to_name(files, base_model_id, include_base)
    with tempfile.TemporaryDirectory(prefix="cl_prompts-push-") as room:
        stage = Path(room, "adapter")
        stage.mkdir()
        _stage(files, stage, base)
        if include_base and not (stage / BASE_FOLDER).exists():
            load_base(PromptPoolConfig.from_pretrained(files), files).save_pretrained(stage / BASE_FOLDER)
        write_card(stage, name=repo_id, license=license)
        _refuse_places(stage)
        return _upload(stage, repo_id, private, revision, commit_message or "Upload adapter", create_pr, token)


def _base_to_name(files: AdapterFiles, base_model_id: str | None, include_base: bool) -> str | None:
    if base_model_id and include_base:
        raise ValueError("base_model_id and include_base exclude each other: name the base, or push it along")
    if include_base or (base_model_id is None and (files.folder / BASE_FOLDER).is_dir()):
        return None
    config = PromptPoolConfig.from_pretrained(files)
    if base_model_id is not None:
        config.base_model_name_or_path = base_model_id
    base = hub_base(config)
    if base is None:
        raise ValueError(
            f"the adapter's base, {config.base_model_name_or_path!r}, cannot be loaded by others: give its Hub id "
            "(base_model_id=, --base-model-id) or push it along (include_base=True, --include-base)"
        )
    return base


def _stage(files: AdapterFiles, stage: Path, base: str | None) -> None:
    folder = files.folder
    paths = [folder / name for name in FILES]
    if known_run(files) is not None:  # results and pictures of other weights are not pushed
        paths += [folder / RESULTS_FILE, *folder.glob(PICTURES)]
    for path in paths:
        if path.is_file():
            shutil.copy2(path, stage / path.name)
    if files.were_replaced():
        raise ValueError(f"{folder} was saved while it was copied: push it again")
    if base is None and (folder / BASE_FOLDER).is_dir():
        (stage / BASE_FOLDER).mkdir()
        place = FileSource(str(folder / BASE_FOLDER), folder / BASE_FOLDER)
        for name in base_file_names(place):
            shutil.copy2(folder / BASE_FOLDER / name, stage / BASE_FOLDER / name)
    content = read_json_object(stage / CONFIG_FILE, MAX_CONFIG_BYTES)
    if content.get("base_model_name_or_path") != base:
        content |= {"base_model_name_or_path": base, "revision": None}
    (stage / CONFIG_FILE).write_text(json.dumps(content, indent=2, sort_keys=True))


def _refuse_places(stage: Path) -> None:
    """Raise ValueError if a text file names a folder below the user's home."""
    home = str(Path.home())
    for file in stage.rglob("*"):
        if file.suffix in (".md", ".json") and len(home) > 1 and f"{home}{os.sep}" in file.read_text(errors="replace"):
            raise ValueError(f"{file.name} names a folder below {home}: take it out, it would be published")


def _upload(
    stage: Path,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    message: str,
    create_pr: bool,
    token: str | bool | None,
) -> CommitInfo:
    api = HfApi(token=token, library_name="cl_prompts")
    with explain_hub_errors(repo_id, revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        there = set(api.list_repo_files(repo_id)) - {".gitattributes", CARD_FILE}
        if there and CONFIG_FILE not in there:
            raise HubError(f"{repo_id} holds something else ({sorted(there)[0]}, ...): choose another name")
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        uploaded: Any = api.upload_folder(
            repo_id=repo_id,
            folder_path=stage,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=STALE,
        )
    found: CommitInfo = uploaded
    return found
