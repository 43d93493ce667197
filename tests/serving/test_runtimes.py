from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from factory.config import choices
from factory.errors import ModelError, UsageError
from factory.report.notes import runtimes_note
from factory.serving.runtimes import RUNTIMES, limit, verdicts
from tests.builders.models import merging_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
}


def a_config(model_type: str, num_layers: int, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, "num_hidden_layers": num_layers, **SIZES, **more}


def runs(config: dict[str, Any], dropped: Sequence[int]) -> dict[str, bool | None]:
    return {verdict.runtime: verdict.runs for verdict in verdicts(config, dropped)}


GEMMA = a_config("gemma3_text", 18, sliding_window=512, query_pre_attn_scalar=16)


# What was tried with Gemma 3 270M: 6-11 keeps five windows and one full layer in turn, the others do not.
@pytest.mark.parametrize(
    ("dropped", "llama_cpp", "mlx"),
    [(range(6, 12), True, True), (range(7, 10), False, False), ((1, 8, 14), False, True), ((), True, True)],
)
def test_gemma_is_right_where_the_kept_layers_follow_the_period_that_is_counted(
    dropped: Sequence[int], llama_cpp: bool, mlx: bool
) -> None:
    found = runs(GEMMA, dropped)
    assert (found["llama.cpp"], found["mlx"]) == (llama_cpp, mlx)
    assert found["vllm"]
    assert found["transformers-4"]
    assert found["ctranslate2"]


def test_queries_that_are_not_scaled_by_the_size_of_a_head_are_wrong_in_ctranslate2() -> None:
    large = GEMMA | {"query_pre_attn_scalar": 21}  # as 168 with heads of 128, in that of 27 B
    assert runs(GEMMA, ())["ctranslate2"]
    (found,) = [one for one in verdicts(large, ()) if one.runtime == "ctranslate2"]
    assert (found.runs, "query_pre_attn_scalar" in (found.reason or "")) == (False, True)
    assert runs(large, ())["mlx"]


def test_a_llama_is_right_everywhere_after_any_cut() -> None:
    assert set(runs(a_config("llama", 12), (1, 5, 6)).values()) == {True}


@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
def test_a_scaling_of_positions_that_a_runtime_computes_otherwise_is_told(form: str) -> None:
    config = a_config("llama", 12, **{form: {"rope_type": "llama3", "factor": 8.0}})
    assert [name for name, right in runs(config, (1, 5)).items() if not right] == ["ctranslate2"]
    (found,) = [one for one in verdicts(config, ()) if one.runtime == "ctranslate2"]
    assert found.reason == "it computes positions scaled by llama3 otherwise, in the source too"


def test_a_scaling_that_depends_on_the_length_of_the_text_is_told_where_an_export_freezes_it() -> None:
    config = a_config("llama", 12, rope_scaling={"type": "dynamic", "factor": 4.0})
    assert [name for name, right in runs(config, (1, 5)).items() if not right] == ["onnx"]


def test_a_family_that_was_not_tried_is_not_known() -> None:
    assert set(runs(a_config("falcon", 12), (1,)).values()) == {None}


@pytest.mark.parametrize(
    ("model_type", "named", "kept_period"), [("gemma3_text", 62, range(12, 18)), ("gemma2", 46, (12, 13))]
)
def test_a_number_of_layers_that_names_a_model_must_stay(
    model_type: str, named: int, kept_period: Sequence[int]
) -> None:
    found = {v.runtime: v for v in verdicts(a_config(model_type, named), kept_period)}
    assert found["llama.cpp"].runs is False
    assert f"it takes a model of {named - len(kept_period)} layers" in (found["llama.cpp"].reason or "")
    longer = runs(a_config(model_type, named + len(kept_period)), kept_period)
    assert longer["llama.cpp"] is False  # it would be taken for the model of that name


def test_a_window_that_a_runtime_lacks_bounds_what_is_right() -> None:
    config = a_config("mistral", 8, sliding_window=4096)
    found = {v.runtime: v for v in verdicts(config, (3,))}
    assert found["mlx"].runs
    assert found["mlx"].reason == "up to 4,096 tokens, as the source"
    assert {v.reason for v in verdicts({**config, "sliding_window": None}, (3,)) if v.runs} == {None}


