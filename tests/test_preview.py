"""The preview says the right numbers, and refuses a build that cannot fit the disk."""

from pathlib import Path
from typing import Any

import pytest

from factory.artifacts import Source
from factory.config import BuildConfig
from factory.errors import DiskSpaceError, DropError
from factory.pipeline import STAGES
from factory.preview import preview

SOURCE = Source(
    name="m",
    commit="0" * 40,
    folder=Path(),
    model_type="llama",
    architecture="LlamaForCausalLM",
    config={"hidden_size": 64},
    num_layers=10,
    num_parameters=1_200,
    layer_parameters=(100,) * 10,
    size_bytes=2_400,
    layer_bytes=(200,) * 10,
    vocab_size=10,
    dtype="bfloat16",
)


def preview_of(source: Source = SOURCE, *, drop: float = 0.3, **options: Any) -> Any:
    return preview(source, BuildConfig(reference="m", drop=drop), **options)


def test_three_of_ten_equal_layers_take_three_tenths_of_their_share(tmp_path: Path) -> None:
    shown = preview_of(pending=(), home=tmp_path)
    assert (shown.num_dropped, shown.parameters_after, shown.bytes_after) == (3, 900, 1_800)
    assert (shown.disk_needed, shown.seconds, shown.device) == (0, 0.0, "")


def test_work_that_is_left_needs_disk_memory_and_time(tmp_path: Path) -> None:
    everything = preview_of(pending=STAGES, home=tmp_path / "not" / "there")
    nearly_done = preview_of(pending=("speed", "card"), home=tmp_path)
    assert everything.disk_needed > 2 * 1_800
    assert everything.memory_needed == (1_200 + 900) * 4
    assert everything.seconds > nearly_done.seconds > 0
    assert everything.device.startswith("CPU")


def test_a_model_that_is_not_here_yet_has_to_be_downloaded(tmp_path: Path) -> None:
    elsewhere = SOURCE.model_copy(update={"folder": None})
    assert preview_of(elsewhere, pending=("speed",), home=tmp_path).download_bytes == 2_400
    assert preview_of(elsewhere, pending=(), home=tmp_path).download_bytes == 0


def test_too_little_disk_is_refused_with_both_figures(tmp_path: Path) -> None:
    huge = SOURCE.model_copy(update={"size_bytes": 10**18, "folder": None})
    with pytest.raises(
        DiskSpaceError, match=r"needs 3000000\.0 TB of disk and .* has [\d.]+ [GT]B"
    ) as caught:
        preview_of(huge, pending=STAGES, home=tmp_path)
    assert "factory gc" in caught.value.hint


def test_a_model_of_two_layers_is_not_told_to_drop_nothing(tmp_path: Path) -> None:
    small = SOURCE.model_copy(update={"num_layers": 2})
    with pytest.raises(DropError) as caught:
        preview_of(small, drop=0.5, pending=(), home=tmp_path)
    assert "--drop 0" not in caught.value.hint


def test_a_cut_that_leaves_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DropError, match="leaves 1"):
        preview_of(drop=0.9, pending=(), home=tmp_path)
