"""This installation as files for another machine: a wheel, and the versions of its libraries."""

import base64
import hashlib
import io
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, distributions
from importlib.util import find_spec

from packaging.utils import canonicalize_name

from factory import __version__
from factory.errors import StoreError
from factory.resources import PACKAGE

BESIDE = ("model_cards", "spaces")  # `_resources` in a wheel, next to the package in a repository
DISTRIBUTION = "hf-factory"
WHEEL = f"hf_factory-{__version__}-py3-none-any.whl"
REQUIREMENTS = "requirements.txt"
VLLM = "vllm>=0.33"  # or uv would fall back to old versions that pin no torch
EARLIEST = (1980, 1, 1, 0, 0, 0)  # of a zip file; makes equal installations give equal bytes


def program(*, with_vllm: bool = False) -> dict[str, bytes]:
    """Return file name → content of the program, for uv's `--with WHEEL --with-requirements FILE`.

    Libraries are pinned to the versions installed here, without local parts such as `+cpu`: another machine
    needs another build of the same version. If vLLM is not installed here, it brings the versions that it
    needs, since each of its versions asks for one of torch.

    Raises:
        StoreError: The program is not installed.
    """
    try:
        metadata = str(distribution(DISTRIBUTION).metadata).encode()
    except PackageNotFoundError as error:
        raise StoreError(
            f"{DISTRIBUTION} is not installed", hint="in a clone of the repository: pip install ."
        ) from error
    pins = {
        f"{package.name}=={package.version.partition('+')[0]}"
        for package in distributions()
        if canonicalize_name(package.name) != DISTRIBUTION
    }
    requirements = b"-c constraints.txt\n"  # uv reads constraints only from a requirements file
    if with_vllm:
        requirements = requirements + b"vllm\n" if find_spec("vllm") else f"{VLLM}\n".encode()
    return {
        WHEEL: _wheel(metadata),
        "constraints.txt": "\n".join([*sorted(pins, key=str.lower), ""]).encode(),
        REQUIREMENTS: requirements,
    }


def _wheel(metadata: bytes) -> bytes:
    """Return the package as a wheel (packaging.python.org, binary distribution format).

    Built by hand until the program is on an index: an installation holds no sources to build from, and a
    job must run what runs here. After a release, `hf-factory==VERSION` replaces it.
    """
    info = f"hf_factory-{__version__}.dist-info"
    files = _files()
    files[f"{info}/METADATA"] = metadata
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: factory\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files[f"{info}/entry_points.txt"] = b"[console_scripts]\nfactory = factory.__main__:main\n"
    record = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(zipfile.ZipInfo(name, EARLIEST), data)
    return made.getvalue()


def _files() -> dict[str, bytes]:
    """Return path in the wheel → content, sorted."""
    found = {path: f"factory/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*")}
    for folder in BESIDE:
        beside = PACKAGE.parent / folder
        if not (PACKAGE / "_resources").is_dir():
            resources = {
                p: f"factory/_resources/{folder}/{p.relative_to(beside).as_posix()}"
                for p in beside.rglob("*")
            }
            found |= resources
    kept = {name: path for path, name in found.items() if path.is_file() and "__pycache__" not in path.parts}
    return {name: kept[name].read_bytes() for name in sorted(kept)}


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
