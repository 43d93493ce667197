"""Files of a folder: all that they hold, and one with a bit flipped."""

from pathlib import Path


def content_of(folder: Path) -> dict[str, bytes]:
    """Path in the folder → content, of each file below it."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # it may share its bytes with another folder
    path.write_bytes(content)
