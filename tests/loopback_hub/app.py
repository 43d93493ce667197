"""The routes of the loopback Hub, on the raw path: revisions such as `refs%2Fpr%2F1` stay quoted in it."""

import asyncio
import re
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote

from starlette.responses import JSONResponse, Response

from tests.loopback_hub.faults import Fault
from tests.loopback_hub.storage import (
    Commit,
    Repository,
    Storage,
)


@dataclass(frozen=True)
class Request:
    """One request as the log keeps it."""

    method: str
    path: str  # raw
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    port: int

    @property
    def token(self) -> str | None:
        """The bearer token."""
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None


class Refusal(Exception):  # noqa: N818  an answer, not a fault
    """An answer that is not 2xx."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.response = JSONResponse({"error": message}, status, headers)


KIND = r"/api/(?P<kind>model|dataset|space)s/(?P<repo>[^/]+/[^/]+)"
PREFIX = r"/(?:(?P<kind>dataset|space)s/)?(?P<repo>[^/]+/[^/]+)"
Route = tuple[str, re.Pattern[str], Callable[..., Response]]
ROUTES: list[Route] = []


def route(method: str, pattern: str) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    """Register a handler for a method and a pattern of the whole raw path."""

    def register(handler: Callable[..., Response]) -> Callable[..., Response]:
        ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return register


class Application:
    """An ASGI application over a storage, with a request log and faults."""

    def __init__(self, storage: Storage, *, url: str, cdn_url: str) -> None:
        self.storage = storage
        self.url = url
        self.cdn_url = cdn_url
        self.next_url = url  # that answers name for the request after this one
        self.users: dict[str, tuple[str, bool]] = {}  # token → name, may write
        self.requests: list[Request] = []
        self.faults: list[Fault] = []

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        request = await _read_request(scope, receive)
        self.requests.append(request)
        fault = next((f for f in self.faults if f.matches(request.method, request.path)), None)
        if fault is None:
            await self.answer(request)(scope, receive, send)
            return
        fault.times -= 1
        await asyncio.sleep(fault.delay_seconds)
        if fault.meanwhile:
            fault.meanwhile()
        if fault.drop:
            if fault.after:
                self.answer(request)
            send.__self__.transport.abort()  # uvicorn's cycle; ASGI has no word for a broken connection
            return
        if fault.status is not None:
            if fault.after:
                self.answer(request)
            await Response(fault.body, fault.status, fault.headers)(scope, receive, send)
            return
        response = self.answer(request)
        if fault.truncate:
            await send(
                {
                    "type": "http.response.start",
                    "status": response.status_code,
                    "headers": response.raw_headers,
                }
            )
            half = bytes(response.body)[: len(response.body) // 2]
            await send({"type": "http.response.body", "body": half, "more_body": True})
            await asyncio.sleep(0.05)
            send.__self__.transport.close()
            return
        await fault.damage(response)(scope, receive, send)

    def answer(self, request: Request) -> Response:
        """Find the route and run it."""
        method = "GET" if request.method == "HEAD" else request.method
        for route_method, pattern, handler in ROUTES:
            match = pattern.fullmatch(request.path)
            if match and route_method == method:
                groups = {k: unquote(v) if v else v for k, v in match.groupdict().items()}
                try:
                    return handler(self, request, **groups)
                except Refusal as refusal:
                    return refusal.response
        return JSONResponse({"error": "no such route"}, 404)

    def user(self, request: Request, *, writes: bool = False) -> str | None:
        """Who asks; None for nobody.

        Raises:
            Refusal: The token is unknown, or may not write.
        """
        if request.token is None:
            if writes:
                raise Refusal(401, "Invalid username or password.")
            return None
        if request.token not in self.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        name, may_write = self.users[request.token]
        if writes and not may_write:
            raise Refusal(403, "this token may not write")
        return name

    def readable(self, request: Request, kind: str | None, repo: str, *, content: bool = False) -> Repository:
        """The repository, if it is there and may be seen (and, for `content`, read)."""
        user = self.user(request)
        repository = self.storage.repositories.get((kind or "model", repo))
        if repository is None or (repository.private and user != repo.split("/")[0]):
            if user is None:  # the real Hub does not tell strangers what is missing
                raise Refusal(401, "Invalid username or password.")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if content and repository.gated_to is not None and user not in repository.gated_to:
            raise Refusal(403 if user else 401, f"Access to model {repo} is restricted.", "GatedRepo")
        return repository

    def writable(
        self, request: Request, kind: str | None, repo: str, *, as_pr: bool = False, revision: str = "main"
    ) -> Repository:
        """The repository, if whoever asks may write to it, propose a change or add to their own proposal."""
        user = self.user(request, writes=True)
        repository = self.readable(request, kind, repo)
        number = revision.removeprefix("refs/pr/")
        proposal = repository.pull_requests.get(int(number)) if number.isdigit() else None
        is_own = proposal is not None and proposal.author == user and proposal.status == "open"
        if user != repo.split("/")[0] and not as_pr and not is_own:
            raise Refusal(403, f"{user} may not write to {repo}")
        return repository


async def _read_request(scope: MutableMapping[str, Any], receive: Any) -> Request:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    query = {k: v[-1] for k, v in parse_qs(scope["query_string"].decode()).items()}
    headers = {k.decode(): v.decode() for k, v in scope["headers"]}
    path = scope["raw_path"].decode().split("?")[0]
    return Request(scope["method"], path, query, headers, body, scope["server"][1])


def find_commit(repository: Repository, revision: str) -> Commit:
    commit = repository.find(revision)
    if commit is None:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit
