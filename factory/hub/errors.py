"""Explain each error of the Hub's client in one line."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from factory.errors import DiskSpaceError, FactoryError, HubError
from factory.store.capacity import no_room

PASSING = (429, 500, 502, 503, 504)
AGAIN = "run the same command again"
CUT_SHORT = "Consistency check failed"  # the client's message for a truncated download
NOT_SENT = (UnicodeEncodeError, httpx2.LocalProtocolError)  # the request could not be encoded
BROKEN = (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError)
UNANSWERED = (httpx2.RemoteProtocolError, httpx2.NetworkError, httpx2.TimeoutException)
UNREACHABLE = (httpx2.TransportError, OfflineModeIsEnabled)
# Raised for answers that no Hub sends: a proxy's page, endless redirects, another service's JSON.
STRANGE = (
    *(httpx2.TooManyRedirects, httpx2.DecodingError, httpx2.InvalidURL),
    *(JSONDecodeError, UnicodeDecodeError),
)
# Raised for JSON that lacks expected fields or is nested without end.
STUMBLES = (LookupError, TypeError, AttributeError, AssertionError, RecursionError)
OF_CARDS = "huggingface_hub.repocard"  # raises ValueError with the Hub's objections to a card
CLIENT = ("huggingface_hub", "httpx2")
# Everything that the client raises itself; its xet and LFS paths raise builtin errors.
CLIENT_ERRORS = (
    httpx2.HTTPError,
    OSError,
    RuntimeError,
    ValueError,
    RevisionResolutionError,
    EntryNotFoundError,
    CachedRepoTreeNotFoundError,
    httpx2.InvalidURL,
    *STUMBLES,
)


@contextmanager
def hub_errors(repo_id: str, *, revision: str | None = None, writing: bool = False) -> Iterator[None]:
    """Turn the client's errors into a `FactoryError` about `repo_id`; let other errors through.

    Args:
        repo_id: Repository that the block works on.
        revision: Requested revision.
        writing: Whether the block changes the repository: a refusal then means something else.

    Raises:
        HubError: The client failed; the message never contains a token.
        DiskSpaceError: The disk is full.
    """
    try:
        yield
    except CLIENT_ERRORS as error:
        explained = explain(error, repo_id=repo_id, revision=revision, writing=writing)
        if explained is None:
            raise
        raise explained from error


def explain(
    error: BaseException, *, repo_id: str, revision: str | None = None, writing: bool = False
) -> FactoryError | None:
    """Return the error that explains one of the client's; None if it is not about the Hub."""
    for cause in causes(error):
        if isinstance(cause, LocalTokenNotFoundError):
            return not_logged_in()
        if isinstance(cause, NOT_SENT) and not re.fullmatch("[ -~]*", get_token() or ""):
            return HubError(
                "your token contains a character that cannot be sent",
                hint=f"{_nothing(writing)}copy it again (HF_TOKEN, if set, overrides `hf auth login`)",
            )
        if isinstance(cause, HFValidationError):
            return HubError(f"{repo_id!r} is not a repository name", hint="give owner/name")
        if isinstance(cause, OfflineModeIsEnabled):
            lacks = "nothing can be published" if writing else f"the cache does not hold all of {repo_id}"
            return HubError(f"HF_HUB_OFFLINE is set and {lacks}", hint=f"unset it and {AGAIN}")
        if isinstance(cause, HfHubHTTPError):
            return _explain_answer(cause, repo_id=repo_id, revision=revision, writing=writing)
        if isinstance(cause, httpx2.TimeoutException):
            return HubError(f"{endpoint()} did not answer in time", hint=_later(writing))
        if isinstance(cause, httpx2.TransportError):
            return HubError(f"no connection to {endpoint()}: {_line(cause)}", hint=_later(writing))
    return _explain_builtin(error, repo_id=repo_id, writing=writing)


def endpoint() -> str:
    """Return the Hub's URL without a user name and password, so that it can be shown."""
    return _without_password(constants.ENDPOINT)


def _without_password(text: str) -> str:
    return re.sub(r"//[^/\s]*@", "//", text)


def not_logged_in() -> HubError:
    """Return the error for a command that needs a token."""
    return HubError("you are not logged in to the Hub", hint="run `hf auth login`, or set HF_TOKEN")


def is_unknown(error: BaseException) -> bool:
    """Return whether a failed request may have been carried out: no answer came, or not from the Hub."""
    return any(
        isinstance(cause, (httpx2.TransportError, *STRANGE, *STUMBLES))
        or (isinstance(cause, httpx2.HTTPStatusError) and cause.response.status_code >= 500)
        for cause in causes(error)
    )


