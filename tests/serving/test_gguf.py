"""GGUF files: what is in them, and that llama.cpp computes the same from them as transformers."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from factory.errors import CheckpointError, FactoryError, ModelError, VerificationError
from factory.model.tokenizer import load_tokenizer
from factory.serving import llama_cpp
from factory.serving.gguf_check import check_gguf, compare, reference
from factory.serving.gguf_write import Facts, check_convertible, write_gguf
from tests.builders.models import merging_tokenizer
from tests.families import config_of

NUM_TOKENS = 260
WINDOW = 16
BASE = {
    "vocab_size": NUM_TOKENS,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "max_position_embeddings": 512,
    "query_pre_attn_scalar": 8,
}
THETA = {"rope_theta": 100_000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, **THETA,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 2.0, 3.0, 4.0],
    **THETA,
}  # fmt: skip
SCALED = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, **THETA},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1_000.0},
}
IRREGULAR = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="needs gguf")
needs_llama = pytest.mark.skipif(not llama_cpp.is_installed(), reason="needs llama-cpp-python")


def save(folder: Path, model_type: str, **fields: Any) -> Path:
    """A random model whose logits are far from equal, with a tokenizer that llama.cpp has."""
    torch.manual_seed(0)
    windows = {} if model_type in ("mistral", "phi3") else {"sliding_window": WINDOW}
    config = config_of(model_type, **(BASE | {"sliding_window": None} | windows | fields))
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type].from_dict(config))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(folder)
    merging_tokenizer().save_pretrained(folder)
    return folder


def written(folder: Path, *, kind: str = "F16") -> Path:
    check_convertible(folder)
    path = folder / f"{kind}.gguf"
    write_gguf(folder, path, kind=kind, facts=Facts("tiny", ("mit",), "acme/tiny"))
    return path


def fields_of(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def tensors_of(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


@needs_gguf
def test_a_header_says_what_the_model_is_and_where_it_is_from(tmp_path: Path) -> None:
    found = fields_of(written(save(tmp_path, "llama", rope_parameters={"rope_type": "default", **THETA})))
    assert found["general.architecture"] == "llama"
    assert found["general.license"] == "mit"
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/acme/tiny"
    assert found["llama.block_count"] == 6
    assert found["llama.rope.freq_base"] == 100_000.0
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.merges"] == ["t h", "th e", "Ġ the"]
    assert len(found["tokenizer.ggml.tokens"]) == NUM_TOKENS


@needs_gguf
def test_each_layer_says_whether_it_has_a_window(tmp_path: Path) -> None:
    kinds = [*IRREGULAR, *IRREGULAR[:2]]
    found = fields_of(written(save(tmp_path, "gemma3_text", layer_types=kinds)))
    assert found["gemma3.attention.sliding_window"] == WINDOW
    assert found["gemma3.attention.sliding_window_pattern"] == [kind == "sliding_attention" for kind in kinds]


@needs_gguf
def test_a_llama_has_rows_that_rope_turns_together_side_by_side(tmp_path: Path) -> None:
    rows = load_file(save(tmp_path, "llama") / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    found = tensors_of(written(tmp_path))["blk.0.attn_q.weight"].data
    first_head = [0, 4, 1, 5, 2, 6, 3, 7]  # of 8 rows
    assert np.array_equal(found[:8], rows[first_head].half().numpy())


@needs_gguf
def test_a_gemma_has_one_added_to_its_norms_and_no_second_embedding(tmp_path: Path) -> None:
    norm = load_file(save(tmp_path, "gemma2") / "model.safetensors")["model.norm.weight"]
    found = tensors_of(written(tmp_path))
    assert np.array_equal(found["output_norm.weight"].data, norm.float().numpy() + 1)
    assert "output.weight" not in found


@needs_gguf
def test_what_rope_computes_anyway_is_left_out_and_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, "llama") / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path)
    assert not [name for name in tensors_of(written(tmp_path)) if "rot" in name]
    save_file(tensors | {"model.layers.0.gate.weight": torch.ones(4, 4)}, path)
    with pytest.raises(CheckpointError, match=r"no name for the tensor model.layers.0.gate.weight"):
        written(tmp_path)


@needs_gguf
def test_eight_bits_take_about_half_of_sixteen(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    found = {kind: tensors_of(written(tmp_path, kind=kind)) for kind in ("F16", "Q8_0")}
    sizes = {kind: sum(int(t.n_bytes) for t in tensors.values()) for kind, tensors in found.items()}
    assert sizes["Q8_0"] / sizes["F16"] == pytest.approx(34 / 64, abs=0.01)  # 32 values and one scale
    assert found["Q8_0"]["blk.0.attn_norm.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **THETA}}, "rope_type dynamic"),
        ("gemma3_text", {"query_pre_attn_scalar": 12}, "query_pre_attn_scalar=12"),
        ("falcon", {}, "a falcon cannot be written; known are llama, mistral"),
    ],
)
def test_a_model_that_the_file_cannot_hold_is_refused_by_name(
    tmp_path: Path, model_type: str, changes: dict[str, Any], named: str
) -> None:
    torch.manual_seed(0)
    config = config_of(model_type, **{**BASE, **changes} if model_type != "falcon" else {})
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type].from_dict(config)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=named) as refused:
        check_convertible(tmp_path)
    assert "converter" in refused.value.hint


def test_packed_weights_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, "llama") / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"model.norm.weight is stored as I8"):
        check_convertible(tmp_path)


@pytest.mark.parametrize(
    "pre",
    [
        pre_tokenizers.Split(Regex("[A-Z]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()]),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(
    tmp_path: Path, pre: pre_tokenizers.PreTokenizer
) -> None:
    save(tmp_path, "llama")
    merging_tokenizer(pre=pre).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"the tokenizer of .* it splits texts by"):
        check_convertible(tmp_path)


def sentencepiece_like(folder: Path) -> Path:
    """Replace a model's tokenizer by one that merges letters, falls back to bytes, and marks spaces."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abct", "bc", "ab"]
    numbers = {token: number for number, token in enumerate([*letters, "▁t"])}
    merges = [("b", "c"), ("a", "b"), ("▁", "t")]  # the first one wins in "abc", which is not the leftmost
    tokenizer = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@needs_gguf
