"""Models that need code of their own: refused by name, run where they are trusted and pinned."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders.commands import HEAVY, QUICK
from tests.builders.models import save_llama
from tests.builders.texts import rhymes
from tests.forks import Ended, Forks, fork_once
from tests.loopback_hub import Hub

CONFIGURATION = """
from transformers import LlamaConfig

class HomemadeConfig(LlamaConfig):
    model_type = "homemade"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_homemade import HomemadeConfig

class HomemadeForCausalLM(LlamaForCausalLM):
    config_class = HomemadeConfig
"""
AUTO_MAP = {
    "AutoConfig": "configuration_homemade.HomemadeConfig",
    "AutoModelForCausalLM": "modeling_homemade.HomemadeForCausalLM",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose type only the code beside its weights knows, and texts."""
    folder = tmp_path_factory.mktemp("remote")
    model = save_llama(folder / "homemade", num_layers=6)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "homemade", "architectures": ["HomemadeForCausalLM"], "auto_map": AUTO_MAP}
    (model / "config.json").write_text(json.dumps(config))
    (model / "configuration_homemade.py").write_text(CONFIGURATION)
    (model / "modeling_homemade.py").write_text(MODELING)
    for name in ("measured", "healed", "evaluated"):
        lines = [json.dumps({"text": f"{name} {text}"}) for text in rhymes(8)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def commands(served_hub: Hub, folder: Path) -> Iterator[Forks]:
    variables = served_hub.environment(folder / "hf") | {"FACTORY_HOME": str(folder / "home")}
    process = Forks(variables, modules=HEAVY)
    yield process
    process.close()


def told(ended: Ended) -> str:
    assert ended.code in (1, 2), ended.stderr
    assert len(ended.stderr.splitlines()) == 2
    return ended.stderr


def test_without_trust_it_is_refused_by_name_and_its_code_stays_where_it_is(
    hub: Hub, commands: Forks, folder: Path
) -> None:
    commit = hub.put_model("acme/homemade", folder / "homemade")
    refused = told(commands.run("build", "acme/homemade", *QUICK, folder=folder))
    assert "model type 'homemade' needs its own code (configuration_homemade.HomemadeConfig" in refused
    assert f"acme/homemade@{commit} with --trust-remote-code" in refused
    assert "needs its own code" in told(commands.run("build", "./homemade", *QUICK, folder=folder))
    assert not [r for r in hub.requests if r.path.endswith(".py")]


def test_trust_demands_a_pinned_revision(hub: Hub, commands: Forks, folder: Path) -> None:
    commit = hub.put_model("acme/homemade", folder / "homemade")
    for reference in ("acme/homemade", "acme/homemade@main"):
        refused = told(commands.run("build", reference, "--trust-remote-code", *QUICK, folder=folder))
        assert "--trust-remote-code without a commit" in refused
        assert f"give acme/homemade@{commit}" in refused
    assert not [r for r in hub.requests if r.path.endswith(".py")]


LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, model.config.num_hidden_layers)
"""


def test_pinned_and_trusted_it_is_built_and_the_result_names_the_code_instead_of_copying_it(
    hub: Hub, commands: Forks, folder: Path
) -> None:
    commit = hub.put_model("acme/homemade", folder / "homemade")
    reference = f"acme/homemade@{commit}"
    done = commands.run("build", reference, "--trust-remote-code", *QUICK, folder=folder)
    assert done.code == 0, done.stderr
    model = folder / "builds" / "homemade-drop40" / "model"
    assert not list(model.rglob("*.py"))
    config = json.loads((model / "config.json").read_text())
    assert config["auto_map"] == {key: f"acme/homemade--{value}" for key, value in AUTO_MAP.items()}
    build = json.loads((model / "build.json").read_text())
    assert build["source"]["remote_code"] is True
    card = (model / "README.md").read_text()
    assert f"code_revision='{commit}'" in card or f'code_revision="{commit}"' in card
    assert "- custom_code" in card
    assert f"factory build {reference} --drop 0.4 \\\n  --trust-remote-code" in card
    elsewhere = hub.environment(folder / "elsewhere") | {"PATH": ""}
    loaded = fork_once(elsewhere, str(model), folder=folder, program=LOAD)
    assert loaded.stdout.splitlines()[-1] == "HomemadeForCausalLM 4", loaded.stderr
    again = commands.run("build", reference, "--trust-remote-code", *QUICK, folder=folder)
    assert "nothing to do" in again.stdout, again.stderr


def test_a_folder_is_pinned_by_its_content_with_its_code(hub: Hub, commands: Forks, folder: Path) -> None:
    def build(out: str) -> str:
        words = ["build", "./homemade", "--trust-remote-code", *QUICK, "--out", out, "--json"]
        done = commands.run(*words, folder=folder)
        assert done.code == 0, done.stderr
        commit: str = json.loads(done.stdout)["source"]["commit"]
        return commit

    before = build("local")
    assert "auto_map" not in json.loads((folder / "local" / "model" / "config.json").read_text())
    assert "need its code, which is not on the Hub" in told(commands.run("push", "local", folder=folder))
    with (folder / "homemade" / "modeling_homemade.py").open("a") as code:
        code.write("# another version\n")
    assert build("local2") != before


def test_layers_that_somebody_chose_are_removed_too(commands: Forks, folder: Path) -> None:
    words = ("prune", "./homemade", "--layers", "2,3", "--out", "cut")
    assert "needs its own code" in told(commands.run(*words, folder=folder))
    done = commands.run(*words, "--trust-remote-code", folder=folder)
    assert done.code == 0, done.stderr
    assert "verified: names and shapes, logits" in done.stdout


@pytest.mark.parametrize(
    ("auto_map", "words"),
    [
        ({"AutoConfig": AUTO_MAP["AutoConfig"]}, "names no AutoModelForCausalLM"),
        (
            AUTO_MAP | {"AutoModelForCausalLM": f"evil/code--{AUTO_MAP['AutoModelForCausalLM']}"},
            "code of another repository (evil/code--",
        ),
        (AUTO_MAP | {"AutoModelForCausalLM": "modeling_missing.Missing"}, "does not load"),
    ],
)
def test_code_that_is_not_whole_or_not_here_is_told(
    hub: Hub, commands: Forks, folder: Path, auto_map: dict[str, str], words: str
) -> None:
    config = json.loads((folder / "homemade" / "config.json").read_text()) | {"auto_map": auto_map}
    changed = {"config.json": json.dumps(config).encode()}
    commit = hub.put_model("acme/odd", folder / "homemade", **changed)
    reference = f"acme/odd@{commit}"
    assert words in told(commands.run("build", reference, "--trust-remote-code", *QUICK, folder=folder))


def test_a_tokenizer_with_code_of_another_repository_is_refused(
    hub: Hub, commands: Forks, folder: Path
) -> None:
    settings = {"auto_map": {"AutoTokenizer": [None, "evil/code--tokenization_evil.Evil"]}}
    changed = {"tokenizer_config.json": json.dumps(settings).encode()}
    commit = hub.put_model("acme/borrowed", folder / "homemade", **changed)
    words = ("build", f"acme/borrowed@{commit}", "--trust-remote-code", *QUICK)
    assert "code of another repository (evil/code--" in told(commands.run(*words, folder=folder))
    assert not [r for r in hub.requests if "evil" in r.path]
