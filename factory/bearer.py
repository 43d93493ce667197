"""The token's way: to the Hub's own origin and nowhere else, whatever request the client makes."""

from collections.abc import Callable

import httpx2
from huggingface_hub import constants, set_async_client_factory, set_client_factory
from huggingface_hub.utils import parse_xet_file_data_from_response  # type: ignore[attr-defined]
from huggingface_hub.utils._http import default_async_client_factory, default_client_factory

SECRETS = ("Authorization", "Cookie")
XET_HASH = constants.HUGGINGFACE_HEADER_X_XET_HASH


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
