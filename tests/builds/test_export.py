"""Exporting through the command line: what is refused, what is written, and what stays in step with it."""

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from factory.artifacts import Build, DistanceProfile
from factory.builds.folder import lay_out
from factory.builds.integrity import check_nothing_added, check_whole
from factory.serving import llama_cpp
from tests.builders.commands import HEAVY, QUICK
from tests.builders.files import content_of, flip_a_bit
from tests.builders.models import merging_tokenizer, save_family
from tests.builders.texts import rhymes
from tests.forks import Forks
from tests.loopback_hub import Hub

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="needs gguf")
needs_llama = pytest.mark.skipif(
    find_spec("gguf") is None or not llama_cpp.is_installed(), reason="needs gguf and llama-cpp-python"
)


CHAT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


CONVERTER = """
import sys
from pathlib import Path
from factory.serving.gguf_write import Facts, write_gguf
folder, _, out, _, kind = sys.argv[1:]
write_gguf(Path(folder), Path(out), kind=kind.upper(), facts=Facts("converted"))
"""


@pytest.fixture(scope="module")
def commands(served_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    folder = tmp_path_factory.mktemp("home")
    variables = served_hub.environment(folder / "hf") | {"FACTORY_HOME": str(folder / "home")}
    process = Forks(variables | {"HF_HUB_DISABLE_XET": "1"}, modules=HEAVY)
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


def test_weights_that_were_changed_are_refused(commands: Forks, pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned, tmp_path / "small")
    flip_a_bit(tmp_path / "small" / "model.safetensors")
    done = commands.run("export", "small", "--gguf", folder=tmp_path)
    assert done.code == 1
    assert "model.safetensors is missing or has changed" in done.stderr


def test_a_converter_that_is_not_there_is_refused(commands: Forks, pruned: Path) -> None:
    done = commands.run("export", "small", "--gguf", "--converter", "none.py", folder=pruned.parent)
    assert done.code == 2
    assert done.stderr.startswith(
        "error: --converter none.py is not a file\nhint: give the path of llama.cpp's"
    )


@needs_gguf
def test_a_given_converter_writes_the_file_and_its_error_is_told(
    commands: Forks, pruned: Path, tmp_path: Path
) -> None:
    """By a stand-in for llama.cpp's script, with its arguments."""
    shutil.copytree(pruned, tmp_path / "small", ignore=shutil.ignore_patterns("*gguf*", "Modelfile"))
    script = tmp_path / "convert_hf_to_gguf.py"
    export = ("export", "small", "--gguf", "--converter", str(script))
    script.write_text("import sys; print('loading'); sys.exit('Model Tiny is not supported')")
    failed = commands.run(*export, folder=tmp_path)
    assert failed.code == 1
    assert "error: llama.cpp's converter refuses small: Model Tiny is not supported\n" in failed.stderr
    assert not list((tmp_path / "small").glob("*gguf*"))
    script.write_text(CONVERTER)
    done = commands.run(*export, "--json", folder=tmp_path)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["made_by"] == "convert_hf_to_gguf.py"


WITHOUT = """
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *more: None if name in {names} else find(name, *more)
"""


@pytest.mark.parametrize(
    ("names", "kind", "told"),
    [
        (
            ["gguf"],
            "Q8_0",
            "the package gguf, which is missing\nhint: pip install gguf\n",
        ),
        pytest.param(
            ["llama_cpp"],
            "Q4_K_M",
            "llama-cpp-python is not installed\nhint: pip install llama-cpp-python, or choose Q8_0 or F16\n",
            marks=needs_gguf,
        ),
    ],
)
def test_without_a_package_nothing_is_written_and_its_name_is_given(
    commands: Forks, pruned: Path, names: list[str], kind: str, told: str
) -> None:
    before = content_of(pruned)
    without = WITHOUT.format(names=names)
    done = commands.run("export", "small", "--gguf", kind, folder=pruned.parent, before=without)
    assert done.code == 1
    assert done.stderr.endswith(told)
    assert content_of(pruned) == before


@needs_gguf
def test_without_llama_cpp_the_file_is_written_and_told_to_be_unverified(
    commands: Forks, pruned: Path, tmp_path: Path
) -> None:
    shutil.copytree(pruned, tmp_path / "small")
    without = WITHOUT.format(names=["llama_cpp"])
    done = commands.run("export", "small", "--gguf", folder=tmp_path, before=without)
    assert done.code == 0
    assert "not verified: llama.cpp was not installed" in done.stdout
    assert "to verify it: pip install llama-cpp-python" in done.stdout


@needs_gguf
def test_a_full_disk_leaves_nothing(commands: Forks, pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned, tmp_path / "small", ignore=shutil.ignore_patterns("*gguf*", "Modelfile"))
    before = content_of(tmp_path / "small")
    done = commands.run("export", "small", "--gguf", folder=tmp_path, file_bytes=100_000)
    assert done.code == 1
    assert "error: the disk is full or failing" in done.stderr
    assert content_of(tmp_path / "small") == before


@needs_llama
def test_a_file_that_differs_by_more_than_its_type_explains_is_not_kept(
    commands: Forks, pruned: Path, tmp_path: Path
) -> None:
    shutil.copytree(pruned, tmp_path / "small", ignore=shutil.ignore_patterns("*gguf*", "Modelfile"))
    before = content_of(tmp_path / "small")
    strict = "from factory.serving import gguf_check; gguf_check.BOUNDS = {'F16': (0.0, 1.0)}"
    done = commands.run("export", "small", "--gguf", folder=tmp_path, before=strict)
    assert done.code == 1
    assert "llama.cpp computes something else from" in done.stderr
    assert content_of(tmp_path / "small") == before


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


@pytest.fixture(scope="module")
def built(commands: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of a model with a chat template."""
    folder = tmp_path_factory.mktemp("built")
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(a_llama(folder / "tiny"))
    (folder / "tiny" / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("measured", "healed", "evaluated"):
        lines = [json.dumps({"text": f"{name} {text}"}) for text in rhymes(8)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    done = commands.run("build", "./tiny", *QUICK, folder=folder)
    assert done.code == 0, done.stderr
    done = commands.run("export", "builds/tiny-drop40", "--gguf", folder=folder)
    assert done.code == 0, done.stderr
    return folder / "builds" / "tiny-drop40"


@pytest.fixture
def build(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "tiny-drop40")
    return tmp_path / "tiny-drop40"


@needs_gguf
def test_a_build_with_a_gguf_is_whole_and_its_card_names_the_file(commands: Forks, build: Path) -> None:
    done = commands.run("verify", str(build), folder=build.parent)
    assert done.code == 0, done.stderr
    card = (build / "model" / "README.md").read_text()
    assert "- GGUF: `tiny-drop40-Q8_0.gguf`" in card
    assert "`ollama create tiny-drop40 -f Modelfile`" in card
    assert "<|user|>{{ .Content }}<|end|><|assistant|>{{ else" in (build / "model" / "Modelfile").read_text()
    flip_a_bit(build / "model" / "tiny-drop40-Q8_0.gguf")
    assert commands.run("verify", str(build), folder=build.parent).code == 1


@needs_gguf
def test_a_gguf_is_published_with_the_model_and_removed_there_with_it(
    hub: Hub, commands: Forks, build: Path
) -> None:
    done = commands.run("push", str(build), "alice/tiny", folder=build.parent)
    assert done.code == 0, done.stderr
    names = {"tiny-drop40-Q8_0.gguf", "Modelfile", "gguf.json", "model.safetensors"}
    assert hub.files("alice/tiny").keys() > names
    assert b"- GGUF: `tiny-drop40-Q8_0.gguf`" in hub.files("alice/tiny")["README.md"]
    for name in ("tiny-drop40-Q8_0.gguf", "Modelfile", "gguf.json"):
        (build / "model" / name).unlink()
    for arguments in (
        ("verify", str(build), "--accept"),
        ("card", str(build)),
        ("push", str(build), "alice/tiny"),
    ):
        assert commands.run(*arguments, folder=build.parent).code == 0
    assert "tiny-drop40-Q8_0.gguf" not in hub.files("alice/tiny")


@needs_gguf
def test_a_gguf_stays_when_the_build_is_written_again_with_the_same_weights(build: Path) -> None:
    found, profile = Build.read(build), DistanceProfile.read(build)
    lay_out(found.model_copy(update={"seconds": {}}), profile, build / "model", out=build)
    check_whole(Build.read(build), build)
    check_nothing_added(build)
    assert "- GGUF: `tiny-drop40-Q8_0.gguf`" in (build / "model" / "README.md").read_text()


@needs_gguf
def test_an_edited_card_is_kept_and_told(commands: Forks, build: Path) -> None:
    card = build / "model" / "README.md"
    card.write_text(card.read_text() + "\nMine.\n")
    done = commands.run("export", str(build), "--gguf", "F16", folder=build.parent)
    assert done.code == 0
    assert "note: the edited card was kept; it does not name the GGUF" in done.stderr
    assert "F16" not in card.read_text()
