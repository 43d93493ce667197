"""Safetensors on disk: headers, streamed copy, renaming, sharding; never the whole model in memory."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from factory.artifacts import sha256_of_file
from factory.disk import no_room, size
from factory.errors import CheckpointError, DiskSpaceError
from factory.header import DTYPE_BITS, TensorInfo, check_count, damaged, read_header, unique_keys
from factory.json_bounds import WEIGHTS_INDEX, check_json
from factory.legal import LICENSE_FOLDER, is_legal
from factory.transfer import assemble, read_blocks

__all__ = [
    "WEIGHTS_INDEX",
    "TensorInfo",
    "are_equal",
    "auxiliary_files",
    "copy_auxiliary_files",
    "is_auxiliary",
    "is_shard_name",
    "names_in",
    "read_checkpoint",
    "read_header",
    "read_tensor_bytes",
    "sha256_of_files",
    "write_checkpoint",
]

WEIGHTS = "model.safetensors"
SHARD_NAME = re.compile(r"[^/\\:]+\.safetensors")
SHARED_BLOB = re.compile("[0-9a-f]{64}")  # of the Hub's cache
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
AUXILIARY = (
    "tokenizer*.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken",
    "tekken.json",
    "preprocessor_config.json", "processor_config.json", "generation_config.json",
    "chat_template.*", "additional_chat_templates/*.jinja",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
# Of tokenizer_config.json: transformers writes them and does without them.
LOCAL_PATHS = {"name_or_path", "tokenizer_file", "special_tokens_map_file"}

Transform = Callable[[str, TensorInfo], Iterable[bytes | memoryview] | None]
Progress = Callable[[int, int], None]


# Reading -----------------------------------------------------------------------------------------


def read_checkpoint(folder: Path) -> dict[str, TensorInfo]:
    """Tensors of `model.safetensors`, or of all shards that its index names, in the order of their bytes.

    Links are followed (the Hub's cache is made of them), but the index may name files of this folder only.

    Raises:
        CheckpointError: No safetensors, a missing or damaged shard, an index that disagrees with the shards.
    """
    if (folder / WEIGHTS).exists():
        return read_header(folder / WEIGHTS)
    if not (folder / WEIGHTS_INDEX).exists():
        raise _no_weights(folder)
    weight_map = _read_index(folder / WEIGHTS_INDEX)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        for name, tensor in read_header(folder / shard).items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name!r} is in {tensors[name].file.name} and in {shard}",
                    hint="the checkpoint mixes two saves; download it again",
                )
            tensors[name] = tensor
        check_count(len(tensors), where=folder.name)
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(
                f"{WEIGHTS_INDEX} promises tensor {name!r} in {shard}, which lacks it",
                hint="the checkpoint is incomplete; download it again",
            )
    return tensors


def is_shard_name(name: object) -> bool:
    """Whether an index may say this: a safetensors file that lies beside it."""
    return isinstance(name, str) and name.isprintable() and bool(SHARD_NAME.fullmatch(name))


def read_tensor_bytes(tensor: TensorInfo) -> bytearray:
    """Values of one tensor, little-endian and row-major, as stored.

    Raises:
        CheckpointError: The file is gone or has been cut since its header was read.
    """
    values = bytearray(tensor.size_bytes)
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.start)
            count = file.readinto(values)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {tensor.file}: {error.strerror}", hint="has the folder changed during the build?"
        ) from error
    if count != tensor.size_bytes:
        raise damaged(tensor.file, f"ends inside tensor {tensor.name!r}")
    return values


def are_equal(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two stored tensors are the same: type, shape and every byte, read a block at a time.

    Raises:
        CheckpointError: A file has been cut since its header was read.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    blocks = zip(read_blocks(one), read_blocks(other), strict=True)
    return all(mine == theirs for mine, theirs in blocks)


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder} has only pickled weights ({', '.join(pickles[:4])}), which can run code when read",
            hint="convert them with transformers' save_pretrained, or choose a repository with safetensors",
        )
    return CheckpointError(
        f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}", hint="give a folder with safetensors weights"
    )


def _read_index(path: Path) -> dict[str, str]:
    check_json(path.parent, [path.name])
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"not JSON: {str(error)[:200]}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(path, "it has no weight_map")
    for name, shard in weight_map.items():
        if not is_shard_name(shard):
            raise CheckpointError(
                f"{path.name} puts tensor {name!r} into {str(shard)[:80]!r}, no safetensors file beside it",
                hint="do not use this checkpoint unless you trust where it comes from",
            )
    return weight_map


# Writing -----------------------------------------------------------------------------------------


def write_checkpoint(
    tensors: Iterable[tuple[str, TensorInfo]],
    *,
    folder: Path,
    max_shard_bytes: int = 5 * 10**9,
    transform: Transform | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Copy tensors, under new names, into one file or shards with an index; equal input, equal bytes.

    Nothing larger than a block is held in memory, save what `transform` returns. Tensors keep the order of
    the source files, so that both sides are read and written in order. Syncing to the disk is left to
    whoever gives the folder its final name.

    Args:
        tensors: Pairs (new name, where its values lie).
        folder: Exists; weight files that an earlier attempt left in it are removed first.
        max_shard_bytes: A larger checkpoint is split; a single tensor never is.
        transform: Gives the new values of a tensor in parts, as many bytes as before, or None to copy it.
        metadata: Of each file's header; {"format": "pt"} where None.
        progress: Called with (bytes done, bytes in all).

    Returns:
        Weight file name → sha256. The index, where there is one, lies beside them and is not listed.

    Raises:
        CheckpointError: Two tensors with one name, a source that changed, a transform of another size.
        DiskSpaceError: The disk is full.
    """
    shards = _plan_shards(list(tensors), max_shard_bytes=max_shard_bytes)
    _clear_weights(folder, sources={tensor.file for shard in shards for _, tensor in shard})
    total_bytes = sum(tensor.size_bytes for shard in shards for _, tensor in shard)
    done_bytes = 0
    weight_map: dict[str, str] = {}
    sums: dict[str, str] = {}

    def tell(count: int) -> None:
        nonlocal done_bytes
        done_bytes += count
        if progress:
            progress(done_bytes, total_bytes)

    with _disk_errors(folder, total_bytes):
        for number, shard in enumerate(shards, start=1):
            name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            header = _header(shard, metadata={"format": "pt"} if metadata is None else metadata)
            parts = _parts(shard, transform=transform)
            sums[name] = assemble(folder / name, parts, header=header, progress=tell)
            weight_map.update((tensor, name) for tensor, _ in shard)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sums


def sha256_of_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """File name → sha256, several files at a time."""
    names = list(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: sha256_of_file(folder / name), names), strict=True))


