"""A sample of the damaged and hostile folders of `tests.fuzz`, which runs as many as are asked for."""

from pathlib import Path

from tests.fuzz import run, run_case


def test_damaged_and_hostile_folders_are_pruned_or_refused_and_nothing_else() -> None:
    outcomes = run(range(1_500), seed=1)
    assert outcomes.total() == 1_500
    for target in ("header", "index", "config"):  # cases of every kind get through and are refused
        assert outcomes[f"{target}: pruned"] > 10
    for target in ("header", "index", "bytes"):
        assert outcomes[f"{target}: CheckpointError"] > 10


def test_a_case_is_the_same_every_time(tmp_path: Path) -> None:
    first = run_case(3, 14, sandbox=tmp_path)
    content = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    assert run_case(3, 14, sandbox=tmp_path) == first
    assert {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()} == content
