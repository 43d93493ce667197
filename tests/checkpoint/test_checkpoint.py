"""Safetensors on disk: hostile headers, byte-for-byte copies, shards, what is copied beside them."""

import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from factory.checkpoint.auxiliary import copy_auxiliary_files, is_auxiliary
from factory.checkpoint.header import DTYPE_BITS, TensorInfo, read_header
from factory.checkpoint.read import BLOCK_BYTES, read_checkpoint, read_tensor_bytes, sha256_of_files
from factory.checkpoint.write import write_checkpoint
from factory.errors import CheckpointError, DiskSpaceError
from tests.waiting import HUNG_SECONDS

FILE = "model.safetensors"
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def raw_file(path: Path, header: object, *, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with this header: bytes as they are, anything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.unlink(missing_ok=True)  # faster than cutting it short, which some file systems sync
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# Headers -----------------------------------------------------------------------------------------


def test_a_header_gives_absolute_offsets_in_the_order_of_the_bytes(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "a": torch.ones(4),
        "s": torch.tensor(3),
    }
    save_file(tensors, tmp_path / FILE)
    header = read_header(tmp_path / FILE)
    assert {name: info.shape for name, info in header.items()} == {"b": (2, 3), "a": (4,), "s": ()}
    assert header["b"].dtype == "BF16"
    assert (header["b"].num_elements, header["b"].size_bytes) == (6, 12)
    assert header["s"].num_elements == 1
    content = (tmp_path / FILE).read_bytes()
    for name, info in header.items():
        assert content[info.start : info.end] == tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert bytes(read_tensor_bytes(info)) == content[info.start : info.end]
    starts = [info.start for info in header.values()]
    assert starts == sorted(starts)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_header(tmp_path / FILE)


@pytest.mark.parametrize(("dtype", "size_bytes"), [("F4", 2), ("F6_E2M3", 3), ("F8_E8M0", 4), ("C64", 32)])
def test_packed_and_wide_dtypes_have_their_size(tmp_path: Path, dtype: str, size_bytes: int) -> None:
    path = raw_file(tmp_path / FILE, {"a": entry(dtype, [4], [0, size_bytes])}, data=bytes(size_bytes))
    assert read_header(path)["a"].size_bytes == size_bytes


HOSTILE = {
    "length past the file": ({}, {"length": 10_000}, "10000 bytes, the file"),
    "absurd length": ({}, {"length": 2**63}, "limit is 16777216"),
    "not UTF-8": (b"\xff\xfe{}", {}, "not JSON"),
    "not JSON": (b"{nonsense", {}, "not JSON"),
    "nested beyond reason": (b"[" * 200_000, {}, "not a list of tensors"),
    "nested deeply": (b"[" * 50_000, {}, "not JSON"),
    "an endless number": (b'{"a":' + b"9" * 5000 + b"}", {}, "not JSON"),
    "a list": ([], {}, "not a JSON object"),
    "space before the object": (b" {}", {}, "not a JSON object"),
    "a name twice": (b'{"a":1,"a":2}', {}, "'a' appears twice"),
    "a field twice": (b'{"a":{"dtype":"F32","dtype":"F16"}}', {}, "'dtype' appears twice"),
    "half a character": (b'{"\\ud800":1}', {}, "not Unicode"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, {}, "__metadata__"),
    "metadata as a list": ({"__metadata__": []}, {}, "__metadata__"),
    "an entry that is a number": ({"a": 1}, {}, "must have dtype"),
    "a missing field": ({"a": {"dtype": "F32", "shape": [2]}}, {}, "must have dtype"),
    "a surplus field": ({"a": entry() | {"x": 1}}, {"data": bytes(8)}, "must have dtype"),
    "an unknown dtype": ({"a": entry("F5")}, {"data": bytes(8)}, "unknown dtype 'F5'"),
    "a dtype that is a list": ({"a": entry([])}, {"data": bytes(8)}, "unknown dtype"),  # type: ignore[arg-type]
    "a negative dimension": ({"a": entry("F32", [-2])}, {"data": bytes(8)}, r"shape \[-2\]"),
    "two negative dimensions": ({"a": entry("F32", [-2, -1])}, {"data": bytes(8)}, r"shape \[-2, -1\]"),
    "a true dimension": ({"a": entry("F32", [True, 2])}, {"data": bytes(8)}, "shape"),
    "a fractional dimension": ({"a": entry("F32", [2.0])}, {"data": bytes(8)}, "shape"),
    "a shape that is a text": ({"a": entry("F32", "2")}, {"data": bytes(8)}, "shape"),
    "an overflowing shape": ({"a": entry("F32", [2**62, 8])}, {"data": bytes(8)}, "does not fit"),
    "a thousand dimensions": ({"a": entry("F32", [1] * 1000)}, {"data": bytes(8)}, "shape"),
    "a size that disagrees": ({"a": entry("F32", [3])}, {"data": bytes(8)}, "does not fit bytes 0 to 8"),
    "half a byte": ({"a": entry("F4", [3], [0, 1])}, {"data": bytes(1)}, "does not fit"),
    "offsets in reverse": ({"a": entry("F32", [2], [8, 0])}, {"data": bytes(8)}, "does not fit"),
    "three offsets": ({"a": entry("F32", [2], [0, 8, 8])}, {"data": bytes(8)}, "offsets"),
    "a negative offset": ({"a": entry("F32", [2], [-8, 0])}, {"data": bytes(8)}, "offsets"),
    "bytes past the end": ({"a": entry()}, {"data": bytes(4)}, "end at byte"),
    "bytes that no tensor has": ({"a": entry()}, {"data": bytes(12)}, "end at byte"),
    "a gap": ({"a": entry("F32", [2], [4, 12])}, {"data": bytes(12)}, "begins at byte"),
    "an overlap": (
        {"a": entry(), "b": entry("F32", [2], [4, 12])}, {"data": bytes(12)}, "'b' begins at byte",
    ),
    "one tensor over another": ({"a": entry(), "b": entry()}, {"data": bytes(8)}, "begins at byte"),
}  # fmt: skip


# Reads a header with 256 MB beyond what Python has mapped.
BOUNDED = """
import resource, sys
from pathlib import Path
from factory.errors import CheckpointError
from factory.checkpoint.header import read_header
with open("/proc/self/statm") as file:
    mapped = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**28,) * 2)
try:
    read_header(Path(sys.argv[1]))
except CheckpointError as error:
    print(error.message)
"""
MANY = ",".join(f'"{number:06x}":1' for number in range(1_400_000))


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b'{"a":[' + b"{}," * 10_000_000 + b"1]}", "its header has 30000009 bytes, the limit is 16777216"),
        (b'{"a":[' + b"{}," * 5_000_000 + b"1]}", "is not a list of tensors"),
        (b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}", "is not a list of tensors"),
        (f"{{{MANY}}}".encode(), "is not a list of tensors"),
        (f'{{"__metadata__":{{{MANY}}}}}'.encode(), "is not a list of tensors"),
        (b'{"a":[' + b"1.5," * 4_000_000 + b"1]}", "tensor 'a' must have dtype, shape and data_offsets"),
    ],
    ids=["30 MB", "objects", "nested", "names", "metadata", "numbers"],
)
def test_a_header_takes_no_more_memory_than_a_models(tmp_path: Path, header: bytes, told: str) -> None:
    path = raw_file(tmp_path / FILE, header)
    command = [sys.executable, "-c", BOUNDED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HUNG_SECONDS)
    assert told in done.stdout, done.stderr


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_with_what_is_wrong(tmp_path: Path, case: str) -> None:
    header, options, message = HOSTILE[case]
    with pytest.raises(CheckpointError, match=message):
        read_header(raw_file(tmp_path / FILE, header, **options))


def test_a_file_shorter_than_its_length_field_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"\x01\x02")
    with pytest.raises(CheckpointError, match="only 2 bytes"):
        read_header(tmp_path / FILE)


def test_a_missing_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=FILE):
        read_header(tmp_path / FILE)


def library_reads(path: Path) -> dict[str, tuple[int, ...]] | None:
    """What the safetensors library makes of the file; None where it refuses."""
    try:
        with safe_open(path, "np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError):
        return None


def our_reading(path: Path) -> dict[str, tuple[int, ...]] | None:
    try:
        return {name: info.shape for name, info in read_header(path).items()}
    except CheckpointError:
        return None


ODD = st.sampled_from(
    [None, True, -1, 2**63, 2**65, 1.5, float("nan"), "2", [], [-1], [2**62, 8], {}, {"a": 1}]
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "F5"]) | ODD,
        "shape": st.lists(st.integers(0, 4) | ODD, max_size=3) | ODD,
        "data_offsets": st.lists(st.integers(0, 24) | ODD, min_size=1, max_size=3) | ODD,
    }
)
NAMES = st.sampled_from(["a", "b", "", "\0", "ä", "__metadata__"])
VALID = json.dumps(
    {"a": entry(), "b": entry("BF16", [2, 2], [8, 16]), "__metadata__": {"format": "pt"}}
).encode()


@settings(QUICK, max_examples=1000)
@given(st.dictionaries(NAMES, ENTRIES | ODD, max_size=3), st.integers(0, 32))
def test_any_header_is_read_as_the_library_reads_it_or_refused(
    tmp_path: Path, header: dict[str, Any], num_bytes: int
) -> None:
    path = raw_file(tmp_path / FILE, header, data=bytes(num_bytes))
    ours = our_reading(path)
    assert ours is None or ours == library_reads(path)


@settings(QUICK, max_examples=2000)
@given(
    position=st.integers(0, len(VALID) + 24),
    replacement=st.binary(max_size=2) | st.sampled_from([b"0", b"9", b"-", b'"', b",", b"[", b"]", b"}"]),
    cut=st.integers(0, 40),
)
def test_a_damaged_file_is_read_as_the_library_reads_it_or_refused(
    tmp_path: Path, position: int, replacement: bytes, cut: int
) -> None:
    content = bytearray(raw_file(tmp_path / FILE, VALID, data=bytes(16)).read_bytes())
    content[position : position + len(replacement)] = replacement
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).write_bytes(content[: len(content) - cut] if cut < 20 else content)
    ours = our_reading(tmp_path / FILE)
    assert ours is None or ours == library_reads(tmp_path / FILE)


@settings(QUICK, max_examples=300)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(["F32", "BF16", "U8", "I64"]), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    )
)
def test_whatever_the_library_writes_is_read(
    tmp_path: Path, layout: dict[str, tuple[str, list[int]]]
) -> None:
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8, "I64": torch.int64}
    save_file({name: torch.zeros(shape, dtype=dtypes[dtype]) for name, (dtype, shape) in layout.items()},
              tmp_path / FILE)  # fmt: skip
    header = read_header(tmp_path / FILE)
    assert {name: (info.dtype, list(info.shape)) for name, info in header.items()} == layout


# Folders -----------------------------------------------------------------------------------------


def save_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]], *, index: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index or {"weight_map": weight_map}))
    return folder


def test_all_shards_are_read(tmp_path: Path) -> None:
    save_shards(tmp_path, {"x-1.safetensors": {"a": torch.ones(2)}, "x-2.safetensors": {"b": torch.ones(3)}})
    tensors = read_checkpoint(tmp_path)
    assert {name: info.file.name for name, info in tensors.items()} == {
        "a": "x-1.safetensors",
        "b": "x-2.safetensors",
    }


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "a\\x.safetensors", "C:x.safetensors",
              "x.bin", "..", "", "x\0.safetensors", 3, None, ["x.safetensors"]],
)  # fmt: skip
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, shard: object) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    save_shards(tmp_path / "model", {}, index={"weight_map": {"a": shard}})
    with pytest.raises(CheckpointError, match="beside it"):
        read_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}, 3, "text"])
def test_an_index_without_a_map_is_refused(tmp_path: Path, index: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no weight_map"):
        read_checkpoint(tmp_path)


def test_a_missing_shard_is_an_error_with_its_name(tmp_path: Path) -> None:
    save_shards(tmp_path, {"x-1.safetensors": {"a": torch.ones(2)}, "x-2.safetensors": {"b": torch.ones(2)}})
    (tmp_path / "x-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"x-2\.safetensors"):
        read_checkpoint(tmp_path)


def test_a_tensor_that_the_index_promises_but_no_shard_has_is_an_error(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "x-1.safetensors", "b": "x-1.safetensors"}}
    save_shards(tmp_path, {"x-1.safetensors": {"a": torch.ones(2)}}, index=index)
    with pytest.raises(CheckpointError, match="'b'"):
        read_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_an_error(tmp_path: Path) -> None:
    save_shards(tmp_path, {"x-1.safetensors": {"a": torch.ones(2)},
                           "x-2.safetensors": {"a": torch.ones(2), "b": torch.ones(2)}})  # fmt: skip
    index = {"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'a' is in x-1\.safetensors and in x-2\.safetensors"):
        read_checkpoint(tmp_path)


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        read_checkpoint(tmp_path)


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        read_checkpoint(tmp_path)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "etag")
    (snapshot / FILE).symlink_to("../../blobs/etag")
    assert list(read_checkpoint(snapshot)) == ["a"]


# Writing -----------------------------------------------------------------------------------------


