"""The token's way: to the Hub's own origin and nowhere else, whatever request the client makes."""

import httpx2
from huggingface_hub import constants, set_async_client_factory, set_client_factory
from huggingface_hub.utils import parse_xet_file_data_from_response  # type: ignore[attr-defined]
from huggingface_hub.utils._http import default_async_client_factory, default_client_factory

SECRETS = ("Authorization", "Cookie")
XET_HASH = constants.HUGGINGFACE_HEADER_X_XET_HASH


def is_hub(url: httpx2.URL) -> bool:
    """Whether an address is the Hub's: the same scheme, host and port."""
    hub = httpx2.URL(constants.ENDPOINT)
    return (url.scheme, url.host, url.port) == (hub.scheme, hub.host, hub.port)


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


async def _keep_token(request: httpx2.Request) -> None:
    keep_token(request)


def _client() -> httpx2.Client:
    client = default_client_factory()
    client.event_hooks["request"].append(keep_token)
    client.event_hooks["response"].append(keep_refresh)
    return client


def _async_client() -> httpx2.AsyncClient:
    client = default_async_client_factory()
    client.event_hooks["request"].append(_keep_token)
    return client


def guard_token() -> None:
    """Have every client that huggingface_hub makes in this process keep the token to the Hub."""
    set_client_factory(_client)
    set_async_client_factory(_async_client)