def test_a_source_that_a_runtime_mistakes_is_told_apart() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"] * 2
    odd = a_config("gemma3_text", 8, layer_types=types)
    found = {v.runtime: v for v in verdicts(odd, ())}
    assert found["llama.cpp"].runs is False
    assert "in the source too" in (found["llama.cpp"].reason or "")


@pytest.mark.parametrize("count", [6, 7])
@pytest.mark.parametrize("names", [("llama.cpp",), ("mlx",), ("llama.cpp", "mlx"), ("all",)])
def test_a_limit_allows_the_parts_of_cuts_that_run_right_and_no_others(
    count: int, names: tuple[str, ...]
) -> None:
    config = a_config("gemma3_text", 12, sliding_window=16, query_pre_attn_scalar=16)
    wanted = set(RUNTIMES) if names == ("all",) else set(names)
    right = [
        set(cut)
        for cut in combinations(range(12), count)
        if all(v.runs is not False for v in verdicts(config, cut) if v.runtime in wanted)
    ]
    if not right:
        with pytest.raises(ModelError):
            limit(config, runtimes=names, count=count)
        return
    allowed = limit(config, runtimes=names, count=count)
    for size in (1, 2, count):
        for part in combinations(range(12), size):
            assert allowed(part) == any(cut.issuperset(part) for cut in right)


def test_a_limit_without_a_cut_names_the_sizes_that_have_one() -> None:
    config = a_config("gemma2", 46)
    with pytest.raises(ModelError, match="no 4 layers can be dropped so that this model runs"):
        limit(config, runtimes=("llama.cpp",), count=4)


def test_a_runtime_that_is_not_known_to_run_the_family_is_no_limit() -> None:
    with pytest.raises(UsageError, match="nothing is known for this family") as caught:
        limit(a_config("qwen3", 12), runtimes=("vllm",), count=3)
    assert "known to run this family: transformers-4, llama.cpp, mlx" in (caught.value.hint or "")


def test_a_block_that_keeps_the_period_has_its_length() -> None:
    with pytest.raises(ModelError, match="no block of 5 layers can be dropped") as caught:
        limit(GEMMA, runtimes=("all",), count=5, in_one_block=True)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("drop 6 or 12 of its 18 layers, or choose scattered ones")
    assert limit(GEMMA, runtimes=("all",), count=6, in_one_block=True)(tuple(range(6, 12)))


def test_layers_that_are_all_of_one_kind_are_mistaken_by_a_program_that_counts() -> None:
    config = a_config("gemma3_text", 12, layer_types=["full_attention"] * 12)
    found = runs(config, (3,))
    assert (found["llama.cpp"], found["mlx"], found["vllm"]) == (False, True, True)


def test_no_known_runtime_is_no_limit_that_could_be_kept() -> None:
    with pytest.raises(UsageError, match="no runtime is known to run falcon"):
        limit(a_config("falcon", 12), runtimes=("all",), count=3)


def test_a_program_that_looks_for_a_layer_of_each_kind_needs_one() -> None:
    config = a_config("olmo3", 8, sliding_window=16)
    found = {v.runtime: v for v in verdicts(config, (3, 7))}
    assert found["mlx"].reason == "it needs a layer of each kind"
    assert runs(config, (0, 1))["mlx"]
    assert "0.5.0 reads the list" in (found["llama.cpp"].reason or "")


def test_a_tokenizer_that_llama_cpp_is_not_known_to_have_leaves_it_open(tmp_path: Path) -> None:
    config = a_config("llama", 12)
    own = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[a-z]+"), "isolated"), pre_tokenizers.ByteLevel()]
    )
    for pre, known in ((pre_tokenizers.ByteLevel(add_prefix_space=False), True), (own, None)):
        merging_tokenizer(pre=pre).save_pretrained(tmp_path)
        found = {v.runtime: v for v in verdicts(config, (3,), folder=tmp_path)}
        assert found.pop("llama.cpp").runs is known
        assert all(v.runs for v in found.values())
    assert "not known in llama.cpp: its tokenizer was not tried there" in str(
        runtimes_note(verdicts(config, (3,), folder=tmp_path))
    )
    (tmp_path / "tokenizer.json").write_text('{"model": [')
    assert verdicts(config, (3,), folder=tmp_path) == verdicts(config, (3,))


def test_the_names_that_can_be_given_are_those_of_the_table() -> None:
    assert tuple(RUNTIMES) == choices.RUNTIMES
