"""`factory prune`: the layers that somebody chose go, and the folder is there whole or not at all."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

import factory.pruning.prune
import factory.pruning.verify
from factory.artifacts import layer_ranges
from factory.builds import pruned_folder as removal
from factory.builds.garbage import collect_garbage
from factory.cli.main import cli
from factory.config.options import read_layers
from factory.errors import DiskSpaceError, FactoryError, StoreError, UsageError, VerificationError
from tests.builders.models import save_llama
from tests.forks import fork_once
from tests.loopback_hub import Hub


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = save_llama(tmp_path / "model", num_layers=6)
    (folder / "LICENSE").write_text("do as you like")
    return folder


def prune(model: Path, layers: str, out: Path, *options: str) -> None:
    home = str(model.parent / "home")
    arguments = ["prune", str(model), "--layers", layers, "--out", str(out), "--home", home, *options]
    cli.main(arguments, standalone_mode=False)


# What was typed ----------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 99_999), min_size=1, max_size=30), st.sampled_from(["-", "–", " - "]))
def test_layers_read_as_they_are_shown(layers: set[int], dash: str) -> None:
    typed = layer_ranges(sorted(layers)).replace("–", dash)
    assert read_layers(typed) == tuple(sorted(layers))


@given(st.text(st.sampled_from("0123456789,- –."), max_size=12) | st.text(max_size=8))
def test_any_text_is_layers_or_a_usage_error(typed: str) -> None:
    try:
        layers = read_layers(typed)
    except UsageError:
        return
    assert layers == tuple(sorted(set(layers)))


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("", "'' is not a layer number"),
        ("a", "'a' is not a layer number"),
        ("1,,2", "'' is not a layer number"),
        ("-1", "'-1' is not a layer number"),
        ("1-2-3", "'1-2-3' is not a layer number"),
        ("0-999999999", "is not a layer number"),
        ("4-2", "4-2 is a descending range"),
        ("1,2,1", "names layer 1 twice"),
        ("1-3,3-4", "names layer 3 twice"),
        ("6", "`layers=6`: the model has layers 0 to 5"),
        ("0-5", "leaves 0 of 6 layers"),
        ("0-2,4,5", "leaves 1 of 6 layers"),
    ],
)
def test_layers_that_cannot_go_are_a_usage_error_with_their_value(
    tmp_path: Path, model: Path, layers: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        prune(model, layers, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The folder --------------------------------------------------------------------------------------


def test_the_folder_is_a_whole_model_and_says_what_it_was_made_from(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "deep" / "out"
    prune(model, "1,3-4", out)
    names = {path.name for path in out.iterdir()}
    assert names > {"model.safetensors", "config.json", "tokenizer.json", "LICENSE", "pruning.json"}
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 3
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"]
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    for new, old in enumerate((0, 2, 5)):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(after[name.format(new)], before[name.format(old)])
    told = json.loads((out / "pruning.json").read_text())
    assert (told["num_layers"], told["dropped"], told["source_name"]) == (6, [1, 3, 4], "model")
    assert told["verified"] == ["names and shapes", "logits"]
    assert str(tmp_path) not in json.dumps(told)
    assert {path.name for path in out.parent.iterdir()} == {"out"}


def test_what_goes_and_what_stays_is_said(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune(model, "1,3-4", tmp_path / "out")
    said = capsys.readouterr().out
    assert "3 of 6 layers: 1, 3–4" in said
    assert "3: 0, 2, 5" in said
    assert "verified: names and shapes, logits" in said


def test_a_dry_run_writes_nothing_and_promises_what_a_run_makes(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune(model, "2,5", tmp_path / "out", "--dry-run", "--json")
    promised = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    prune(model, "2,5", tmp_path / "out", "--json")
    made = json.loads(capsys.readouterr().out)
    assert promised["parameters_after"] == made["result_parameters"]
    assert promised["kept"] == made["kept"] == [0, 1, 3, 4]
    assert promised["verifies"] == made["verified"]


def test_the_same_command_again_does_nothing(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune(model, "2", tmp_path / "out", "--json")
    written = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    prune(model, "2", tmp_path / "out", "--json")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == written
    assert '"reused": true' in capsys.readouterr().out


def test_a_result_that_lost_a_file_is_made_again(tmp_path: Path, model: Path) -> None:
    prune(model, "2", tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    prune(model, "2", tmp_path / "out", "--force")
    assert load_file(tmp_path / "out" / "model.safetensors")


def test_another_result_is_replaced_only_by_force(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    prune(model, "2", out)
    with pytest.raises(StoreError, match="contains another model: model without 1 layers"):
        prune(model, "3,4", out)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 5
    prune(model, "3,4", out, "--force")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 4


def test_what_the_command_did_not_make_is_never_replaced(tmp_path: Path, model: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="was not made by `factory prune`"):
        prune(model, "2", tmp_path / "out", "--force")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("/", "cannot write a model to"),
        ("model/config.json/out", "cannot write a model to"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_place_that_takes_no_folder_is_refused(tmp_path: Path, model: Path, out: str, told: str) -> None:
    with pytest.raises(FactoryError, match=told):
        prune(model, "2", tmp_path / out)


@pytest.mark.parametrize("out", [".", "inside", ".."])
def test_the_source_is_never_written_over(tmp_path: Path, model: Path, out: str) -> None:
    before = sorted(model.rglob("*"))
    with pytest.raises(StoreError, match="are inside each other"):
        prune(model, "2", model / out, "--force")
    assert sorted(model.rglob("*")) == before


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path, model: Path, there: bool) -> None:
    target, out = tmp_path / "far" / "target", tmp_path / "out"
    if there:
        prune(model, "1", target)
    out.symlink_to(target)
    prune(model, "2", out, "--force")
    assert out.readlink() == target
    assert json.loads((target / "pruning.json").read_text())["dropped"] == [2]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "home", "far", "out"}
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("name", [".out.partial", ".out.old"])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_lies_beside_the_folder_and_is_not_the_factory_s_stays(
    tmp_path: Path, model: Path, name: str, kind: str
) -> None:
    work = tmp_path / (name if kind == "folder" else "work")
    work.mkdir()
    (work / "thesis.txt").write_text("years of work")
    if kind == "link":
        (tmp_path / name).symlink_to(work)
    elif kind == "file":
        (tmp_path / name).write_text("notes")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match=f"{name} is in the way and was not made by the factory"):
        prune(model, "2", tmp_path / "out", "--force")
    assert sorted(tmp_path.rglob("*")) == before
    assert (work / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "fields", [{"sliding_window": 1.5}, {"return_dict": None}, {"quantization_config": True}], ids=str
)
def test_a_model_that_transformers_cannot_run_is_told_in_one_line(
    tmp_path: Path, model: Path, fields: dict[str, Any]
) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(VerificationError, match=r"cannot be (run|loaded) by transformers: .+"):
        prune(model, "2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_attention_that_is_not_installed_is_not_needed(tmp_path: Path, model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_implementation": "flash_attention_2"}))
    prune(model, "2", tmp_path / "out")


@pytest.mark.parametrize("text", ['"\\ud800"', '"x"'])
def test_a_configuration_that_cannot_be_written_again_is_refused(
    tmp_path: Path, model: Path, text: str
) -> None:
    path = model / "config.json"
    changed = path.read_text().rstrip().removesuffix("}") + f', "num_nextn_predict_layers": {text}}}'
    path.write_text(changed)
    with pytest.raises(FactoryError, match=r"config\.json"):
        prune(model, "2", tmp_path / "out")


def test_a_failure_leaves_what_was_there_and_nothing_beside_it(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prune(model, "2", out)
    before = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(factory.pruning.verify, "RELATIVE_LIMIT", -1.0)
    with pytest.raises(FactoryError, match="logits differ"):
        prune(model, "3", out, "--force")
    assert (out / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "home"}


KILLED = """
import os, signal, sys
import factory.builds.pruned_folder
from factory.cli.main import cli
factory.builds.pruned_folder.sync_files = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
cli.main(sys.argv[1:], standalone_mode=False)
"""


def test_a_killed_run_is_not_taken_for_done_and_the_next_one_tidies_up(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    arguments = ["prune", str(model), "--layers", "2", "--out", str(out), "--home", str(tmp_path / "home")]
    killed = fork_once(os.environ, *arguments, folder=tmp_path, program=KILLED)
    assert killed.code == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {"model", "home", ".out.partial", ".out.lock"}
    prune(model, "2", out)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "home", "out"}


def test_a_run_killed_between_two_names_leaves_the_old_result_to_be_replaced_by_force_alone(
    tmp_path: Path, model: Path
) -> None:
    out = tmp_path / "out"
    prune(model, "1", out)
    prune(model, "3,4", tmp_path / "new")
    out.rename(tmp_path / ".out.old")
    (tmp_path / "new").rename(tmp_path / ".out.partial")
    left = [folder for folder, _ in collect_garbage(tmp_path / "home", recent=True)]
    assert left == []  # the only copies
    with pytest.raises(StoreError, match="contains another model: model without 1 layers"):
        prune(model, "3,4", out)
    assert json.loads((out / "pruning.json").read_text())["dropped"] == [1]
    prune(model, "3,4", out, "--force")
    assert json.loads((out / "pruning.json").read_text())["dropped"] == [3, 4]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "home", "out"}


def test_a_model_of_the_hub_is_pulled_at_its_commit(tmp_path: Path, model: Path, hub: Hub) -> None:
    commit = hub.put_model("alice/tiny", model)
    out = tmp_path / "out"
    own = os.environ | hub.environment(tmp_path) | {"FACTORY_HOME": str(tmp_path / "home")}
    command = ("prune", f"alice/tiny@{commit}", "--layers", "1-2", "--out", str(out))
    done = fork_once(own, *command, folder=tmp_path)
    assert done.code == 0, done.stderr
    assert json.loads((out / "pruning.json").read_text())["commit"] == commit
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 4


def test_too_little_disk_is_said_before_the_work(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "SPARE_BYTES", 10**18)
    with pytest.raises(DiskSpaceError, match=r"B of disk space is needed at .*B is free"):
        prune(model, "2", tmp_path / "out")


# Checking ----------------------------------------------------------------------------------------


def test_a_large_model_s_logits_are_compared_where_asked(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory.pruning.prune, "SMALL_PARAMETERS", 0)
    prune(model, "2", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["verified"] == [
        "names and shapes",
        "values",
    ]
    prune(model, "2", tmp_path / "out", "--verify", "full")
    assert "logits" in json.loads((tmp_path / "out" / "pruning.json").read_text())["verified"]


@pytest.mark.parametrize("experts", [False, True])
def test_models_that_do_not_fit_into_memory_are_run_from_disk(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, experts: bool
) -> None:
    if experts:  # fused on loading
        config = MixtralConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(model)
    monkeypatch.setattr(factory.pruning.verify, "get_max_memory", lambda: {"cpu": 400_000})
    seen: list[Any] = []
    forward = torch.nn.Module.__call__

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(getattr(self, "hf_device_map", {}).values())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", watched)
    prune(model, "2", tmp_path / "out", "--verify", "full")
    assert "disk" in seen
    assert {path.suffix for path in (tmp_path / "out").iterdir()} <= {".json", ".safetensors", ".jinja", ""}


def test_packed_weights_cannot_be_compared_in_full(tmp_path: Path, model: Path) -> None:
    path = model / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(UsageError, match=r"its weights are packed \(fp8\)"):
        prune(model, "2", tmp_path / "out", "--verify", "full")


def test_a_field_that_cannot_be_right_is_refused_before_anything_is_written(
    tmp_path: Path, model: Path
) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mystery": [0] * 6}))
    with pytest.raises(FactoryError, match="mystery has 6 entries"):
        prune(model, "2", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
