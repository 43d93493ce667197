"""Faults that a test can inject: which requests go wrong, how, and how often."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.responses import Response

FOREVER = 10**9


@dataclass
class Fault:
    """What happens to the next `times` requests that match, once the first `skip` of them have passed.

    `status` answers with that status instead of the route; `drop` closes the connection without an
    answer (both: `after` the route has done its work, or before); `truncate` sends half of the body and
    closes; `short` sends half of the body as if it were all; `corrupt` flips one bit in the middle;
    `meanwhile` is called before the route, which then answers as always.
    """

    method: str  # regular expression, on the whole method
    path: str  # regular expression, searched in the raw path
    status: int | None = None
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    after: bool = False
    truncate: bool = False
    short: bool = False
    corrupt: bool = False
    delay_seconds: float = 0.0
    meanwhile: Callable[[], object] | None = None
    skip: int = 0
    times: int = FOREVER

    def matches(self, method: str, path: str) -> bool:
        """Whether this request is to go wrong; asked once a request."""
        if self.times < 1 or not re.fullmatch(self.method, method) or not re.search(self.path, path):
            return False
        self.skip -= 1
        return self.skip < 0

    def damage(self, response: Response) -> Response:
        """The answer after `short` or `corrupt`; the same answer without them."""
        if not (self.short or self.corrupt):
            return response
        body = bytes(response.body)
        if self.corrupt:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if self.short:
            body = body[: len(body) // 2]
        headers = {k: v for k, v in response.headers.items() if k != "content-length"}
        return Response(body, response.status_code, headers)
