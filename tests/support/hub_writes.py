"""What the test Hub answers to who changes something: repositories, branches, uploads of large files, and commits."""

import json
from typing import Any

from support.hub_routing import Answer, Request, Routes
from support.hub_storage import Refusal, Repo


BINARY_ENDINGS = (".bin", ".jpg", ".npy", ".npz", ".parquet", ".pickle", ".pkl", ".png", ".pt", ".safetensors", ".zip")

routes = Routes()


@routes.on("POST", "/api/repos/create")
def create_repo(request: Request) -> Answer:
    wanted, caller = request.json(), request.caller
    namespace = wanted.get("organization") or caller.name
    if caller.name is None:
        raise Refusal(401, "Invalid username or password.")
    if not caller.may_write or namespace != caller.name:
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    if wanted.get("type", "model") != "model":
        raise Refusal(400, f"the test Hub keeps models only, not a {wanted['type']}")
    repo_id = f"{namespace}/{wanted['name']}"
    url = f"{request.store.url}/{repo_id}"
    if repo_id in request.store.repos:
        return Answer({"error": "You already created this model repo", "url": url}, 409)
    request.store.repos[repo_id] = Repo(repo_id, private=wanted.get("visibility") == "private")
    return Answer({"url": url, "name": repo_id, "id": repo_id})


@routes.on("DELETE", "/api/repos/delete")
def delete_repo(request: Request) -> Answer:
    wanted = request.json()
    repo = request.writable(f"{wanted.get('organization') or request.caller.name}/{wanted['name']}")
    del request.store.repos[repo.id]
    return Answer()


@routes.on("PUT", "/api/models/{repo}/settings")
def settings(request: Request, repo: str) -> Answer:
    kept, wanted = request.writable(repo), request.json()
    kept.gated = wanted.get("gated", kept.gated)
    kept.private = wanted.get("visibility", "private" if kept.private else "public") == "private"
    return Answer(wanted)


@routes.on("POST", "/api/models/{repo}/branch/{revision}")
def create_branch(request: Request, repo: str, revision: str) -> Answer:
    kept = request.writable(repo)
    if revision in kept.refs:
        raise Refusal(409, f"Reference already exists: {revision}")
    kept.refs[revision] = kept.at(request.json().get("startingPoint", "main"))
    return Answer()


@routes.on("POST", "/api/models/{repo}/preupload/{revision}")
def preupload(request: Request, repo: str, revision: str) -> Answer:
    """How each file is to come, and which content the repository has already at its path."""
    files = request.writable(repo, None if "create_pr" in request.query else revision).at(revision).files
    modes = []
    for file in request.json()["files"]:
        large = file["size"] > request.store.lfs_threshold or file["path"].endswith(BINARY_ENDINGS)
        known = {"oid": files[file["path"]].oid} if file["path"] in files else {}
        modes.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False} | known)
    return Answer({"files": modes})


@routes.on("POST", "/{repo}.git/info/lfs/objects/batch")
def announce_large_files(request: Request, repo: str) -> Answer:
    """Where large files are to be uploaded; what is here needs no upload. Without `ref`, for a pull request."""
    asked = request.json()
    kept = request.writable(repo, asked["ref"]["name"] if "ref" in asked else None)
    verify = {"href": f"{request.store.url}/{repo}.git/info/lfs/verify"}
    size = request.store.part_size if "multipart" in asked["transfers"] else None
    objects = []
    for wanted in asked["objects"]:
        home = f"{request.store.url}/lfs/{repo}/{wanted['oid']}"
        upload: dict[str, Any] = {"href": home}
        if size is not None:
            parts = {str(part): f"{home}/part/{part}" for part in range(1, 1 + -(-wanted["size"] // size))}
            upload = {"href": f"{home}/complete", "header": {"chunk_size": str(size)} | parts}
        kept.announced[wanted["oid"]] = wanted["size"]
        objects.append(
            wanted if wanted["oid"] in kept.large else wanted | {"actions": {"upload": upload, "verify": verify}}
        )
    return Answer({"transfer": "basic" if size is None else "multipart", "objects": objects})


def announced(request: Request, repo: str, oid: str) -> Repo:
    """The repository of an upload. As with signed links, who knows the link needs no token."""
    kept = request.store.repos.get(repo)
    if kept is None or oid not in kept.announced:
        raise Refusal(403, "AccessDenied: this upload was not announced")
    return kept


@routes.on("PUT", "/lfs/{repo}/{oid}")
def upload(request: Request, repo: str, oid: str) -> Answer:
    announced(request, repo, oid).store_large(oid, request.body)
    return Answer()


@routes.on("PUT", "/lfs/{repo}/{oid}/part/{part}")
def upload_part(request: Request, repo: str, oid: str, part: str) -> Answer:
    announced(request, repo, oid).parts.setdefault(oid, {})[int(part)] = request.body
    return Answer(headers={"ETag": f'"{oid[:8]}-{part}"'})


@routes.on("POST", "/lfs/{repo}/{oid}/complete")
def join_parts(request: Request, repo: str, oid: str) -> Answer:
    kept = announced(request, repo, oid)
    parts = kept.parts.get(oid, {})
    if request.json()["parts"] != [{"partNumber": part, "etag": f'"{oid[:8]}-{part}"'} for part in sorted(parts)]:
        raise Refusal(400, "InvalidPart: the parts named are not the parts uploaded")
    kept.store_large(oid, b"".join(parts[part] for part in sorted(parts)))
    return Answer({"success": True})


@routes.on("POST", "/{repo}.git/info/lfs/verify")
def verify_large_file(request: Request, repo: str) -> Answer:
    wanted = request.json()
    if len(request.readable(repo).large.get(wanted["oid"], b"")) != wanted["size"]:
        raise Refusal(404, f"no upload of {wanted['size']} bytes with oid {wanted['oid']}")
    return Answer({"success": True})


@routes.on("POST", "/api/models/{repo}/commit/{revision}")
def commit(request: Request, repo: str, revision: str) -> Answer:
    as_pull_request = "create_pr" in request.query
    kept = request.writable(repo, None if as_pull_request else revision)
    operations = [json.loads(line) for line in request.body.splitlines()]
    made, ref = kept.commit(revision, operations, as_pull_request)
    home = f"{request.store.url}/{repo}"
    proposal = f"{home}/discussions/{ref.removeprefix('refs/pr/')}" if as_pull_request else None
    return Answer({"commitUrl": f"{home}/commit/{made.id}", "commitOid": made.id, "pullRequestUrl": proposal})
