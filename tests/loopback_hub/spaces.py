"""Routes of Spaces: what creating one costs, variables, secrets, hardware."""

import json
from typing import Any

from starlette.responses import JSONResponse, Response

from tests.loopback_hub.app import Application, Refusal, Request, route
from tests.loopback_hub.storage import Storage

SPACE = r"/api/spaces/(?P<repo>[^/]+/[^/]+)"
FREE_ZERO_GPUS = 2  # an account
FREE_HARDWARE = ("cpu-basic", "zero-a10g")


def check_payment(storage: Storage, owner: str, fields: dict[str, Any]) -> None:
    """Refuse a Space that an account without a subscription may not have.

    Static Spaces are free, and so are two on ZeroGPU; a program on the free CPU is not.
    """
    if owner in storage.paying or fields.get("sdk") == "static":
        return
    spaces = [
        r
        for (kind, name), r in storage.repositories.items()
        if (kind, name.split("/")[0]) == ("space", owner)
    ]
    zero = sum(space.fields.get("hardware") == "zero-a10g" for space in spaces)
    if fields.get("hardware") != "zero-a10g" or zero >= FREE_ZERO_GPUS:
        raise Refusal(402, "A PRO subscription is required to host this Space.")


@route("GET", SPACE + "/variables")
@route("POST", SPACE + "/variables")
@route("DELETE", SPACE + "/variables")
def variables(app: Application, request: Request, repo: str) -> Response:
    return JSONResponse(_keep(app, request, repo, "variables"))


@route("GET", SPACE + "/secrets")
@route("POST", SPACE + "/secrets")
@route("DELETE", SPACE + "/secrets")
def secrets(app: Application, request: Request, repo: str) -> Response:
    """Values go in and never come out."""
    kept = _keep(app, request, repo, "secrets")
    return JSONResponse({key: {"description": entry["description"]} for key, entry in kept.items()})


def _keep(app: Application, request: Request, repo: str, name: str) -> dict[str, dict[str, Any]]:
    fields = app.writable(request, "space", repo).fields
    kept = fields.get(name, {})
    if isinstance(kept, list):  # as the creation gave them
        kept = {entry["key"]: {"value": entry["value"], "description": None} for entry in kept}
    fields[name] = kept
    if request.method != "GET":
        asked = json.loads(request.body)
        kept.pop(asked["key"], None)
        if request.method == "POST":
            kept[asked["key"]] = {"value": asked["value"], "description": asked.get("description")}
    return dict(kept)


@route("GET", SPACE + "/runtime")
def runtime(app: Application, request: Request, repo: str) -> Response:
    hardware = app.readable(request, "space", repo).fields.get("hardware", "cpu-basic")
    return JSONResponse({"stage": "RUNNING", "hardware": {"current": hardware, "requested": hardware}})


@route("POST", SPACE + "/hardware")
def set_hardware(app: Application, request: Request, repo: str) -> Response:
    fields = app.writable(request, "space", repo).fields
    flavor = json.loads(request.body)["flavor"]
    if flavor not in FREE_HARDWARE and repo.split("/")[0] not in app.storage.paying:
        raise Refusal(402, "Add a payment method to use this hardware.")
    fields["hardware"] = flavor
    return runtime(app, request, repo)
