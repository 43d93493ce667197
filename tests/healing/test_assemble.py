"""An adapter in place of a model: merged into its base as peft merges it, or refused before any work."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from factory.api.progress import Bars
from factory.cli.main import cli
from factory.errors import CheckpointError, FactoryError, HubError, VerificationError
from factory.healing.assemble import assemble, check_adapter
from factory.hub.pull import pull
from factory.hub.resolve import resolve
from factory.pipeline.source import pull_and_trust
from tests.builders.models import save_llama, save_lora
from tests.loopback_hub import Hub
from tests.loopback_hub.client import Client


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `base`, and its `adapter`."""
    folder = tmp_path_factory.mktemp("made")
    save_llama(folder / "base")
    save_lora(folder / "adapter", folder / "base")
    return folder


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, to be changed."""
    return shutil.copytree(made / "adapter", tmp_path / "adapter")


def edit(adapter: Path, **fields: Any) -> Path:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return adapter


def checked(adapter: Path) -> None:
    check_adapter(resolve(str(adapter)))


def test_an_adapter_and_its_base_become_what_peft_makes_of_them(made: Path, tmp_path: Path) -> None:
    source = resolve(str(made / "adapter"))
    check_adapter(source)
    assemble(pull(source), folder=tmp_path)
    base = AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.float32)
    wanted = PeftModel.from_pretrained(base, made / "adapter").merge_and_unload().to(torch.bfloat16)
    found = load_file(tmp_path / "model.safetensors")
    before = load_file(made / "base" / "model.safetensors")
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted.state_dict()[name], rtol=0.01, atol=1e-4)
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "down_proj"}
    assert AutoTokenizer.from_pretrained(tmp_path)("a").input_ids


def test_a_source_made_of_an_adapter_records_both_commits_and_follows_each(made: Path, adapter: Path) -> None:
    source, base = resolve(str(adapter)), resolve(str(made / "base"))
    assert source.lineage
    assert (source.name, source.repo_id) == ("adapter", None)
    assert source.lineage.base.commit == base.commit
    assert (source.num_parameters, source.layer_bytes) == (base.num_parameters, base.layer_bytes)
    edit(adapter, lora_alpha=16)
    changed = resolve(str(adapter))
    assert changed.lineage
    assert changed.lineage.adapter.commit != source.lineage.adapter.commit
    assert len({source.commit, changed.commit, base.commit}) == 3
    assert json.loads(source.model_dump_json()).keys() >= {"lineage"}
    assert "unmerged" not in json.loads(source.model_dump_json())


def test_layers_of_an_adapter_are_pruned_and_its_merge_serves_again(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    arguments = [str(made / "adapter"), "--layers", "1", "--out", str(out), "--home", str(home)]
    cli.main(["prune", *arguments], standalone_mode=False)
    shown = capsys.readouterr()
    assert "adapter merged into base" in shown.out + shown.err
    in_use: list[Any] = []
    again = pull_and_trust(resolve(str(made / "adapter")), Bars(), home=home, in_use=in_use)
    (merged,) = (home / "stages" / "assemble").glob("*/model.safetensors")
    assert (again.folder, again.unmerged) == (merged.parent, None)
    assert [file.closed for file in in_use] == [False]
    whole, cut = load_file(merged), load_file(out / "model.safetensors")
    moved = "mlp.down_proj.weight"
    assert torch.equal(cut[f"model.layers.1.{moved}"], whole[f"model.layers.2.{moved}"])
    assert json.loads((out / "pruning.json").read_text())["lineage"]["base"]["name"] == "base"


def test_a_tokenizer_of_the_adapters_own_takes_the_place_of_the_bases(
    made: Path, adapter: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(made / "base", tmp_path / "base")
    (base / "chat_template.jinja").write_text("base")
    (base / "LICENSE").write_text("base")
    edit(adapter, base_model_name_or_path=str(base))
    folders = [tmp_path / name for name in ("as-base", "own")]
    for folder in folders:
        folder.mkdir()
    assemble(pull(resolve(str(adapter))), folder=folders[0])
    assert (folders[0] / "chat_template.jinja").read_text() == "base"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter)
    (adapter / "LICENSE").write_text("adapter")
    source = resolve(str(adapter))
    assemble(pull(source), folder=folders[1])
    assert not source.has_chat_template
    assert not (folders[1] / "chat_template.jinja").exists()
    assert (folders[1] / "tokenizer.json").is_file()
    assert (folders[1] / "LICENSE").read_text() == "base"
    assert (folders[1] / "adapter-LICENSE").read_text() == "adapter"


# Refused, before anything is written -------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 4], [2, 4]]}, "layer_replication"),
        ({"bias": "all"}, "bias=all"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": None}, "names no peft_type"),
        ({"r": 0}, "r 0"),
        ({"lora_alpha": "x"}, "lora_alpha x"),
        ({"base_model_name_or_path": None}, "does not name its base"),
        ({"base_model_name_or_path": ["x"]}, "does not name its base"),
        ({"base_model_name_or_path": "/home/alice/model"}, "'/home/alice/model', which is not here"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_by_the_reason(
    adapter: Path, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError) as refused:
        checked(edit(adapter, **fields))
    assert words in refused.value.message
    assert "\n" not in refused.value.message + refused.value.hint


def test_an_adapter_of_an_adapter_of_packed_weights_or_of_nothing_is_refused(
    made: Path, adapter: Path, tmp_path: Path
) -> None:
    edit(adapter, base_model_name_or_path=str(made / "adapter"))
    with pytest.raises(CheckpointError, match=r"base of the adapter adapter: .* is an adapter itself"):
        checked(adapter)
    packed = shutil.copytree(made / "base", tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (packed / "config.json").write_text(json.dumps(config))
    edit(adapter, base_model_name_or_path=str(packed))
    with pytest.raises(CheckpointError, match=r"packed weights \(bitsandbytes\)") as refused:
        checked(adapter)
    assert "the unquantised model" in refused.value.hint
    edit(adapter, base_model_name_or_path=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"base of the adapter adapter: .* neither model\.safetensors"):
        checked(adapter)


def test_an_adapter_of_another_model_is_refused_from_the_headers(adapter: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", num_layers=3)
    with pytest.raises(VerificationError, match=r"layers\.3\..*does not store"):
        checked(edit(adapter, base_model_name_or_path=str(other)))


def test_weights_that_are_not_lora_pairs_or_not_there_are_refused(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.ones(2, 2)}, path)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight', which is not half of a LoRA pair"):
        checked(adapter)
    save_file({}, path)
    with pytest.raises(CheckpointError, match="no LoRA tensors"):
        checked(adapter)
    path.rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled weights \(adapter_model\.bin\)"):
        checked(adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"an adapter without adapter_model\.safetensors"):
        checked(adapter)


def test_nothing_is_written_for_an_adapter_that_is_refused(adapter: Path, tmp_path: Path) -> None:
    edit(adapter, use_dora=True)
    home, out = tmp_path / "home", tmp_path / "out"
    arguments = ["prune", str(adapter), "--layers", "1", "--out", str(out), "--home", str(home)]
    with pytest.raises(FactoryError, match="use_dora"):
        cli.main(arguments, standalone_mode=False)
    assert not home.exists()
    assert not out.exists()


# On the Hub --------------------------------------------------------------------------------------


@pytest.fixture
def client(served_hub: Hub, tmp_path: Path) -> Any:
    client = Client(served_hub, tmp_path / "hub-home")
    yield client
    client.close()


def test_an_adapter_on_the_hub_is_pulled_with_its_base_and_found_again_without_the_hub(
    hub: Hub, client: Client, made: Path, adapter: Path, tmp_path: Path
) -> None:
    (adapter / "README.md").write_text("---\nlicense: mit\n---\n")
    (adapter / "optimizer.pt").write_bytes(b"x")
    card = b"---\nlicense: llama3.1\n---\n"
    base = hub.put_model("org/base", made / "base", **{"README.md": card})
    commit = hub.put_model("me/tuned", edit(adapter, base_model_name_or_path="org/base"))
    found = client.call("parts_of_adapter", "me/tuned", token=None)
    assert found.error is None, found.message
    origins = found.value["lineage"]
    assert origins["adapter"] == {"name": "tuned", "repo_id": "me/tuned", "commit": commit}
    assert origins["base"] == {"name": "base", "repo_id": "org/base", "commit": base}
    assert (found.value["license"], found.value["base_models"]) == (["mit", "llama3.1"], ["me/tuned"])
    here, there = map(Path, found.value["folders"])
    assert {path.name for path in here.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert (there / "model.safetensors").is_file()
    offline = Client(hub, tmp_path / "hub-home", HF_HUB_OFFLINE="1")
    assert offline.call("parts_of_adapter", "me/tuned", token=None).value == found.value
    offline.close()
    hub.put_model("org/base", made / "base", **{"README.md": b"moved on"})
    pinned = client.call("resolve", "me/tuned", base=f"org/base@{base}", token=None)
    assert pinned.value["commit"] == found.value["commit"]
    assert client.call("resolve", "me/tuned", token=None).value["commit"] != found.value["commit"]


@pytest.mark.parametrize(
    ("base", "words"),
    [("org/nowhere", "the base of the adapter me/tuned: "), ("./adapter", "which is not here")],
)
def test_a_base_that_the_hub_lacks_is_named_with_its_adapter_and_no_folder_is_taken_for_it(
    hub: Hub, client: Client, adapter: Path, base: str, words: str
) -> None:
    hub.put_model("me/tuned", edit(adapter, base_model_name_or_path=base))
    refused = client.call("resolve", "me/tuned", token=None)
    assert refused.error in (HubError.__name__, CheckpointError.__name__)
    assert words in refused.message
    assert refused.hint
