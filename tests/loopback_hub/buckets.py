"""Routes of buckets: files without history, whose bytes lie in the xet store alone."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from starlette.responses import JSONResponse, Response

from tests.loopback_hub import xet
from tests.loopback_hub.app import Application, Refusal, Request, route

NAME = r"/api/buckets/(?P<bucket>[^/]+/[^/]+)"


@dataclass
class Bucket:
    """Path → xet hash, size and milliseconds of its last change; what was ever in it, in order."""

    private: bool
    files: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    batches: list[list[str]] = field(default_factory=list)  # operations, as "addFile path"


def _new_store(app: Application) -> Path:
    """Where one client finds or leaves bytes. A store takes one process at a time, so each has its own."""
    app.storage.xet_clients += 1
    folder = app.storage.xet_folder
    store = folder.with_name(f"{folder.name}-bucket-{app.storage.xet_clients}")
    store.mkdir(parents=True)
    return store


def _take_in(app: Application, xet_hashes: set[str]) -> None:
    """Take these bytes from where clients have left them, last first: one that was killed leaves ruins."""
    while app.storage.xet_uploads and not xet_hashes <= app.storage.xet_contents.keys():
        app.storage.xet_contents |= xet.read_all(app.storage.xet_uploads.pop())


def _bucket(app: Application, request: Request, bucket: str, *, writes: bool = False) -> Bucket:
    user = app.user(request, writes=writes)
    found = app.storage.buckets.get(bucket)
    if found is None or (found.private and user != bucket.split("/")[0]):
        raise Refusal(404 if user else 401, "Bucket not found", "RepoNotFound")
    if writes and user != bucket.split("/")[0]:
        raise Refusal(403, f"{user} may not write to {bucket}")
    return found


@route("POST", NAME)
def create(app: Application, request: Request, bucket: str) -> Response:
    user = app.user(request, writes=True)
    if bucket.split("/")[0] != user:
        raise Refusal(403, f"You don't have the rights to create a bucket in {bucket.split('/')[0]}")
    url = f"{app.url}/buckets/{bucket}"
    if bucket in app.storage.buckets:
        return JSONResponse({"error": "You already created this bucket", "url": url}, 409)
    private = json.loads(request.body).get("visibility") == "private"
    app.storage.buckets[bucket] = Bucket(private)
    return JSONResponse({"url": url})


@route("GET", NAME)
def info(app: Application, request: Request, bucket: str) -> Response:
    found = _bucket(app, request, bucket)
    return JSONResponse(
        {
            "id": bucket,
            "private": found.private,
            "createdAt": "2026-01-01T00:00:00.000Z",
            "size": sum(size for _, size, _ in found.files.values()),
            "totalFiles": len(found.files),
        }
    )


@route("GET", NAME + "/tree(?:/(?P<prefix>[^/]+))?")
def tree(app: Application, request: Request, bucket: str, prefix: str | None) -> Response:
    found = _bucket(app, request, bucket)
    start = unquote(prefix or "")
    return JSONResponse([_entry(p, f) for p, f in sorted(found.files.items()) if p.startswith(start)])


def _entry(path: str, file: tuple[str, int, int]) -> dict[str, object]:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(file[2] / 1000))
    return {"type": "file", "path": path, "size": file[1], "xetHash": file[0], "mtime": moment}


@route("POST", NAME + "/paths-info")
def paths_info(app: Application, request: Request, bucket: str) -> Response:
    found = _bucket(app, request, bucket)
    paths = json.loads(request.body)["paths"]
    return JSONResponse([_entry(path, found.files[path]) for path in paths if path in found.files])


@route("POST", NAME + "/batch")
def batch(app: Application, request: Request, bucket: str) -> Response:
    found = _bucket(app, request, bucket, writes=True)
    operations = [json.loads(line) for line in request.body.splitlines()]
    _take_in(app, {operation["xetHash"] for operation in operations if "xetHash" in operation})
    contents = app.storage.xet_contents
    failed = []
    for operation in operations:
        path = operation["path"]
        if operation["type"] == "deleteFile":
            if found.files.pop(path, None) is None:
                failed.append({"path": path, "error": "no such file"})
        elif operation["xetHash"] in contents:
            found.files[path] = operation["xetHash"], len(contents[operation["xetHash"]]), operation["mtime"]
        else:
            failed.append({"path": path, "error": "its content was never uploaded"})
    found.batches.append([f"{operation['type']} {operation['path']}" for operation in operations])
    return JSONResponse({"success": not failed, "failed": failed}, 422 if failed else 200)


@route("GET", NAME + "/xet-(?P<access>read|write)-token")
def xet_token(app: Application, request: Request, bucket: str, access: str) -> Response:
    _bucket(app, request, bucket, writes=access == "write")
    store = _new_store(app)
    if access == "write":
        app.storage.xet_uploads.append(store)
    else:
        xet.write(store, app.storage.xet_contents.values())
    expiry, url = int(time.time()) + 3600, f"local://{store}"
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expiry)}
    return JSONResponse({"casUrl": url, "accessToken": "xet", "exp": expiry}, headers=headers)


@route("GET", "/buckets/(?P<bucket>[^/]+/[^/]+)/resolve/(?P<path>[^/]+)")
def resolve(app: Application, request: Request, bucket: str, path: str) -> Response:
    found = _bucket(app, request, bucket)
    if path not in found.files:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    xet_hash, size, _ = found.files[path]
    headers = {
        "X-Xet-Hash": xet_hash,
        "X-Xet-Refresh-Route": f"{app.url}/api/buckets/{bucket}/xet-read-token",
        "X-Linked-Size": str(size),
    }
    return Response(b"", headers=headers)
