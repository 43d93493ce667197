"""Weights that are packed already compute what they hold, or are refused by their method before the work."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from factory.cli.main import main
from factory.errors import CheckpointError, ModelError, UsageError
from factory.hub.resolve import resolve
from factory.model.completeness import check_source
from factory.model.loading import load_model
from factory.model.quantization import check_loads
from tests.builders.models import byte_tokenizer, nearest_nf4
from tests.builders.texts import rhymes

BLOCK = 32  # of FP8


def save_dense(folder: Path, *, width: int = 64) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=width // 2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def pack(dense: Path, folder: Path, **settings: Any) -> Path:
    """The model as bitsandbytes packs it."""
    quantization = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=quantization, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def pack_fp8(dense: Path, folder: Path) -> Path:
    """The model in FP8 with a scale for each block, as DeepSeek and others publish theirs."""
    folder.mkdir()
    packed = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        packed[name] = tensor
        if tensor.ndim == 2 and ".layers." in name:
            rows, columns = tensor.shape
            blocks = tensor.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scales = blocks.abs().amax(dim=(1, 3)) / 448
            values = blocks / scales[:, None, :, None]
            packed[name] = values.view(rows, columns).to(torch.float8_e4m3fn)
            packed[f"{name}_scale_inv"] = scales
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(1, 257, (1, 24), generator=torch.Generator().manual_seed(1))
    found: torch.Tensor = model(tokens).logits
    return found


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.dtype == other.dtype
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("width", [64, 96])  # 96 is no multiple of bitsandbytes' block
@pytest.mark.parametrize("double", [False, True])
def test_weights_in_four_bits_compute_with_their_nf4_values(tmp_path: Path, double: bool, width: int) -> None:
    dense = save_dense(tmp_path / "dense", width=width)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    packed = pack(dense, tmp_path / "packed", **settings)
    expected = load_model(dense)
    for name, weight in expected.named_parameters():
        if weight.ndim == 2 and ".layers." in name:
            weight.data = nearest_nf4(weight.data)
    assert apart(logits(load_model(packed)), logits(expected)) < 0.02
    assert apart(logits(load_model(dense)), logits(expected)) > 0.05


def test_weights_in_eight_bits_compute_with_their_scales(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    packed = pack(dense, tmp_path / "packed", load_in_8bit=True)
    assert apart(logits(load_model(packed)), logits(load_model(dense))) < 0.05


def test_weights_in_fp8_compute_with_their_scales(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    packed = pack_fp8(dense, tmp_path / "packed")
    assert apart(logits(load_model(packed)), logits(load_model(dense))) < 0.1
    check_source(resolve(str(packed)))
    check_loads(resolve(str(packed)).config, four_bit=False)


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"load_in_8bit": True}, {}])
def test_packed_weights_count_as_the_parameters_that_they_hold(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    dense = save_dense(tmp_path / "dense")
    packed = pack(dense, tmp_path / "m", **settings) if settings else pack_fp8(dense, tmp_path / "m")
    expected, found = resolve(str(dense)), resolve(str(packed))
    assert found.num_parameters == expected.num_parameters
    assert found.layer_parameters == expected.layer_parameters


def test_a_tensor_that_packed_weights_lack_is_refused_by_name(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    source = resolve(str(pack(dense, tmp_path / "packed", load_in_4bit=True)))
    check_source(source)
    part = "model.layers.2.mlp.up_proj.weight"
    for lost in (part, "model.layers.2.input_layernorm.weight", "model.embed_tokens.weight"):
        left = {name: kind for name, kind in source.tensors.items() if not name.startswith(lost)}
        with pytest.raises(CheckpointError, match=f"the weights lack .*{lost}"):
            check_source(source.model_copy(update={"tensors": left}))


def test_packed_weights_that_do_not_load_here_are_refused_by_their_method() -> None:
    for settings, said in (
        ({"quant_method": "nonesuch", "bits": 4}, r"packed \(nonesuch\).*Unknown quantization type"),
        ({"bits": 4}, r"packed \(quantised\)"),
        ("nonesuch", r"packed \(quantised\)"),
    ):
        with pytest.raises(ModelError, match=said):
            check_loads({"model_type": "llama", "quantization_config": settings}, four_bit=False)
    nested = {"model_type": "x", "text_config": {"quantization_config": {"quant_method": "nonesuch"}}}
    with pytest.raises(ModelError, match="nonesuch"):
        check_loads(nested, four_bit=False)
    check_loads({"model_type": "llama", "quantization_config": None}, four_bit=True)


@pytest.mark.skipif(find_spec("optimum") is not None, reason="GPTQ loads where optimum is installed")
def test_what_is_missing_for_a_method_is_told() -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    with pytest.raises(ModelError, match=r"packed \(gptq\).*requires optimum"):
        check_loads({"model_type": "llama", "quantization_config": settings}, four_bit=False)


def test_packed_weights_cannot_be_packed_again() -> None:
    with pytest.raises(UsageError, match=r"`load_in_4bit`.*already packed \(fp8\)"):
        check_loads({"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}, four_bit=True)


def test_a_packed_model_is_planned_and_its_healing_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FACTORY_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    pack(save_dense(tmp_path / "dense"), tmp_path / "m", load_in_4bit=True)
    lines = [json.dumps({"text": f"{line} {number}"}) for number, line in enumerate(rhymes(40))]
    Path("t.jsonl").write_text("\n".join(lines) + "\n")
    texts = ["--calibration-data", "t.jsonl", "--samples", "4", "--sequence-length", "32"]
    heals = ["--heal", "sft", "--heal-data", "t.jsonl", "--eval-data", "t.jsonl"]
    monkeypatch.setattr("sys.argv", ["factory", "sweep", "m", "--drop", "0.25", *texts, *heals])
    with pytest.raises(SystemExit):
        main()
    assert "its weights are packed (bitsandbytes)" in capsys.readouterr().err
    assert not Path("home").exists()
    monkeypatch.setattr("sys.argv", ["factory", "plan", "m", "--drop", "0.25", *texts])
    main()
    assert "factory build m" in capsys.readouterr().out