def test_a_vocabulary_of_letters_gets_scores_in_the_order_of_its_merges(tmp_path: Path) -> None:
    found = fields_of(written(sentencepiece_like(save(tmp_path, "llama", vocab_size=280))))
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert (scores["bc"], scores["ab"], scores["▁t"], scores["a"]) == (0, -1, -2, -3)
    types = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    assert (types["<unk>"], types["<s>"], types["<0x41>"], types["a"], types["[PAD279]"]) == (2, 3, 6, 1, 5)
    assert found["tokenizer.ggml.add_space_prefix"] is False


@needs_gguf
@needs_llama
def test_llama_cpp_merges_letters_in_the_order_of_the_merges(tmp_path: Path) -> None:
    path = written(sentencepiece_like(save(tmp_path, "llama", vocab_size=280)))
    texts = ["abc", "abcab t", "  tabc\n", "€"]
    expected = [load_tokenizer(tmp_path)(text).input_ids for text in texts]
    assert llama_cpp.ask(path, texts=texts, runs=[]).tokens == expected


@needs_gguf
@needs_llama
@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"rope_parameters": LLAMA3, "attention_bias": True}),
        ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
        ("gemma3_text", {"rope_parameters": SCALED, "layer_types": [*IRREGULAR, *IRREGULAR[:2]]}),
    ],
)
def test_llama_cpp_computes_the_same_as_transformers(
    tmp_path: Path, model_type: str, fields: dict[str, Any]
) -> None:
    found = check_gguf(written(save(tmp_path, model_type, **fields)), reference(tmp_path), kind="F16")
    assert found.apart < 0.01
    assert found.longest > WINDOW


@needs_gguf
@needs_llama
def test_a_file_of_another_model_is_told_from_a_rounded_one(tmp_path: Path) -> None:
    one, other = (
        save(tmp_path / str(theta), "llama", rope_parameters={"rope_type": "default", "rope_theta": theta})
        for theta in (1e5, 1e4)
    )
    with pytest.raises(VerificationError, match="deviations apart"):
        check_gguf(written(other, kind="Q8_0"), reference(one), kind="Q8_0")


@needs_llama
def test_a_file_that_llama_cpp_cannot_load_is_an_error_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ModelError, match=r"llama.cpp cannot use broken.gguf: .*") as refused:
        llama_cpp.ask(path, texts=["a"], runs=[])
    assert isinstance(refused.value, FactoryError)


def test_logits_are_compared_without_what_no_answer_depends_on() -> None:
    expected = [np.array([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0]])]
    same = compare([expected[0] + [[7.0], [-2.0]]], expected)
    assert (same.largest, same.apart, same.same_next) == (pytest.approx(0), pytest.approx(0), 1.0)
    other = compare([np.array([[0.0, 1.0, 3.0], [0.0, 2.0, 1.0]])], expected)
    assert (other.largest, other.same_next) == (2.0, 0.5)
