"""Read the header of one safetensors file, which may be hostile: where each tensor is stored."""

import json
import os
import re
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from factory.errors import UNTRUSTED, CheckpointError

MAX_HEADER_BYTES = 2**24  # a header of 90,000 tensors, the most of any known model, takes 13 MB
MAX_TENSORS = 300_000  # in all files of a model
# A tensor's entry takes at least this many bytes per object and per name. JSON with more of them is not a
# list of tensors, and takes up to 40 times its length as Python objects.
BYTES_AN_OBJECT, BYTES_A_NAME = 16, 12
SPARE_BYTES = 2**20  # for JSON within the metadata
MAX_DIMENSIONS = 64  # torch's limit
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can contain lone ones
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Location of one stored tensor; `start` and `end` are byte offsets from the beginning of the file."""

    name: str
    dtype: str  # safetensors' name: "BF16"
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def num_elements(self) -> int:
        """Return the product of the shape; 1 for a scalar."""
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Return the size of the values in bytes."""
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file, in the order of their bytes, without reading values.

    As strict as the safetensors library: a gap between tensors could hide data, an overlap could alias it.

    Raises:
        CheckpointError: The file is unreadable, truncated or malformed.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its other end
            raise damaged(path, "it is not a regular file")
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            length = header_length(path, file.read(8), size_bytes=size_bytes)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}", hint="is the download complete?"
        ) from error
    return parse_header(path, raw, data_start=8 + length, size_bytes=size_bytes)


def parse_header(path: Path, raw: bytes, *, data_start: int, size_bytes: int) -> dict[str, TensorInfo]:
    """Return the tensors that a header describes, in the order of their bytes.

    Args:
        path: File that the header belongs to.
        raw: The header's JSON.
        data_start: Offset of the values in the file.
        size_bytes: Size of the file.

    Raises:
        CheckpointError: As for `read_header`.
    """
    entries = _parse_json(path, raw)
    entries.pop("__metadata__", None)
    check_count(len(entries), where=path.name)
    tensors = [_tensor(path, name, entry, data_start=data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_contiguous(path, tensors, data_start=data_start, size_bytes=size_bytes)
    return {tensor.name: tensor for tensor in tensors}


def header_length(path: Path, prefix: bytes, *, size_bytes: int) -> int:
    """Return the length of the header from the first eight bytes of the file.

    Raises:
        CheckpointError: The file is too short, or the header longer than any model's.
    """
    if len(prefix) < 8:
        raise damaged(path, f"only {size_bytes} bytes long")
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise damaged(path, f"its header has {length} bytes, the limit is {MAX_HEADER_BYTES}")
    if 8 + length > size_bytes:
        raise damaged(path, f"its header has {length} bytes, the file {size_bytes}")
    return length


def check_count(count: int, *, where: str) -> None:
    """Refuse more tensors than any model has.

    Raises:
        CheckpointError: There are more.
    """
    if count > MAX_TENSORS:
        raise CheckpointError(
            f"{where} has {count:,} tensors or more; no known model has more than {MAX_TENSORS:,}",
            hint=UNTRUSTED,
        )


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict from JSON pairs, refusing duplicate keys; an `object_pairs_hook`.

    Raises:
        ValueError: A key appears twice.
    """
    mapping: dict[str, Any] = {}
    for name, value in pairs:
        if name in mapping:
            raise ValueError(f"{name!r} appears twice")
        mapping[name] = value
    return mapping


def damaged(path: Path, problem: str) -> CheckpointError:
    """Return the error for a file that violates its format."""
    return CheckpointError(f"{path.name} is damaged: {problem}", hint="download it again")


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    objects, names = raw.count(b"{") + raw.count(b"["), raw.count(b":")
    if max(BYTES_AN_OBJECT * objects, BYTES_A_NAME * names) > len(raw) + SPARE_BYTES:
        raise damaged(path, f"its header of {len(raw)} bytes is not a list of tensors")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its header is not JSON: {str(error)[:200]}") from error
    if not isinstance(header, dict) or raw[:1] != b"{":
        raise damaged(path, f"its header is not a JSON object: it begins with {raw[:20]!r}")
    if any(SURROGATE.search(name) for name in header):
        raise damaged(path, "a tensor's name is not Unicode")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, "__metadata__ must map strings to strings")
    return header


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(path: Path, name: str, entry: object, *, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"tensor {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"tensor {name!r} in {path.name} has the unknown dtype {str(dtype)[:40]!r}",
            hint=f"known: {', '.join(DTYPE_BITS)}",
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise damaged(path, f"tensor {name!r} has the invalid shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise damaged(path, f"tensor {name!r} has the invalid offsets {str(offsets)[:80]}")
    start, end = offsets
    if (end - start) * 8 != prod(shape) * DTYPE_BITS[dtype]:
        raise damaged(path, f"tensor {name!r}, {dtype} {shape}, does not fit bytes {start} to {end}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + start, data_start + end)


def _check_contiguous(path: Path, tensors: list[TensorInfo], *, data_start: int, size_bytes: int) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            raise damaged(path, f"tensor {tensor.name!r} begins at byte {tensor.start}, not at {position}")
        position = tensor.end
    if position != size_bytes:
        raise damaged(path, f"its tensors end at byte {position}, the file at {size_bytes}")
