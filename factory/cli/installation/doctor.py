"""`factory doctor`: what this machine has, and what keeps a build from running well."""

import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import click
from packaging.requirements import Requirement
from rich.text import Text

from factory.cli.click_options import CONTEXT, Command, home_option
from factory.cli.console import as_flags, console, print_json, say
from factory.cli.log import PACKAGE
from factory.errors import FactoryError
from factory.units import size

OPTIONAL = {
    "gguf": "`factory export`",
    "llama-cpp-python": "verifying a GGUF",
    "gradio": "`factory space`",
    "vllm": "--eval-backend vllm",
    "trackio": "--report-to trackio",
    "flash-attn": "faster healing on a GPU",
}
MISSING = "not installed"
LITTLE_DISK = 20_000_000_000  # bytes: a 7B model and its stages need more


@dataclass(frozen=True)
class Finding:
    """A fact about this machine, with what is wrong with it, if anything."""

    what: str
    value: str
    problem: str = ""
    hint: str = ""


@click.command(cls=Command, context_settings=CONTEXT)
@home_option
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(home: Path | None, as_json: bool) -> None:
    """Check this machine: versions, GPU, disks.

    The exit code is 1 if something would keep a build from running well.
    """
    found = list(_findings(home))
    if as_json:
        print_json([asdict(finding) for finding in found])
    else:
        out = console()
        for finding in found:
            mark = "✗" if finding.problem else "-" if finding.value.startswith(MISSING) else "✓"
            say(out, finding.value, label=Text(f"{mark} {finding.what:<16} "))
            if finding.problem:
                say(out, as_flags(finding.problem), label="    ")
                say(out, as_flags(finding.hint), label="    hint: ")
    if any(finding.problem for finding in found):
        sys.exit(1)


def _findings(home: Path | None) -> Iterator[Finding]:
    versions = list(_versions())
    yield from versions
    if any(finding.value == MISSING for finding in versions):
        return  # the other checks use these libraries
    yield from _optional()
    yield from _device()
    yield from _disks(home)
    yield _hub()


def _versions() -> Iterator[Finding]:
    yield Finding("Python", f"{platform.python_version()}, {sys.executable}")
    if not _version(PACKAGE):  # run from a folder of its code
        hint = "in a clone of the repository: pip install ."
        yield Finding(PACKAGE, MISSING, "what it needs is not known", hint)
        return
    for line in requires(PACKAGE) or ():
        needed = Requirement(line)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        found = _version(needed.name)
        if not found:
            problem = "this program needs it; the other checks need it too"
            yield Finding(needed.name, MISSING, problem, f"pip install '{needed.name}{needed.specifier}'")
        elif not needed.specifier.contains(found, prereleases=True):
            problem = f"this program needs {needed.specifier}"
            yield Finding(needed.name, found, problem, f"pip install -U '{needed}'")
        else:
            yield Finding(needed.name, found)


def _optional() -> Iterator[Finding]:
    for name, use in OPTIONAL.items():
        yield Finding(name, _version(name) or f"{MISSING}; only for {use}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device() -> Iterator[Finding]:
    import torch

    from factory.model.devices import best_device, device_name, unused_gpu
    from factory.pipeline.costs.requirements import check_four_bit, host_bytes

    device = best_device()
    name = device_name(device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        yield Finding("GPU", f"{torch.cuda.device_count()} × {name}, {size(total)} each")
    elif problem := unused_gpu():
        yield Finding("GPU", "not used", problem, "pytorch.org says which torch uses which GPU")
    else:
        yield Finding("GPU", f"none; {name}")
    try:
        check_four_bit(device)
        yield Finding("4-bit weights", "bitsandbytes quantises here")
    except FactoryError as error:
        yield Finding("4-bit weights", "none", error.message, error.hint)
    yield Finding("memory", f"{size(host_bytes())} in all")


def _disks(home: Path | None) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from factory.store.capacity import demands
    from factory.store.locks import HOME
    from factory.store.store import home_folder

    for what, folder, option in (
        ("stages", home_folder(home), HOME),
        ("Hub's cache", Path(HF_HUB_CACHE), "HF_HOME"),
    ):
        (disk,) = demands([(folder, option, 0)])
        little = disk.free < LITTLE_DISK
        yield Finding(
            what,
            f"{folder}, {size(disk.free)} free",
            f"a 7B model and its stages need more than {size(LITTLE_DISK)}" if little else "",
            f"use another disk with {option}, or free some: factory gc" if little else "",
        )


def _hub() -> Finding:
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    from factory.hub.client import account_name
    from factory.hub.errors import endpoint, hub_errors

    if HF_HUB_OFFLINE:
        return Finding("Hub", "offline, as HF_HUB_OFFLINE says")
    if not get_token():
        return Finding("Hub", f"{endpoint()}, not logged in: public models only; to publish, hf auth login")
    try:
        with hub_errors(endpoint()):
            return Finding("Hub", f"{endpoint()}, logged in as {account_name()}")
    except FactoryError as error:
        return Finding("Hub", endpoint(), error.message, error.hint)
