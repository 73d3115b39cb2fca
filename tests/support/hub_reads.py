"""What the test Hub answers to who looks: accounts, model cards, lists of files, and the files."""

import re
from typing import Any
from urllib.parse import parse_qs

import yaml

from support.hub_routing import Answer, Request, Routes
from support.hub_storage import Commit, Refusal, StoredFile


DATE = "%Y-%m-%dT%H:%M:%S.000Z"

routes = Routes()


@routes.on("GET", "/api/whoami-v2")
def whoami(request: Request) -> Answer:
    if request.caller.name is None:
        raise Refusal(401, "Invalid username or password.")
    role = "write" if request.caller.may_write else "read"
    token = {"type": "access_token", "accessToken": {"displayName": role, "role": role}}
    return Answer({"type": "user", "name": request.caller.name, "fullname": request.caller.name, "orgs": [], "auth": token})


def base_models(metadata: dict[str, Any]) -> list[str]:
    named = metadata.get("base_model") or []
    return [named] if isinstance(named, str) else named


def metadata_of(card: str) -> tuple[dict[str, Any], list[str]]:
    """The YAML at the head of a model card, and what the Hub has against it."""
    head = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", card, re.DOTALL)
    try:
        metadata = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError as error:
        return {}, [str(error)]
    if not isinstance(metadata, dict):
        return {}, ["metadata must be an object"]
    wrong = [name for name in base_models(metadata) if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name))]
    return metadata, [f'"base_model" with value "{name}" is not valid. Use a model id.' for name in wrong]


@routes.on("POST", "/api/validate-yaml")
def validate_yaml(request: Request) -> Answer:
    metadata, errors = metadata_of(request.json()["content"])
    warnings = ["empty or missing yaml metadata in repo card"] if not metadata and not errors else []
    found = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return Answer(found, 400 if errors else 200)


@routes.on("GET", "/api/models/{repo}/revision/{revision}")
@routes.on("GET", "/api/models/{repo}")
def model_info(request: Request, repo: str, revision: str = "main") -> Answer:
    kept = request.readable(repo)
    commit = kept.at(revision)
    card = commit.files.get("README.md")
    metadata = metadata_of(card.content.decode())[0] if card else {}
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
    if "blobs" in request.query:
        for sibling in siblings:
            file = commit.files[sibling["rfilename"]]
            sibling |= {"blobId": file.blob_id, "size": len(file.content)}
            sibling |= {"lfs": large_file(file) | {"sha256": file.oid}} if file.lfs else {}
    info = {
        "id": repo,
        "modelId": repo,
        "author": kept.owner,
        "sha": commit.id,
        "lastModified": commit.date.strftime(DATE),
        "createdAt": commit.history()[-1].date.strftime(DATE),
        "private": kept.private,
        "gated": kept.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [*metadata.get("tags", []), *(f"base_model:{name}" for name in base_models(metadata))],
        "pipeline_tag": metadata.get("pipeline_tag"),
        "library_name": metadata.get("library_name"),
        "cardData": metadata,
        "siblings": siblings,
    }
    return Answer({name: value for name, value in info.items() if value is not None})


def large_file(file: StoredFile) -> dict[str, Any]:
    return {"oid": file.oid, "size": len(file.content), "pointerSize": len(file.pointer)}


def tree_entry(path: str, file: StoredFile) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "oid": file.blob_id, "size": len(file.content)}
    return entry | ({"lfs": large_file(file)} if file.lfs else {})


@routes.on("GET", "/api/models/{repo}/tree/{revision}/{path}")
@routes.on("GET", "/api/models/{repo}/tree/{revision}")
def tree(request: Request, repo: str, revision: str, path: str = "") -> Answer:
    """Files and folders below a path; without `recursive`, those directly in it."""
    files = request.readable(repo).at(revision).files
    prefix = f"{path}/" if path else ""
    inside = {name: file for name, file in sorted(files.items()) if name.startswith(prefix)}
    if path and not inside:
        raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
    folders = {name[:slash] for name in inside for slash in range(len(prefix), len(name)) if name[slash] == "/"}
    entries = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
    entries += [tree_entry(name, file) for name, file in inside.items()]
    if request.query.get("recursive", "false").lower() != "true":
        entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
    return Answer(entries)


@routes.on("POST", "/api/models/{repo}/paths-info/{revision}")
def paths_info(request: Request, repo: str, revision: str) -> Answer:
    files = request.readable(repo).at(revision).files
    paths = parse_qs(request.body.decode()).get("paths", [])
    return Answer([tree_entry(path, files[path]) for path in paths if path in files])


@routes.on("GET", "/api/models/{repo}/refs")
def refs(request: Request, repo: str) -> Answer:
    found: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for name, commit in request.readable(repo).refs.items():
        proposed = name.startswith("refs/pr/")
        ref = {"name": name, "ref": name if proposed else f"refs/heads/{name}", "targetCommit": commit.id}
        found["pullRequests" if proposed else "branches"].append(ref)
    return Answer(found)


@routes.on("GET", "/api/models/{repo}/commits/{revision}")
def commits(request: Request, repo: str, revision: str) -> Answer:
    def described(commit: Commit) -> dict[str, Any]:
        about = {"title": commit.title, "message": commit.description, "date": commit.date.strftime(DATE)}
        return {"id": commit.id, "authors": [{"user": repo.split("/")[0]}]} | about

    return Answer([described(commit) for commit in request.readable(repo).at(revision).history()])


@routes.on("GET", "/{repo}/resolve/{revision}/{path}")
def resolve(request: Request, repo: str, revision: str, path: str) -> Answer:
    """A file's content, or the range of it that is asked for."""
    kept = request.readable(repo)
    if kept.gated and kept.owner != request.caller.name:
        status = 401 if request.caller.name is None else 403
        raise Refusal(status, f"Access to model {repo} is restricted. You must be in the authorized list.", "GatedRepo")
    commit = kept.at(revision)
    headers = {"X-Repo-Commit": commit.id}
    file = commit.files.get(path)
    if file is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", headers)
    size = len(file.content)
    headers |= {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
    headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": f'"{file.oid}"'} if file.lfs else {}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if asked is None:
        return Answer(file.content, headers=headers)
    first = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
    last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
    if first > last:
        raise Refusal(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    return Answer(file.content[first : last + 1], 206, headers)
