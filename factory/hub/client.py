"""Create Hub clients that are bounded in time, retry, and send the token only to the Hub."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
from huggingface_hub import (
    HfApi,
    ModelInfo,
    SpaceInfo,
    constants,
    set_async_client_factory,
    set_client_factory,
)
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import parse_xet_file_data_from_response  # type: ignore[attr-defined]
from huggingface_hub.utils._http import default_async_client_factory, default_client_factory
from huggingface_hub.utils.tqdm import disable_progress_bars

from factory import __version__
from factory.hub.errors import BROKEN, CLIENT_ERRORS, CUT_SHORT, PASSING, UNANSWERED, causes, no_hub

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 120.0  # the server takes a while over a large commit
WAITS_SECONDS = (1.0, 2.0, 4.0)  # before each retry of a read
MAX_WAIT_SECONDS = 60.0  # a longer `Retry-After` is an error
T = TypeVar("T")
SECRETS = ("Authorization", "Cookie")
XET_HASH = constants.HUGGINGFACE_HEADER_X_XET_HASH


def hub_api() -> HfApi:
    """Return a client without progress bars or log lines, whose calls end even if the server goes silent."""
    disable_progress_bars()
    # Its log lines about retries contain signed URLs; the final failure is reported by us.
    remarks = logging.getLogger("huggingface_hub")
    if remarks.level == logging.WARNING:  # not where the user asked for more
        remarks.setLevel(logging.ERROR)
    return HfApi(library_name="hf-factory", library_version=__version__)


def _bound_in_time(request: httpx2.Request) -> None:
    """Bound every wait that the client leaves open; it sends most requests with `timeout=None`."""
    bounds = {"connect": CONNECT_SECONDS, "pool": None, "read": SILENCE_SECONDS, "write": SILENCE_SECONDS}
    given = {key: value for key, value in request.extensions["timeout"].items() if value is not None}
    request.extensions["timeout"] = bounds | given


def patiently(read: Callable[[], T]) -> T:
    """Read from the Hub, with retries after temporary faults: the client itself tries only once.

    A fault is temporary if the Hub was busy or returned a server error, or a connection broke; where no
    server answers at all, a retry would only waste time. `Retry-After` is obeyed up to a minute.

    Args:
        read: Function without side effects, so that it can be called again.
    """
    for wait in WAITS_SECONDS:
        try:
            return read()
        except CLIENT_ERRORS as error:
            seconds = wait_after(error, wait)
            if seconds is None or seconds > MAX_WAIT_SECONDS:
                raise
        time.sleep(seconds)
    return read()


def wait_after(error: BaseException, seconds: float, *, unanswered: bool = False) -> float | None:
    """Return how long to wait after an error: `seconds`, or what the Hub says; None if it is permanent.

    Args:
        unanswered: Wait even if no server answers: the network may come back.
    """
    if isinstance(error, LocalEntryNotFoundError):
        return None  # the client has already retried this read
    for cause in causes(error):
        if isinstance(cause, httpx2.HTTPStatusError):
            wanted = cause.response.headers.get("Retry-After", "")
            passing = cause.response.status_code in PASSING
            return (float(wanted) if wanted.isdigit() else seconds) if passing else None
        if isinstance(cause, UNANSWERED if unanswered else BROKEN):
            return seconds
    return seconds if str(error).startswith(CUT_SHORT) else None


def account_name() -> str:
    """Return the name of the account that the token belongs to."""
    answer = patiently(lambda: hub_api().whoami(cache=True))
    name = answer.get("name") if isinstance(answer, dict) else None
    if not isinstance(name, str):
        raise no_hub()
    return name


def files_of(info: ModelInfo | SpaceInfo) -> dict[str, RepoSibling]:
    """Return the files of a repository by name, checking types, which the client does not.

    Raises:
        HubError: The answer did not come from a Hub.
    """
    files = {file.rfilename: file for file in info.siblings or () if isinstance(file.rfilename, str)}
    for file in files.values():
        hashed = file.lfs is None or isinstance(file.lfs.sha256, str)
        if not isinstance(file.size, int | None) or not isinstance(file.blob_id, str | None) or not hashed:
            raise no_hub()
    if len(files) < len(info.siblings or ()):
        raise no_hub()
    return files


def is_hub(url: httpx2.URL) -> bool:
    """Return whether a URL has the Hub's scheme, host and port, allowing an upgrade from http to https."""
    hub = httpx2.URL(constants.ENDPOINT)
    upgraded = (hub.scheme, url.scheme) == ("http", "https") and url.port is None  # the default port
    return (url.host, url.port) == (hub.host, hub.port) and (url.scheme == hub.scheme or upgraded)


def keep_token(request: httpx2.Request) -> None:
    """Remove the token from a request to another origin: the client follows URLs that answers contain."""
    if not is_hub(request.url):
        for name in SECRETS:
            request.headers.pop(name, None)


def keep_refresh(response: httpx2.Response) -> None:
    """Download a file without xet if its access is renewed elsewhere: hf_xet would send the token there."""
    if XET_HASH in response.headers:
        found = parse_xet_file_data_from_response(response)
        if found and not is_hub(httpx2.URL(found.refresh_route)):
            del response.headers[XET_HASH]


def guard_clients(bound: Callable[[httpx2.Request], None]) -> None:
    """Make every client that huggingface_hub creates in this process send the token only to the Hub.

    Hooks on an existing client would be lost: huggingface_hub replaces one that finds no connection.

    Args:
        bound: Hook that bounds the time of each request.
    """

    async def both(request: httpx2.Request) -> None:
        keep_token(request)
        bound(request)

    def client() -> httpx2.Client:
        made = default_client_factory()
        made.event_hooks["request"] += [keep_token, bound]
        made.event_hooks["response"].append(keep_refresh)
        return made

    def async_client() -> httpx2.AsyncClient:
        made = default_async_client_factory()
        made.event_hooks["request"].append(both)
        return made

    set_client_factory(client)
    set_async_client_factory(async_client)


# At import: `datasets` and lm-eval call the Hub too, in every process that reads texts or questions.
guard_clients(_bound_in_time)
