"""The xet client's local store (`casUrl: local://…`), as the loopback Hub reads it."""

import shutil
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path

import hf_xet

HEADER_SIZE = ENTRY_SIZE = 48
END = b"\xff" * 32


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 → xet hash of every file in the store, from its shards.

    A shard is a 48-byte header and, for each file, a 48-byte record (hash, flags, number of entries),
    that many entries, as many verification entries (flag bit 31) and the sha256 (flag bit 30).
    """
    found: dict[str, str] = {}
    for shard in (folder / "xet" / "xorbs" / "shards").glob("*.mdb"):
        data = shard.read_bytes()
        offset = HEADER_SIZE
        while (file_hash := data[offset : offset + 32]) != END:
            flags, num_entries = struct.unpack_from("<II", data, offset + 32)
            offset += ENTRY_SIZE * (1 + num_entries * (1 + (flags >> 31 & 1)))
            if flags >> 30 & 1:
                found[_hex(data[offset : offset + 32])] = _hex(file_hash)
                offset += ENTRY_SIZE
    return found


def file_sizes(folder: Path) -> dict[str, int]:
    """xet hash → bytes of every file in the store; an entry has its own bytes at offset 36."""
    found: dict[str, int] = {}
    for shard in (folder / "xet" / "xorbs" / "shards").glob("*.mdb"):
        data = shard.read_bytes()
        offset = HEADER_SIZE
        while (file_hash := data[offset : offset + 32]) != END:
            flags, num_entries = struct.unpack_from("<II", data, offset + 32)
            entries = [offset + ENTRY_SIZE * (1 + i) for i in range(num_entries)]
            found[_hex(file_hash)] = sum(struct.unpack_from("<I", data, at + 36)[0] for at in entries)
            offset += ENTRY_SIZE * (1 + num_entries * (1 + (flags >> 31 & 1)) + (flags >> 30 & 1))
    return found


def write(folder: Path, contents: Iterable[bytes]) -> None:
    """Add files."""
    with hf_xet.XetSession().new_upload_commit(
        endpoint=f"local://{folder}", token="t", token_expiry_unix_secs=2**40, custom_headers={}
    ) as commit:
        for content in contents:
            commit.start_upload_bytes(content, hf_xet.COMPUTE_SHA256)


def read(folder: Path, xet_hash: str, *, size_bytes: int) -> bytes:
    """The bytes of one file."""
    return _read(folder, {xet_hash: size_bytes})[xet_hash]


def read_all(folder: Path) -> dict[str, bytes]:
    """xet hash → bytes of every file in the store."""
    return _read(folder, file_sizes(folder))


def _read(folder: Path, sizes: dict[str, int]) -> dict[str, bytes]:
    """Works on a copy: a store takes one process at a time, and the client may still hold it."""
    with tempfile.TemporaryDirectory() as copy:
        store = Path(copy) / "store"
        shutil.copytree(folder, store)
        with hf_xet.XetSession().new_file_download_group(
            endpoint=f"local://{store}", token="t", token_expiry_unix_secs=2**40, custom_headers={}
        ) as group:
            for xet_hash, size_bytes in sizes.items():
                group.start_download_file(hf_xet.XetFileInfo(xet_hash, size_bytes), f"{copy}/{xet_hash}")
        return {xet_hash: (Path(copy) / xet_hash).read_bytes() for xet_hash in sizes}


def _hex(hash_bytes: bytes) -> str:
    """A hash is written as four little-endian 64-bit words."""
    return "".join(hash_bytes[i : i + 8][::-1].hex() for i in range(0, 32, 8))
