"""Exporting through the command line: what is refused, what is written, and what stays in step with it."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from factory.serving import llama
from tests.builders.commands import HEAVY
from tests.builders.files import content_of
from tests.builders.models import merging_tokenizer, save_family
from tests.forks import Forks

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="needs gguf")
needs_llama = pytest.mark.skipif(
    find_spec("gguf") is None or not llama.is_installed(), reason="needs gguf and llama-cpp-python"
)


@pytest.fixture(scope="module")
def commands() -> Iterator[Forks]:
    process = Forks({}, modules=HEAVY)
    yield process
    process.close()


def a_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(folder)
    merging_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pruned(commands: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    done = commands.run(
        "prune", str(a_llama(folder / "source")), "--layers", "1", "--out", "small", folder=folder
    )
    assert done.code == 0, done.stderr
    return folder / "small"


def test_an_unknown_type_is_refused_with_those_that_there_are(commands: Forks, pruned: Path) -> None:
    done = commands.run("export", "small", "--gguf", "Q9", folder=pruned.parent)
    assert done.code == 2
    assert done.stderr == (
        "error: --gguf Q9 is not a type that can be written\nhint: choose one of Q8_0, Q4_K_M, F16\n"
    )


def test_a_folder_that_is_no_result_is_refused(commands: Forks, pruned: Path) -> None:
    done = commands.run("export", "source", "--gguf", folder=pruned.parent)
    assert done.code == 2
    assert "'source' is not a build folder" in done.stderr


@pytest.mark.skipif(find_spec("gguf") is not None, reason="gguf is installed")
def test_without_the_package_nothing_is_written_and_its_name_is_given(commands: Forks, pruned: Path) -> None:
    before = content_of(pruned)
    done = commands.run("export", "small", "--gguf", folder=pruned.parent)
    assert done.code == 1
    assert done.stderr.endswith("hint: pip install 'hf-factory[gguf]'\n")
    assert content_of(pruned) == before


def test_a_cut_that_llama_cpp_runs_wrongly_is_refused_before_writing(commands: Forks, tmp_path: Path) -> None:
    save_family(tmp_path / "gemma", "gemma3_text")
    done = commands.run("prune", "gemma", "--layers", "1", "--out", "small", folder=tmp_path)
    assert done.code == 0, done.stderr
    before = content_of(tmp_path / "small")
    done = commands.run("export", "small", "--gguf", folder=tmp_path)
    assert done.code == 1
    assert "error: llama.cpp would run small wrongly: it counts every 6th layer" in done.stderr
    assert "hint: build it again with --for-runtimes llama.cpp" in done.stderr
    assert content_of(tmp_path / "small") == before


@needs_llama
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_a_verified_file_and_a_modelfile_lie_beside_the_weights(
    commands: Forks, pruned: Path, kind: str
) -> None:
    done = commands.run("export", "small", "--gguf", kind, "--json", folder=pruned.parent)
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["check"]["same_next"] > 0.5
    assert (pruned / "Modelfile").read_text() == f"FROM ./small-{kind}.gguf\n"
    assert not list(pruned.glob(".*"))
    again = commands.run("export", "small", "--gguf", kind, folder=pruned.parent)
    assert "already exists" in again.stdout
