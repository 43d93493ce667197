"""Routes that write: creation, the two ways up, the commit."""

import base64
import json
import time
from typing import Any

from starlette.responses import JSONResponse, Response

from tests.loopback_hub.app import KIND, PREFIX, Application, Refusal, Request, find_commit, route
from tests.loopback_hub.reading import card_errors
from tests.loopback_hub.spaces import check_payment
from tests.loopback_hub.storage import LFS_SUFFIXES, File, PullRequest, Storage, lfs_file, regular_file


@route("POST", "/api/repos/create")
def create(app: Application, request: Request) -> Response:
    fields = json.loads(request.body)
    user = app.user(request, writes=True)
    kind, owner = fields.pop("type", None) or "model", fields.pop("organization", None) or user
    repo_id = f"{owner}/{fields.pop('name')}"
    if owner != user:
        raise Refusal(403, f"You don't have the rights to create a {kind} under the namespace {owner}")
    url = f"{app.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
    if (kind, repo_id) in app.storage.repositories:
        return JSONResponse({"error": "You already created this repo", "url": url}, 409)
    if kind == "space":
        check_payment(app.storage, owner, fields)
    app.storage.create(kind, repo_id, private=fields.pop("visibility", "public") == "private", **fields)
    return JSONResponse({"url": url, "name": repo_id, "id": repo_id})


@route("PUT", KIND + "/settings")
def settings(app: Application, request: Request, kind: str, repo: str) -> Response:
    app.writable(request, kind, repo).private = json.loads(request.body)["visibility"] == "private"
    return JSONResponse({})


@route("POST", KIND + "/branch/(?P<branch>.+)")
def create_branch(app: Application, request: Request, kind: str, repo: str, branch: str) -> Response:
    repository = app.writable(request, kind, repo)
    if branch in repository.refs:
        raise Refusal(409, f"Reference already exists: {branch}")
    start = json.loads(request.body or b"{}").get("startingPoint", "main")
    repository.refs[branch] = find_commit(repository, start).oid
    return JSONResponse({})


@route("POST", KIND + "/preupload/(?P<revision>[^/]+)")
def preupload(app: Application, request: Request, kind: str, repo: str, revision: str) -> Response:
    repository = app.writable(request, kind, repo, as_pr="create_pr" in request.query, revision=revision)
    files = find_commit(repository, revision).files
    answers = []
    for asked in json.loads(request.body)["files"]:
        path, lfs = asked["path"], asked["path"].endswith(LFS_SUFFIXES)
        oid = files[path].etag if path in files else None
        mode = "lfs" if lfs else "regular"
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return JSONResponse({"files": answers})


@route("POST", PREFIX + r"\.git/info/lfs/objects/batch")
def lfs_batch(app: Application, request: Request, kind: str | None, repo: str) -> Response:
    app.user(request, writes=True)
    objects = []
    for item in json.loads(request.body)["objects"]:
        answer = {"oid": item["oid"], "size": item["size"]}
        if not app.storage.has_object(item["oid"]):
            answer["actions"] = {
                "upload": {"href": f"{app.cdn_url}/upload/{item['oid']}?signature=x"},
                "verify": {"href": f"{app.next_url}/{repo}.git/info/lfs/objects/verify"},
            }
        objects.append(answer)
    return JSONResponse({"transfer": "basic", "objects": objects})


@route("PUT", "/upload/(?P<sha256>[0-9a-f]{64})")
def lfs_put(app: Application, request: Request, sha256: str) -> Response:
    if app.storage.add_object(request.body) != sha256:
        raise Refusal(400, "the content has another sha256")
    return Response()


@route("POST", PREFIX + r"\.git/info/lfs/objects/verify")
def lfs_verify(app: Application, request: Request, kind: str | None, repo: str) -> Response:
    asked = json.loads(request.body)
    held = app.storage.objects.get(asked["oid"])
    if held is None or len(held) != asked["size"]:
        raise Refusal(404, "no such object")
    return JSONResponse({})


@route("GET", KIND + "/xet-(?P<access>read|write)-token/(?P<revision>[^/]+)")
def xet_token(
    app: Application, request: Request, kind: str, repo: str, access: str, revision: str
) -> Response:
    if access == "write":
        app.writable(request, kind, repo, as_pr="create_pr" in request.query, revision=revision)
    else:
        app.readable(request, kind, repo, content=True)
    expiry, url = int(time.time()) + 3600, f"local://{app.storage.xet_folder}"
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expiry)}
    return JSONResponse({"casUrl": url, "accessToken": "xet", "exp": expiry}, headers=headers)


@route("POST", KIND + "/commit/(?P<revision>[^/]+)")
def commit(app: Application, request: Request, kind: str, repo: str, revision: str) -> Response:
    as_pr = "create_pr" in request.query
    repository = app.writable(request, kind, repo, as_pr=as_pr, revision=revision)
    lines = [json.loads(line) for line in request.body.splitlines()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    head = find_commit(repository, revision)
    if not as_pr and header.get("parentCommit", head.oid) != head.oid:
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines:
        _apply(app.storage, files, line["key"], line["value"])
    number = 1 + len(repository.pull_requests)
    if as_pr:
        author = str(app.user(request, writes=True))
        repository.pull_requests[number] = PullRequest(author, header["summary"])
    ref = f"refs/pr/{number}" if as_pr else revision
    made = repository.commit(ref, files, header["summary"])
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{app.url}/{repo}/commit/{made.oid}"}
    if as_pr:
        answer["pullRequestUrl"] = f"{app.url}/{repo}/discussions/{number}"
    return JSONResponse(answer)


def _apply(storage: Storage, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
    """One line of a commit."""
    path = value.get("path", "")
    if key == "file":
        content = base64.b64decode(value["content"])
        if path == "README.md" and (errors := card_errors(content.decode())):
            raise Refusal(400, "; ".join(errors))
        files[path] = regular_file(content)
    elif key == "lfsFile":
        if not storage.has_object(value["oid"]):
            raise Refusal(400, f"LFS pointer {value['oid']} points to an object that was never uploaded")
        files[path] = lfs_file(value["oid"], value["size"])
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
    elif key == "deletedFolder":
        for inside in [p for p in files if p.startswith(path.rstrip("/") + "/")]:
            del files[inside]
