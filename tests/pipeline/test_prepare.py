"""A request is settled before any work, with notes on what its result may not do as requested."""

import warnings
from typing import Any

import pytest

from factory.api.progress import Bars
from factory.config.request import BuildRequest
from factory.pipeline.prepare import settle_all


def notes(**options: Any) -> list[str]:
    """The notes on settling a build of the demo, whose tokenizer llama.cpp is not known to have."""
    request = BuildRequest.read({"model": "demo", "drop": 0.3, **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settle_all([request], Bars())
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("runtimes", ["llama.cpp", "mlx,llama.cpp", "all"])
def test_a_cut_for_a_runtime_that_may_not_have_the_tokenizer_is_chosen_with_a_note(runtimes: str) -> None:
    (note,) = notes(for_runtimes=runtimes)
    assert note.startswith(
        "`for_runtimes`: the layers will run right in llama.cpp, but its tokenizer was not tried there"
    )


def test_runtimes_that_read_the_models_own_tokenizer_need_no_note() -> None:
    assert not notes(for_runtimes="mlx,vllm")
    assert not notes()


def test_a_stage_to_redo_that_the_build_does_not_have_is_named() -> None:
    (note,) = notes(no_heal=True, rerun=["heal", "prune"])
    assert note == "`rerun=heal` has no effect: this build has no such stage"
