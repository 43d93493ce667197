"""Read the headers of safetensors files on the Hub by range requests, without downloading weights."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
)

from factory.checkpoint.header import TensorInfo, check_count, header_length, parse_header

FIRST_BYTES = 100_000  # longer than nearly every header, so that one request is enough
SECONDS = 10.0  # timeout


def read_remote_headers(
    api: HfApi, repo_id: str, *, commit: str, sizes: Mapping[str, int]
) -> dict[str, TensorInfo]:
    """Return the tensors of weight files, read as strictly as those of local files.

    The client's own reader trusts what a header says, and parses up to 25 MB of it in each thread.

    Args:
        sizes: Size of each weight file in bytes.

    Raises:
        CheckpointError: A header is malformed or has more tensors than any model.
    """
    tensors: dict[str, TensorInfo] = {}
    one_at_a_time = Lock()  # a parsed header takes many times its length in memory

    def read(name: str) -> None:
        path, size_bytes = Path(name), sizes[name]
        url = hf_hub_url(repo_id, name, revision=commit, endpoint=api.endpoint)
        start = _range(api, url, 0, FIRST_BYTES)
        length = header_length(path, start, size_bytes=size_bytes)
        raw = start[8 : 8 + length]
        if len(raw) < length:
            raw += _range(api, url, 8 + len(raw), 8 + length)
        with one_at_a_time:
            tensors.update(parse_header(path, raw, data_start=8 + length, size_bytes=size_bytes))
            check_count(len(tensors), where=repo_id)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, sizes))
    return tensors


def _range(api: HfApi, url: str, start: int, end: int) -> bytes:
    """Download bytes [start, end) of a file, or fewer if it is shorter."""
    known = build_hf_headers(
        token=api.token, library_name=api.library_name, library_version=api.library_version
    )
    span = {"Range": f"bytes={start}-{end - 1}"}
    response = get_session().get(url, headers=known | span, timeout=SECONDS)
    hf_raise_for_status(response)
    return bytes(response.content)[: end - start]