def stumbled_in(error: BaseException, packages: tuple[str, ...]) -> str:
    """Return the innermost module, of these packages and ours, that an error came through."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((m for m in reversed(modules) if m.partition(".")[0] in (*packages, "factory")), "factory")


def no_hub() -> HubError:
    """Return the error for an answer that did not come from a Hub."""
    return HubError(f"{endpoint()} does not answer like a Hub", hint="check HF_ENDPOINT and proxies")


def causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _later(writing: bool) -> str:
    return f"{_nothing(writing)}check the network and {AGAIN}"


def _explain_builtin(error: BaseException, *, repo_id: str, writing: bool) -> FactoryError | None:
    """Explain errors without a response: xet's, LFS's `ValueError`, a truncated download, a full disk."""
    text = str(error)
    reason = no_room(error)
    if reason:
        return DiskSpaceError(
            f"{reason}: {_line(text)}", hint=f"{_nothing(writing)}free some space and {AGAIN}"
        )
    if text.startswith("LFS batch API"):
        return HubError(
            f"the Hub refuses a file for {repo_id}: {_line(text.partition(chr(10))[2])}",
            hint="nothing was published; the file may be too large, or your quota used up",
        )
    if text.startswith(CUT_SHORT):
        return HubError(f"a download from {repo_id} was cut short", hint=f"{AGAIN}: finished files are kept")
    if isinstance(error, ConnectionError | RuntimeError | EntryNotFoundError) and not isinstance(
        error, RecursionError
    ):
        status = re.search(r"\(([45]\d\d) [A-Z]", text)  # xet: "… client error (403 Forbidden), domain: …"
        if status:
            return _by_status(int(status[1]), "", repo_id=repo_id, writing=writing)
        return HubError(f"the transfer with {repo_id} failed: {_line(text)}", hint=_later(writing))
    if isinstance(error, STRANGE):
        return no_hub()
    if isinstance(error, (*STUMBLES, ValueError)):  # the client's error over an answer, or our own bug
        return None if stumbled_in(error, CLIENT).startswith(("factory", OF_CARDS)) else no_hub()
    return None


def _explain_answer(error: HfHubHTTPError, *, repo_id: str, revision: str | None, writing: bool) -> HubError:
    """Explain an error that the Hub itself sent."""
    page = _page(error.response.url, repo_id)
    message = error.server_message or ""
    refused_token = "credentials" in (error.response.headers.get("X-Error-Message") or "")
    if isinstance(error, GatedRepoError):
        return HubError(
            f"{repo_id} is gated, and your account has not been given access",
            hint=f"accept its terms at {page}, then run `hf auth login`",
        )
    if isinstance(error, RevisionNotFoundError):
        return HubError(
            f"{repo_id} has no revision {revision or 'main'!r}", hint=f"see its commits: {page}/commits"
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return HubError(f"{repo_id} lacks {error.response.url.path.rsplit('/', 1)[-1]}", hint=f"see {page}")
    if isinstance(error, DisabledRepoError):
        return HubError(f"{repo_id} has been disabled by the Hub or its owner", hint=f"see {page}")
    if error.response.status_code == 401 and refused_token:
        return _bad_token(writing)
    if isinstance(error, RepositoryNotFoundError) or (error.response.status_code == 401 and not writing):
        access = "a token with read access" if get_token() else "`hf auth login` first"
        return HubError(
            f"there is no repository {repo_id} that you can see",
            hint=f"{_nothing(writing)}check the name; a private one needs {access}",
        )
    retry = error.response.headers.get("Retry-After", "")
    wait = f"{retry} s" if retry.isdigit() else ""
    return _by_status(error.response.status_code, _line(message), repo_id=repo_id, writing=writing, wait=wait)


def _page(requested: httpx2.URL, repo_id: str) -> str:
    """Return the URL of a repository's page, with the repository type of the requested URL."""
    path = requested.path.removeprefix(httpx2.URL(constants.ENDPOINT).path.rstrip("/"))
    kind = re.match(r"(?:/api)?(/datasets|/spaces)/", path)
    return f"{endpoint()}{kind[1] if kind else ''}/{repo_id}"


def _nothing(writing: bool) -> str:
    return "nothing was published; " if writing else ""


def _bad_token(writing: bool) -> HubError:
    return HubError(
        "the Hub does not accept your token",
        hint=f"{_nothing(writing)}run `hf auth login` (HF_TOKEN, if set, overrides it)",
    )


def _by_status(status: int, message: str, *, repo_id: str, writing: bool, wait: str = "") -> HubError:
    """Explain an error by its status code alone."""
    reason = f": {message}" if message else ""
    nothing = _nothing(writing)
    if status == 401:
        return _bad_token(writing)
    if status == 403 and writing:
        return HubError(
            f"your token may not write to {repo_id}{reason}",
            hint=f"nothing was published; create one with write access at {endpoint()}/settings/tokens",
        )
    if status == 403:
        return HubError(f"the Hub denies access to {repo_id}{reason}", hint="use a token with read access")
    if status in (402, 413):
        return HubError(
            f"the Hub has no room for {repo_id} ({status}){reason}",
            hint=f"{nothing}see {endpoint()}/settings/billing, or publish publicly",
        )
    if status == 409 and writing:
        return HubError(f"another client is changing {repo_id} (409){reason}", hint=f"{nothing}{AGAIN}")
    if status == 412 and writing:
        return HubError(
            f"{repo_id} received another commit in the meantime",
            hint=f"{nothing}look at {endpoint()}/{repo_id}, then {AGAIN}",
        )
    if status == 429:
        return HubError(
            "too many requests to the Hub (429)", hint=f"{nothing}wait {wait or 'a while'} and {AGAIN}"
        )
    if status >= 500:
        return HubError(f"the Hub returned an error ({status})", hint=f"{nothing}{AGAIN} later")
    return HubError(
        f"the Hub refused a request about {repo_id} ({status}){reason}",
        hint=f"{nothing}look at {endpoint()}/{repo_id}, then {AGAIN}",
    )


def _line(text: object) -> str:
    """Return a text as one line of at most 200 characters, without anything that could be a token."""
    line = _without_password(" ".join(str(text).split()))
    token = get_token()
    if token:
        line = line.replace(token, "…")
    return re.sub(r"\bhf_\w+", "hf_…", line)[:200]
