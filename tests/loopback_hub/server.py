"""The loopback Hub as a test sees it: started, fed, asked, made to fail, stopped."""

import asyncio
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from tests.loopback_hub import buckets, jobs, reading, writing  # noqa: F401  registers the routes
from tests.loopback_hub.app import Application, Request
from tests.loopback_hub.faults import Fault
from tests.loopback_hub.storage import Repository, Storage
from tests.waiting import HUNG_SECONDS

ALICE = "hf_alice_may_read_and_write"
BOB = "hf_bob_may_only_read"


class Hub:
    """A Hub on 127.0.0.1. Large files are served from a second origin, as the real one does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.storage = Storage(folder / "0")
        self.sockets = [_bound_socket(), _bound_socket()]
        self.url, self.cdn_url = (f"http://127.0.0.1:{s.getsockname()[1]}" for s in self.sockets)
        self.app = Application(self.storage, url=self.url, cdn_url=self.cdn_url)
        self.app.users = {ALICE: ("alice", True), BOB: ("bob", False)}
        self._generation = 0
        self._servers = [uvicorn.Server(_uvicorn_config(self.app)) for _ in self.sockets]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def requests(self) -> list[Request]:
        """Every request so far."""
        return self.app.requests

    def count(self, method: str, part: str) -> int:
        """How many requests had this method and this in their path."""
        return sum(r.method == method and part in r.path for r in self.requests)

    def fail(self, method: str, path: str, **how: Any) -> Fault:
        """Inject a fault; see `Fault`."""
        self.app.faults.append(Fault(method, path, **how))
        return self.app.faults[-1]

    def put_model(self, repo_id: str, folder: Path, **files: bytes) -> str:
        """Commit a folder's files as a model; returns the commit's hash."""
        content = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return self.storage.put("model", repo_id, content | files)

    def put_dataset(self, repo_id: str, files: dict[str, bytes]) -> str:
        """Commit files as a data set; returns the commit's hash."""
        return self.storage.put("dataset", repo_id, files)

    def repository(self, repo_id: str, *, kind: str = "model") -> Repository:
        """A repository as it stands."""
        return self.storage.repositories[kind, repo_id]

    def files(self, repo_id: str, *, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """What a repository holds, less the Hub's own `.gitattributes`."""
        commit = self.repository(repo_id, kind=kind).find(revision)
        assert commit is not None, f"no revision {revision}"
        return {p: self.storage.read(f) for p, f in commit.files.items() if p != ".gitattributes"}

    def bucket(self, bucket: str) -> dict[str, bytes]:
        """What a bucket holds."""
        files = self.storage.buckets[bucket].files
        return {path: self.storage.xet_contents[xet_hash] for path, (xet_hash, _, _) in files.items()}

    def job(self, number: int = -1) -> jobs.Job:
        """A job that was submitted: by default the last one."""
        found: jobs.Job = list(self.storage.jobs.values())[number]
        return found

    def environment(self, home: Path, *, token: str | None = ALICE) -> dict[str, str]:
        """Variables that point the client at this Hub and at its own empty home."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": str(HUNG_SECONDS),
            "HF_HUB_DOWNLOAD_TIMEOUT": str(HUNG_SECONDS),
            "NO_PROXY": "127.0.0.1",
        }
        return variables | ({"HF_TOKEN": token} if token else {})

    def reset(self) -> None:
        """Forget repositories, requests and faults; the address stays."""
        self._generation += 1
        # A new folder each time: a client that is still alive keeps its xet store locked.
        self.storage = self.app.storage = Storage(self._folder / str(self._generation))
        self.app.next_url = self.url
        self.app.requests.clear()
        self.app.faults.clear()

    def start(self) -> None:
        """Serve from a thread; returns once both origins answer."""
        self._thread.start()
        for s in self.sockets:  # the sockets listen already: a connection waits for the server
            socket.create_connection(s.getsockname(), timeout=10).close()

    def stop(self) -> None:
        """Close both origins."""
        for server in self._servers:
            server.should_exit = server.force_exit = True
        self._thread.join(timeout=10)
        for s in self.sockets:
            s.close()

    def _serve(self) -> None:
        async def both() -> None:
            await asyncio.gather(
                *(server.serve(sockets=[s]) for server, s in zip(self._servers, self.sockets, strict=True))
            )

        asyncio.run(both())


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that serves until the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        hub = Hub(Path(folder))
        hub.start()
        try:
            yield hub
        finally:
            hub.stop()


def _bound_socket() -> socket.socket:
    s = socket.socket()
    s.bind(("127.0.0.1", 0))
    s.listen()
    return s


def _uvicorn_config(app: Application) -> uvicorn.Config:
    return uvicorn.Config(
        app, http="h11", lifespan="off", log_level="critical", access_log=False, proxy_headers=False
    )
