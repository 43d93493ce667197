"""The Hub's client: bounded in time, retried, and sending its token only to the Hub."""

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
SILENCE_SECONDS = 120.0  # of the server; a large commit takes it a while
WAITS_SECONDS = (1.0, 2.0, 4.0)  # before reading again what the Hub failed to answer
LONGEST_WAIT_SECONDS = 60.0  # that the Hub may ask for
T = TypeVar("T")
SECRETS = ("Authorization", "Cookie")
XET_HASH = constants.HUGGINGFACE_HEADER_X_XET_HASH


def hub_api() -> HfApi:
    """A client without progress bars and remarks, whose calls end even if the server falls silent."""
    disable_progress_bars()
    # Its remarks on trying again hold signed addresses; what comes of it in the end is told by us.
    remarks = logging.getLogger("huggingface_hub")
    if remarks.level == logging.WARNING:  # not where the user asked for more
        remarks.setLevel(logging.ERROR)
    return HfApi(library_name="hf-factory", library_version=__version__)


def _bound_in_time(request: httpx2.Request) -> None:
    """Bound every wait that the client leaves open; it asks for most things with `timeout=None`."""
    bounds = {"connect": CONNECT_SECONDS, "pool": None, "read": SILENCE_SECONDS, "write": SILENCE_SECONDS}
    asked = {key: value for key, value in request.extensions["timeout"].items() if value is not None}
    request.extensions["timeout"] = bounds | asked


def patiently(read: Callable[[], T]) -> T:
    """Read from the Hub, again after a fault that may pass: the client itself asks but once.

    A fault passes if the Hub was busy or out of order, or a connection broke; where nobody answers at
    all, asking again would only take the user's time. `Retry-After` is obeyed up to a minute.

    Args:
        read: Changes nothing, so that it can be called again.
    """
    for wait in WAITS_SECONDS:
        try:
            return read()
        except CLIENT_ERRORS as error:
            seconds = wait_after(error, wait)
            if seconds is None or seconds > LONGEST_WAIT_SECONDS:
                raise
        time.sleep(seconds)
    return read()


def wait_after(error: BaseException, seconds: float, *, unanswered: bool = False) -> float | None:
    """How long to wait after this error, `seconds` unless the Hub says; None if it will not pass.

    Args:
        unanswered: Wait also where nobody answers: the network may be back later.
    """
    if isinstance(error, LocalEntryNotFoundError):
        return None  # the one read that the client repeats by itself
    for cause in causes(error):
        if isinstance(cause, httpx2.HTTPStatusError):
            asked = cause.response.headers.get("Retry-After", "")
            passing = cause.response.status_code in PASSING
            return (float(asked) if asked.isdigit() else seconds) if passing else None
        if isinstance(cause, UNANSWERED if unanswered else BROKEN):
            return seconds
    return seconds if str(error).startswith(CUT_SHORT) else None


def account_name() -> str:
    """The name of the account that the token belongs to."""
    answer = patiently(lambda: hub_api().whoami(cache=True))
    name = answer.get("name") if isinstance(answer, dict) else None
    if not isinstance(name, str):
        raise no_hub()
    return name


def files_of(info: ModelInfo | SpaceInfo) -> dict[str, RepoSibling]:
    """Every file of a repository by name; the client passes on whatever types an answer has.

    Raises:
        HubError: The answer is not one of a Hub.
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
    """Whether an address is the Hub's: the same scheme, host and port, or the step from http to https."""
    hub = httpx2.URL(constants.ENDPOINT)
    upgraded = (hub.scheme, url.scheme) == ("http", "https") and url.port is None  # the usual port
    return (url.host, url.port) == (hub.host, hub.port) and (url.scheme == hub.scheme or upgraded)


def keep_token(request: httpx2.Request) -> None:
    """Take the token off a request to another origin: answers name addresses, which the client follows."""
    if not is_hub(request.url):
        for name in SECRETS:
            request.headers.pop(name, None)


def keep_refresh(response: httpx2.Response) -> None:
    """Take a file out of xet whose access is renewed elsewhere: hf_xet does that itself, with the token."""
    if XET_HASH in response.headers:
        found = parse_xet_file_data_from_response(response)
        if found and not is_hub(httpx2.URL(found.refresh_route)):
            del response.headers[XET_HASH]


def guard_clients(bound: Callable[[httpx2.Request], None]) -> None:
    """Have every client that huggingface_hub makes in this process keep the token to the Hub.

    A hook on a client that is there would not outlive it: one that finds no connection is replaced.

    Args:
        bound: Called with each request too, to bound its time.
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


# At import, since `datasets` and lm-eval ask the Hub too, in whichever process reads texts or questions.
guard_clients(_bound_in_time)