def some_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Two shards of mixed dtypes, odd sizes and an empty tensor."""
    torch.manual_seed(0)
    first = {f"layers.{i}.w": torch.randn(5, 7).to(torch.bfloat16) for i in range(6)}
    first |= {
        "mask": torch.arange(13, dtype=torch.uint8),
        "scalar": torch.tensor(1.5),
        "none": torch.ones(0, 3),
    }
    second = {f"layers.{i}.w": torch.randn(3, 11) for i in range(6, 12)}
    save_shards(folder, {"s-1.safetensors": first, "s-2.safetensors": second})
    return first | second


def written(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@settings(QUICK, max_examples=25)
@given(st.data())
def test_any_choice_of_tensors_is_copied_byte_for_byte(tmp_path: Path, data: st.DataObject) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    values = some_tensors(source)
    tensors = read_checkpoint(source)
    chosen = data.draw(st.lists(st.sampled_from(sorted(tensors)), unique=True, min_size=1))
    max_shard_bytes = data.draw(st.sampled_from([1, 64, 200, 10**9]))
    target.mkdir(exist_ok=True)
    files = write_checkpoint(
        [(f"new.{name}", tensors[name]) for name in chosen], folder=target, max_shard_bytes=max_shard_bytes
    )
    result = written(target)
    assert result.keys() == {f"new.{name}" for name in chosen}
    assert all(torch.equal(result[f"new.{name}"], values[name]) for name in chosen)
    assert sorted(files) == sorted(path.name for path in target.glob("*.safetensors"))
    assert files == {name: hashlib.sha256((target / name).read_bytes()).hexdigest() for name in files}
    assert sha256_of_files(target, files) == files
    again = read_checkpoint(target)
    assert sum(info.size_bytes for info in again.values()) == sum(tensors[name].size_bytes for name in chosen)


def write(folder: Path, sizes: list[int], *, max_shard_bytes: int) -> Path:
    source, target = folder / "source", folder / "target"
    source.mkdir()
    target.mkdir()
    save_file(
        {f"t{i:02d}": torch.ones(size, dtype=torch.uint8) for i, size in enumerate(sizes)}, source / FILE
    )
    write_checkpoint(read_checkpoint(source).items(), folder=target, max_shard_bytes=max_shard_bytes)
    return target


def test_a_checkpoint_of_exactly_one_shard_has_no_index(tmp_path: Path) -> None:
    target = write(tmp_path, [50, 50], max_shard_bytes=100)
    assert [path.name for path in target.iterdir()] == [FILE]


def test_one_byte_more_makes_two_shards_and_an_index(tmp_path: Path) -> None:
    target = write(tmp_path, [50, 51], max_shard_bytes=100)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert sorted(path.name for path in target.iterdir()) == [first, second, "model.safetensors.index.json"]
    assert json.loads((target / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 101},
        "weight_map": {"t00": first, "t01": second},
    }


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path: Path) -> None:
    target = write(tmp_path, [10, 500, 10], max_shard_bytes=100)
    tensors = read_checkpoint(target)
    assert [tensors[name].file.name[6:11] for name in ("t00", "t01", "t02")] == ["00001", "00002", "00003"]


def test_the_data_begins_at_a_multiple_of_eight_and_the_file_says_pt(tmp_path: Path) -> None:
    target = write(tmp_path, [3, 5], max_shard_bytes=100)
    assert min(info.start for info in read_checkpoint(target).values()) % 8 == 0
    with safe_open(target / FILE, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_stay_aligned_to_their_type_in_a_file_that_mixes_types(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    header = {
        "odd": entry("U8", [3], [0, 3]),
        "w": entry("F32", [2], [3, 11]),
        "h": entry("BF16", [1], [11, 13]),
    }
    raw_file(source / FILE, header, data=bytes(range(13)))
    tensors = read_checkpoint(source)
    write_checkpoint(tensors.items(), folder=target)
    for name, info in read_checkpoint(target).items():
        assert info.start % (DTYPE_BITS[info.dtype] // 8) == 0
        assert read_tensor_bytes(info) == read_tensor_bytes(tensors[name])


def test_equal_input_gives_equal_bytes_in_any_order(tmp_path: Path) -> None:
    some_tensors(tmp_path / "source")
    tensors = list(read_checkpoint(tmp_path / "source").items())
    digests = []
    for name, pairs in (("a", tensors), ("b", tensors[::-1])):
        (tmp_path / name).mkdir()
        digests.append(write_checkpoint(iter(pairs), folder=tmp_path / name, max_shard_bytes=300))
    assert digests[0] == digests[1]


def test_new_values_replace_some_tensors_and_leave_the_rest(tmp_path: Path) -> None:
    values = some_tensors(tmp_path / "source")
    tensors = read_checkpoint(tmp_path / "source")
    (tmp_path / "target").mkdir()

    def transform(name: str, info: TensorInfo) -> list[bytes] | None:
        return [bytes(1), bytes(info.size_bytes - 1)] if name == "layers.3.w" else None

    write_checkpoint(tensors.items(), folder=tmp_path / "target", transform=transform)
    result = written(tmp_path / "target")
    assert not result.pop("layers.3.w").any()
    assert all(torch.equal(tensor, values[name]) for name, tensor in result.items())


def test_new_values_of_another_size_are_an_error(tmp_path: Path) -> None:
    some_tensors(tmp_path / "source")
    tensors = read_checkpoint(tmp_path / "source")
    (tmp_path / "target").mkdir()
    with pytest.raises(CheckpointError, match="was given 1 bytes"):
        write_checkpoint(tensors.items(), folder=tmp_path / "target", transform=lambda *_: [b"x"])


def test_two_tensors_with_one_name_are_an_error(tmp_path: Path) -> None:
    some_tensors(tmp_path / "source")
    tensors = read_checkpoint(tmp_path / "source")
    (tmp_path / "target").mkdir()
    with pytest.raises(CheckpointError, match="2 tensors would be named 'same'"):
        write_checkpoint([("same", tensors["mask"]), ("same", tensors["scalar"])], folder=tmp_path / "target")


def test_weights_of_an_earlier_attempt_do_not_stay(tmp_path: Path) -> None:
    target = write(tmp_path, [50, 51], max_shard_bytes=100)
    tensors = read_checkpoint(tmp_path / "source")
    write_checkpoint(tensors.items(), folder=target)
    assert [path.name for path in target.iterdir()] == [FILE]


def test_the_source_is_never_written_over(tmp_path: Path) -> None:
    values = some_tensors(tmp_path / "source")
    (tmp_path / "link").symlink_to(tmp_path / "source")
    tensors = read_checkpoint(tmp_path / "source")
    with pytest.raises(CheckpointError, match="holds the source's weights"):
        write_checkpoint(tensors.items(), folder=tmp_path / "link")
    assert all(torch.equal(tensor, values[name]) for name, tensor in written(tmp_path / "source").items())


def test_progress_ends_at_the_size_of_the_tensors(tmp_path: Path) -> None:
    some_tensors(tmp_path / "source")
    tensors = read_checkpoint(tmp_path / "source")
    (tmp_path / "target").mkdir()
    calls: list[tuple[int, int]] = []
    write_checkpoint(
        tensors.items(),
        folder=tmp_path / "target",
        max_shard_bytes=300,
        progress=lambda *call: calls.append(call),
    )
    total = sum(info.size_bytes for info in tensors.values())
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_a_source_that_is_cut_during_the_copy_is_an_error(tmp_path: Path) -> None:
    some_tensors(tmp_path / "source")
    tensors = read_checkpoint(tmp_path / "source")
    os.truncate(tmp_path / "source" / "s-2.safetensors", 300)
    (tmp_path / "target").mkdir()
    with pytest.raises(CheckpointError, match="changed during the build"):
        write_checkpoint(tensors.items(), folder=tmp_path / "target")


def test_a_tensor_of_many_blocks_is_copied_whole(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    values = torch.arange(3 * BLOCK_BYTES // 4 + 1, dtype=torch.int32)
    save_file({"a": torch.ones(3), "b": values}, tmp_path / FILE)
    write_checkpoint(read_checkpoint(tmp_path).items(), folder=tmp_path / "target")
    assert torch.equal(written(tmp_path / "target")["b"], values)


def test_tensors_of_odd_and_even_numbers_of_blocks_keep_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    sizes = [BLOCK_BYTES * blocks + rest for blocks in (1, 2, 3) for rest in (0, 7, 0)]
    values = {
        f"t{number}": torch.full((size,), number, dtype=torch.uint8) for number, size in enumerate(sizes)
    }
    save_file(values, tmp_path / FILE)
    sums = write_checkpoint(read_checkpoint(tmp_path).items(), folder=tmp_path / "target")
    assert all(torch.equal(tensor, values[name]) for name, tensor in written(tmp_path / "target").items())
    assert sums == sha256_of_files(tmp_path / "target", [FILE])


def test_a_transformed_tensor_may_overwrite_its_parts_once_the_next_but_one_is_asked_for(
    tmp_path: Path,
) -> None:
    (tmp_path / "target").mkdir()
    save_file({"a": torch.zeros(10 * BLOCK_BYTES, dtype=torch.uint8)}, tmp_path / FILE)

    def transform(name: str, tensor: TensorInfo) -> Iterator[memoryview]:
        held = [bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)]
        for number in range(10):
            held[number % 2][:] = bytes([number]) * BLOCK_BYTES
            yield memoryview(held[number % 2])

    sums = write_checkpoint(
        read_checkpoint(tmp_path).items(), folder=tmp_path / "target", transform=transform
    )
    expected = torch.arange(10, dtype=torch.uint8).repeat_interleave(BLOCK_BYTES)
    assert torch.equal(written(tmp_path / "target")["a"], expected)
    assert sums == sha256_of_files(tmp_path / "target", [FILE])


def test_what_is_written_is_synced_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "target").mkdir()
    monkeypatch.setattr("factory.checkpoint.write.SYNC_BYTES", BLOCK_BYTES)
    save_file({"a": torch.zeros(3 * BLOCK_BYTES, dtype=torch.uint8)}, tmp_path / FILE)
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    write_checkpoint(read_checkpoint(tmp_path).items(), folder=tmp_path / "target")
    assert len(synced) == 3


@pytest.mark.parametrize("syncing", [False, True], ids=["while writing", "while syncing"])
def test_a_full_disk_is_an_error_that_says_how_much_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syncing: bool
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    some_tensors(tmp_path / "source")
    (tmp_path / "target").mkdir()
    tensors = read_checkpoint(tmp_path / "source")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if syncing:  # where a disk reports what it could not allocate before
        monkeypatch.setattr("factory.checkpoint.write.SYNC_BYTES", 1)
        monkeypatch.setattr(os, "fsync", refuse)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(DiskSpaceError, match=r"(full|allows): \d+\.\d kB to write to .*B free"):
            write_checkpoint(tensors.items(), folder=tmp_path / "target")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Beside the weights ------------------------------------------------------------------------------

COPIED = [
    "Copyright", "LICENCE-3RD-PARTY", "LICENSE", "LICENSE.txt", "LICENSES/Apache-2.0.txt", "MODEL_LICENSE",
    "NOTICE", "THIRD_PARTY_NOTICES.md", "Terms-of-Use.pdf", "Tongyi Qianwen LICENSE AGREEMENT.txt",
    "USE_POLICY.md", "additional_chat_templates/rag.jinja",
    "chat_template.jinja", "gemma_license", "generation_config.json", "merges.txt", "special_tokens_map.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
]  # fmt: skip
LEFT = [
    "README.md", "config.json", "consolidated.safetensors", "model.gguf", "model.onnx", "modeling_custom.py",
    "optimizer.pt", "pytorch_model.bin", "tokenization_custom.py", "trainer_state.json", "training_args.bin",
    "license_check.py", "license.safetensors", "midterms.txt", "original/LICENSE", "noticeable.txt",
]  # fmt: skip


def test_tokenizer_templates_and_licence_come_along_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in ("additional_chat_templates", "LICENSES", "original"):
        (source / folder).mkdir(parents=True)
    target.mkdir()
    for name in COPIED + LEFT:
        (source / name).write_text(name)
    assert copy_auxiliary_files(source, target) == COPIED
    assert (
        sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()) == COPIED
    )
    assert (target / "tokenizer.json").read_text() == "tokenizer.json"
    # As of a repository's files:
    assert sorted(name for name in COPIED + LEFT if is_auxiliary(name, 1000)) == COPIED


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE-APACHE", "LICENSE.LESSER", "COPYING.LESSER", "LICENSE.MIT", "LICENSE-2.0", "license.html",
        "LICENSE_LLAMA-3.1.txt", "ModelLicenseAgreement.pdf", "Third-Party-Notices.rst", "TERMS",
        "licenses/LICENSE", "licenses/MIT", "LICENSES/Apache-2.0", "licences/BSD-3-Clause",
    ],
)  # fmt: skip
def test_licence_texts_are_found_however_they_are_called(name: str) -> None:
    assert is_auxiliary(name, 1_000_000)
    assert not is_auxiliary(name, 1_000_001)  # no text is as long


@pytest.mark.parametrize(
    "name",
    [
        "licenses/id_rsa", "my_license.pkl", "license_plate.onnx", ".license_token", ".license",
        "license.key", "license_key", "license-token.txt", "licenses/private.pem", "licenses/.env",
        "licenses/.env.txt", "license.env", "license.h5", "license.parquet", "LICENSE.zip",
        "license.npz", "notice.sqlite",
        "license.safetensors.index.json", "license.so", "license.js", "licenses/secret.txt", "LICENSE.txt.gz",
        "licenses/a/LICENSE", "licensee.txt", "license.mitm",
    ],
)  # fmt: skip
def test_keys_programs_and_data_are_no_licence_texts(name: str) -> None:
    assert not is_auxiliary(name, 1000)


def test_a_licence_text_that_is_too_large_for_one_stays_behind(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "LICENSE").write_bytes(bytes(1_000_001))
    (source / "NOTICE").write_bytes(b"notice")
    assert copy_auxiliary_files(source, target) == ["NOTICE"]


def test_paths_of_the_machine_that_saved_a_tokenizer_stay_behind(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    settings = {"bos_token": "‹s›", "model_max_length": 10**30, "name_or_path": "/home/alice/x"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_file": "/home/alice/t"}))
    copy_auxiliary_files(source, target)
    del settings["name_or_path"]
    assert json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8")) == settings


def test_tokenizer_settings_without_paths_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "tokenizer_config.json").write_bytes(b'{ "bos_token":"x"}')
    copy_auxiliary_files(source, target)
    assert (target / "tokenizer_config.json").read_bytes() == b'{ "bos_token":"x"}'


def test_a_tokenizer_of_transformers_5_is_named_as_4_knows_it_and_stays_the_same(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    backend = Tokenizer(WordLevel({"<u>": 0, "a": 1, "<x>": 2}, unk_token="<u>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<u>", extra_special_tokens=["<x>"])
    fast.save_pretrained(source)
    saved = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (saved["tokenizer_class"], saved["extra_special_tokens"]) == ("TokenizersBackend", ["<x>"])
    copy_auxiliary_files(source, target)
    settings = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<x>"]
    assert "extra_special_tokens" not in settings  # transformers 4 wants names for them
    for folder in (source, target):
        (folder / "config.json").write_text('{"model_type": "llama"}')
        read = AutoTokenizer.from_pretrained(folder)
        assert type(read) is type(fast)
        assert read.all_special_ids == [0, 2]
        assert read("<x>a b").input_ids == fast("<x>a b").input_ids


def test_a_link_out_of_the_folder_is_not_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "secret").write_text("key")
    (source / "LICENSE").symlink_to("../secret")
    with pytest.raises(CheckpointError, match="outside the model's folder"):
        copy_auxiliary_files(source, tmp_path)


HASH = "ab" + 62 * "0"


@pytest.mark.parametrize(
    ("folder", "target"),
    [
        ("models--o--n/snapshots/0", "elsewhere/blobs/key"),
        ("models--o--n/snapshots/0", f"elsewhere/blobs/ab/{HASH}"),
        ("models--o--n/snapshots/0", "models--o--other/blobs/etag"),
        ("models--o--n/snapshots/0", "blobs/ab/key"),
        ("models--o--n/snapshots/0", f"blobs/cd/{HASH}"),
        ("models--o--n/folder/0", "models--o--n/blobs/etag"),
        ("home/snapshots/0", "home/blobs/etag"),
    ],
)
def test_blobs_that_are_not_of_the_snapshots_repository_are_not_copied(
    tmp_path: Path, folder: str, target: str
) -> None:
    for path in (tmp_path / folder, (tmp_path / target).parent):
        path.mkdir(parents=True)
    (tmp_path / target).write_text("key")
    (tmp_path / folder / "NOTICE").symlink_to(tmp_path / target)
    with pytest.raises(CheckpointError, match="outside the model's folder"):
        copy_auxiliary_files(tmp_path / folder, tmp_path)


@pytest.mark.parametrize("blob", ["models--o--n/blobs/etag", f"blobs/ab/{HASH}"])
def test_a_link_into_the_hub_cache_is_copied_as_a_file(tmp_path: Path, blob: str) -> None:
    snapshot, target = tmp_path / "models--o--n" / "snapshots" / "0", tmp_path / "target"
    snapshot.mkdir(parents=True)
    target.mkdir()
    (tmp_path / blob).parent.mkdir(parents=True)
    (tmp_path / blob).write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(tmp_path / blob)
    copy_auxiliary_files(snapshot, target)
    assert not (target / "tokenizer.json").is_symlink()
    assert (target / "tokenizer.json").read_text() == "{}"
