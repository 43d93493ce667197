"""Chat templates, rendered in a separate process: a template is a program, which may never end."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

try:
    import resource
except ImportError:  # on Windows, nothing limits a template
    resource = None  # type: ignore[assignment]

SECONDS = 2  # of CPU time per rendering; real templates take milliseconds
MEMORY_BYTES = 2**28  # beyond what the process needs for itself
MAX_CHARACTERS = 2**20  # far more than any prompt within the limit

# What a template can raise besides jinja2's errors; the Python that jinja2 generates may be invalid.
FAILURES = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError,
    ValueError,
)  # fmt: skip

_lock = Lock()
_worker: tuple[int, subprocess.Popen[str]] | None = None  # process id of its parent, and the worker


class TemplateError(Exception):
    """A chat template failed or exceeded its limits."""


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """Render a conversation with the tokenizer's template, up to the beginning of the reply.

    Raises:
        TemplateError: The template failed or exceeded its limits.
    """
    names = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    request = {"template": tokenizer.get_chat_template(), "messages": list(messages), "names": names}
    with _lock:
        worker = _process()
        try:
            print(json.dumps(request), file=worker.stdin, flush=True)
            line = worker.stdout.readline() if worker.stdout else ""
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):  # the worker ended, maybe in the middle of its answer
            worker.kill()
            worker.wait()
            raise TemplateError(f"its chat template takes over {SECONDS} s, or {MEMORY_BYTES // 2**20} MB")
    reply = json.loads(line)
    if "error" in reply:
        raise TemplateError(reply["error"])
    return str(reply["text"])


def _process() -> "subprocess.Popen[str]":
    """Return the worker; start a new one if it ended, or if this process is a fork (ZeroGPU)."""
    global _worker
    if _worker is None or _worker[0] != os.getpid() or _worker[1].poll() is not None:
        command = [sys.executable, __file__]
        pipe = subprocess.PIPE
        _worker = os.getpid(), subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, encoding="utf-8")
    return _worker[1]


# In the worker ------------------------------------------------------------------------------------


def serve() -> None:
    """Answer each line of standard input until it ends; a template beyond its limits ends the process."""
    from jinja2 import TemplateError as JinjaError
    from transformers.utils.chat_template_utils import render_jinja_template

    _bound_memory()
    for line in sys.stdin:
        request = json.loads(line)
        _bound_time()
        try:
            (text,), _ = render_jinja_template(
                conversations=[request["messages"]],
                chat_template=request["template"],
                add_generation_prompt=True,
                **request["names"],
            )
            reply = {"text": text}
            if len(text) > MAX_CHARACTERS:
                reply = {"error": f"its chat template makes {len(text):,} characters of this conversation"}
        except (JinjaError, *FAILURES) as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:300]}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


def _bound_memory() -> None:
    statm = Path("/proc/self/statm")
    if resource and statm.is_file():
        taken = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, resource.RLIM_INFINITY))


def _bound_time() -> None:
    if resource:
        spent = int(time.process_time()) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, resource.RLIM_INFINITY))


if __name__ == "__main__":
    serve()