def _plan_shards(
    tensors: list[tuple[str, TensorInfo]], *, max_shard_bytes: int
) -> list[list[tuple[str, TensorInfo]]]:
    for name, count in Counter(name for name, _ in tensors).items():
        if count > 1:
            raise CheckpointError(f"{count} tensors would be named {name!r}", hint="please report this bug")
    shards: list[list[tuple[str, TensorInfo]]] = [[]]
    size_bytes = 0
    for name, tensor in sorted(tensors, key=lambda pair: (pair[1].file, pair[1].start, pair[1].end, pair[0])):
        if shards[-1] and size_bytes + tensor.size_bytes > max_shard_bytes:
            shards.append([])
            size_bytes = 0
        shards[-1].append((name, tensor))
        size_bytes += tensor.size_bytes
    for shard in shards:  # wider types first keeps every tensor aligned to its type, which torch asks for
        shard.sort(key=lambda pair: -DTYPE_BITS[pair[1].dtype])
    return shards


def _clear_weights(folder: Path, *, sources: set[Path]) -> None:
    if any(file.parent.resolve() == folder.resolve() for file in sources):
        raise CheckpointError(f"{folder} holds the source's weights", hint="give another output folder")
    for path in folder.glob("model*.safetensors*"):
        path.unlink()


@contextmanager
def _disk_errors(folder: Path, total_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = no_room(error)
        if reason is None:
            raise
        free_bytes = shutil.disk_usage(folder).free
        raise DiskSpaceError(
            f"{reason}: {size(total_bytes)} to write to {folder}, {size(free_bytes)} free",
            hint="free some space, or give a folder on another disk, and run the same command again",
        ) from error


def _header(shard: list[tuple[str, TensorInfo]], *, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in shard:
        end = position + tensor.size_bytes
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parts(
    shard: list[tuple[str, TensorInfo]], *, transform: Transform | None
) -> Iterator[TensorInfo | memoryview]:
    """What follows the header of one file, in order."""
    for name, tensor in shard:
        values = transform(name, tensor) if transform else None
        if values is None:
            yield tensor
            continue
        size_bytes = 0
        for part in values:
            size_bytes += len(part)
            yield memoryview(part)
        if size_bytes != tensor.size_bytes:
            raise CheckpointError(
                f"{name!r} was given {size_bytes} bytes for {tensor.size_bytes}",
                hint="please report this bug",
            )


# Beside the weights ------------------------------------------------------------------------------


def is_auxiliary(name: str, size_bytes: int) -> bool:
    """Whether a file of this name goes along with the weights, in a folder as on the Hub."""
    if is_legal(name, size_bytes):
        return True
    return any(fnmatchcase(name, p) and name.count("/") == p.count("/") for p in AUXILIARY)


def names_in(folder: Path) -> list[str]:
    """Files of a model's folder and of the folders in it that may hold a part of it, sorted."""
    inner = [p for p in folder.glob("*") if p.name == TEMPLATES or LICENSE_FOLDER.fullmatch(p.name)]
    folders = [folder, *filter(Path.is_dir, inner)]
    files = [path for each in folders for path in each.glob("*") if path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in files)


def auxiliary_files(folder: Path) -> dict[str, Path]:
    """Tokenizer, generation settings, chat templates and licence texts: name → the file itself.

    A link is followed only within the folder or into the blobs of the Hub's cache: these files are copied
    into what gets published.

    Raises:
        CheckpointError: A file is a link to somewhere else.
    """
    found = {}
    for name in names_in(folder):
        if not is_auxiliary(name, (folder / name).stat().st_size):
            continue
        target = (folder / name).resolve()
        if folder.resolve() not in target.parents and not _in_hub_cache(target, folder):
            raise CheckpointError(
                f"{name} is a link to {target}, outside the model's folder",
                hint="put the file itself there",
            )
        found[name] = target
    return found


def copy_auxiliary_files(source_folder: Path, folder: Path) -> list[str]:
    """Copy what `auxiliary_files` finds; returns the names, sorted.

    Left behind: code (`*.py`), the card, other weights, whatever training left; of a tokenizer's settings,
    the paths of the machine that saved it.

    Raises:
        CheckpointError: A file is a link to somewhere else.
    """
    found = auxiliary_files(source_folder)
    for name, target in found.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(target, folder / name)
    if "tokenizer_config.json" in found:
        _drop_local_paths(folder / "tokenizer_config.json")
    return sorted(found)


def _drop_local_paths(path: Path) -> None:
    """Take the places it was loaded from out of a tokenizer's settings; without any, leave the bytes."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return  # what is damaged is told by whoever loads it
    if isinstance(settings, dict) and LOCAL_PATHS & settings.keys():
        rest = {key: value for key, value in settings.items() if key not in LOCAL_PATHS}
        path.write_text(json.dumps(rest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _in_hub_cache(target: Path, folder: Path) -> bool:
    """Whether the target is a blob of the repository whose snapshot the folder is.

    cache/models--owner--name/snapshots/<commit> holds links to cache/models--owner--name/blobs/<etag>, and
    these may be links into the store of all repositories, cache/blobs/<2 hex>/<64 hex>.
    """
    snapshots = folder.resolve().parent
    repository, cache = snapshots.parent, snapshots.parent.parent
    if snapshots.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    if target.parent == repository / "blobs":
        return True
    return bool(SHARED_BLOB.fullmatch(target.name)) and target.parent == cache / "blobs" / target.name[:2]
