"""Routes that read: who asks, what a repository is, its files."""

import json
import re
from typing import Any
from urllib.parse import parse_qs, urlencode

import yaml
from starlette.responses import JSONResponse, Response

from tests.loopback_hub.app import KIND, PREFIX, Application, Refusal, Request, find_commit, route
from tests.loopback_hub.storage import File, card_data, front_matter

PAGE_SIZE = 1000  # entries of a folder's listing


@route("GET", "/api/whoami-v2")
def whoami(app: Application, request: Request) -> Response:
    user = app.user(request)
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    return JSONResponse({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})


@route("POST", "/api/validate-yaml")
def validate_yaml(app: Application, request: Request) -> Response:
    errors = card_errors(json.loads(request.body)["content"])
    return JSONResponse({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)


def card_errors(text: str) -> list[str]:
    """The checks of the real Hub that matter here."""
    try:
        data = front_matter(text) or {}
    except (yaml.YAMLError, ValueError) as error:
        return [f"YAML: {str(error).splitlines()[0]}"]
    base_models = data.get("base_model") or []
    base_models = [base_models] if isinstance(base_models, str) else base_models
    return [
        f'"base_model[{i}]" with value "{name}" fails to match the model id pattern'
        for i, name in enumerate(base_models)
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))
    ]


@route("GET", KIND + "(?:/revision/(?P<revision>[^/]+))?")
def info(app: Application, request: Request, kind: str, repo: str, revision: str | None) -> Response:
    repository = app.readable(request, kind, repo)
    commit = find_commit(repository, revision or "main")
    blobs = "blobs" in request.query
    found: dict[str, Any] = {
        "id": repo,
        "sha": commit.oid,
        "private": repository.private,
        "gated": "auto" if repository.gated_to is not None else False,
        "cardData": card_data(commit),
        "tags": [],
        "siblings": [
            {"rfilename": path} | (_sibling(file) if blobs else {}) for path, file in commit.files.items()
        ],
    }
    if "securityStatus" in request.query:
        found["securityRepoStatus"] = {"scansDone": True, "filesWithIssues": []}
    return JSONResponse(found)


def _sibling(file: File) -> dict[str, Any]:
    lfs = {"lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": 134}} if file.lfs else {}
    return {"size": file.size, "blobId": file.oid} | lfs


def _entries(app: Application, files: dict[str, File]) -> list[dict[str, Any]]:
    hashes = app.storage.xet_hashes()
    return [_entry(path, file, xet_hash=hashes.get(file.sha256)) for path, file in files.items()]


def _entry(path: str, file: File, *, xet_hash: str | None) -> dict[str, Any]:
    lfs = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 134}} if file.lfs else {}
    xet = {"xetHash": xet_hash} if file.lfs and xet_hash else {}
    return {"type": "file", "path": path, "size": file.size, "oid": file.oid} | lfs | xet


@route("GET", KIND + "/refs")
def refs(app: Application, request: Request, kind: str, repo: str) -> Response:
    repository = app.readable(request, kind, repo)
    branches = [
        {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": oid}
        for ref, oid in repository.refs.items()
        if not ref.startswith("refs/")
    ]
    pulls = [
        {"name": ref, "ref": ref, "targetCommit": oid}
        for ref, oid in repository.refs.items()
        if ref.startswith("refs/pr/")
    ]
    asked = {"pullRequests": pulls} if "include_prs" in request.query else {}
    return JSONResponse({"branches": branches, "tags": [], "converts": []} | asked)


@route("GET", KIND + "/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
def tree(
    app: Application, request: Request, kind: str, repo: str, revision: str, path: str | None
) -> Response:
    """A page of a folder; the next is named by a link, as for the real Hub's folders of over 1,000 files."""
    commit = find_commit(app.readable(request, kind, repo), revision)
    start = f"{path}/" if path else ""
    below = {p: f for p, f in commit.files.items() if p.startswith(start)}
    if path and not below:
        raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
    folders = {p[: i + len(start)] for p in below if (i := p[len(start) :].find("/")) > 0}
    entries = [{"type": "directory", "path": folder, "oid": "0" * 40} for folder in sorted(folders)]
    deep = request.query.get("recursive") == "true"
    entries += _entries(app, {p: f for p, f in below.items() if deep or "/" not in p[len(start) :]})
    first = int(request.query.get("cursor", 0))
    last = first + PAGE_SIZE
    following = urlencode(request.query | {"cursor": last})
    link = {"Link": f'<{app.next_url}{request.path}?{following}>; rel="next"'} if last < len(entries) else {}
    return JSONResponse(entries[first:last], headers=link)


@route("POST", KIND + "/paths-info/(?P<revision>[^/]+)")
def paths_info(app: Application, request: Request, kind: str, repo: str, revision: str) -> Response:
    commit = find_commit(app.readable(request, kind, repo), revision)
    paths = parse_qs(request.body.decode()).get("paths", [])
    return JSONResponse(_entries(app, {p: commit.files[p] for p in paths if p in commit.files}))


@route("GET", KIND + "/discussions")
def discussions(app: Application, request: Request, kind: str, repo: str) -> Response:
    repository = app.readable(request, kind, repo)
    found = [
        {
            "num": number,
            "title": proposal.title,
            "author": {"name": proposal.author},
            "createdAt": "2026-01-01T00:00:00.000Z",
            "status": proposal.status,
            "repo": {"name": repo, "type": kind},
            "isPullRequest": True,
        }
        for number, proposal in repository.pull_requests.items()
        if request.query.get("author", proposal.author) == proposal.author
        and request.query.get("status", proposal.status) == proposal.status
    ]
    return JSONResponse({"discussions": found, "count": len(found), "start": 0})


@route("GET", PREFIX + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(
    app: Application, request: Request, kind: str | None, repo: str, revision: str, path: str
) -> Response:
    commit = find_commit(app.readable(request, kind, repo, content=True), revision)
    file = commit.files.get(path)
    if file is None:
        refusal = Refusal(404, "Entry not found", "EntryNotFound")
        refusal.response.headers["X-Repo-Commit"] = commit.oid
        raise refusal
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    if not file.lfs:
        return _ranged(request, file.content, headers)
    linked = {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256}"'}
    app.storage.read(file)
    location = {"Location": f"{app.cdn_url}/blobs/{file.sha256}?signature=x"}
    xet = {}
    if xet_hash := app.storage.xet_hashes().get(file.sha256):
        token = f"{app.next_url}/api/{kind or 'model'}s/{repo}/xet-read-token/{commit.oid}"
        xet = {"X-Xet-Hash": xet_hash, "Link": f'<{token}>; rel="xet-auth"'}
    return Response(status_code=302, headers=headers | linked | location | xet)


@route("GET", "/blobs/(?P<sha256>[0-9a-f]{64})")
def blob(app: Application, request: Request, sha256: str) -> Response:
    """A large file on the second origin, which must never see a token."""
    if request.token is not None:
        raise Refusal(400, "Only one auth mechanism allowed")
    return _ranged(request, app.storage.objects[sha256], {"ETag": f'"{sha256}"'})


def _ranged(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    body, status = content, 200
    if match and int(match[1]) < len(content):
        first, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
        body, status = content[first : last + 1], 206
        headers = headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
    response = Response(body, status, headers)
    if request.method == "HEAD":
        response.body = b""
    return response
