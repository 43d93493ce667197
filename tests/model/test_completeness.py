"""The model that is measured is the one in the files: what they lack is refused by its name and layer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from factory.artifacts import Source
from factory.cli.main import main
from factory.errors import CheckpointError
from factory.hub.resolve import resolve
from factory.model.completeness import check_source
from tests.builders.texts import rhymes
from tests.families import build, config_of

Tensors = dict[str, tuple[str, tuple[int, ...]]]
LAYER = "model.layers.3"


def source_of(folder: Path, model_type: str, **fields: Any) -> Source:
    build(config_of(model_type, **fields)).save_pretrained(folder)
    return resolve(str(folder))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return source_of(tmp_path_factory.mktemp("llama"), "llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return source_of(tmp_path_factory.mktemp("mixtral"), "mixtral")


def refusal(source: Source, change: Callable[[Tensors], Tensors], **fields: Any) -> CheckpointError:
    config = source.config | fields
    changed = source.model_copy(update={"tensors": change(dict(source.tensors)), "config": config})
    with pytest.raises(CheckpointError) as caught:
        check_source(changed)
    return caught.value


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: kind for name, kind in tensors.items() if name not in names}


def reshaped(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: ("F32", shape)}


def test_what_transformers_computes_or_leaves_unused_may_be_there_or_not(llama: Source) -> None:
    more: Tensors = {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (4,)), "value": ("F32", (1,))}
    check_source(llama.model_copy(update={"tensors": llama.tensors | more}))
    tied = {"tensors": without("lm_head.weight")(llama.tensors)}
    check_source(llama.model_copy(update=tied | {"config": llama.config | {"tie_word_embeddings": True}}))
    bare = {name.removeprefix("model."): kind for name, kind in llama.tensors.items()}
    check_source(llama.model_copy(update={"tensors": bare}))


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "base_model.model."])
def test_names_that_a_wrapper_left_are_refused_with_what_to_take_off(llama: Source, wrapper: str) -> None:
    error = refusal(llama, lambda tensors: {f"{wrapper}{name}": kind for name, kind in tensors.items()})
    assert f"begin with {wrapper!r}" in error.message
    assert f"remove {wrapper!r} from the names" in error.hint


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("lm_head.weight", "the weights lack lm_head.weight, and config.json does not tie it"),
        ("model.norm.weight", "the weights lack model.norm.weight"),
        (f"{LAYER}.mlp.up_proj.weight", f"the weights lack {LAYER}.mlp.up_proj.weight (layer 3)"),
    ],
)
def test_one_lost_tensor_is_refused_by_its_name_and_layer(llama: Source, lost: str, said: str) -> None:
    assert refusal(llama, without(lost)).message.startswith(said)


def test_a_tensor_is_named_as_in_the_files_where_transformers_names_it_otherwise(llama: Source) -> None:
    error = refusal(
        llama,
        lambda tensors: {
            name.removeprefix("model."): kind
            for name, kind in without(f"{LAYER}.mlp.up_proj.weight")(tensors).items()
        },
    )
    assert error.message == "the weights lack layers.3.mlp.up_proj.weight (layer 3)"


@pytest.mark.parametrize("part", ["w1", "w2", "w3"])
def test_one_lost_expert_is_refused_by_its_own_name(mixtral: Source, part: str) -> None:
    lost = f"{LAYER}.block_sparse_moe.experts.1.{part}.weight"
    assert lost in mixtral.tensors
    assert refusal(mixtral, without(lost)).message == f"the weights lack {lost} (layer 3)"


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(llama: Source, mixtral: Source) -> None:
    name = f"{LAYER}.mlp.up_proj.weight"
    said = f"{name} (layer 3) has shape [50, 32], config.json says [48, 32]"
    assert refusal(llama, reshaped(name, 50, 32)).message == said
    expert = "block_sparse_moe.experts.1.w1.weight"
    said = f"{LAYER}.{expert} has shape [50, 32], model.layers.0.{expert} [48, 32]"
    assert refusal(mixtral, reshaped(f"{LAYER}.{expert}", 50, 32)).message == said


def test_parameters_that_only_the_configuration_has_are_refused(llama: Source) -> None:
    error = refusal(llama, dict, attention_bias=True)
    assert "the weights lack model.layers.0.self_attn.k_proj.bias" in error.message


# The commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ("plan", "--drop", "0.25", "--calibration-data", "t.jsonl"),
        ("sweep", "--drop", "0.25,0.5", "--calibration-data", "t.jsonl"),
        ("build", "--drop", "0.25", "--dry-run", "--calibration-data", "t.jsonl", "--eval-data", "t.jsonl"),
        ("prune", "--layers", "3", "--out", "o", "--dry-run"),
    ],
    ids=lambda command: command[0],
)
def test_every_command_refuses_before_the_work(
    llama: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
) -> None:
    monkeypatch.setenv("FACTORY_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": f"{line} {number}"}) for number, line in enumerate(rhymes(40))]
    Path("t.jsonl").write_text("\n".join(lines) + "\n")
    shutil.copytree(llama.local_folder, "m")
    Path("m/config.json").write_text(json.dumps(llama.config | {"attention_bias": True}))
    heals = ("--no-heal",) if command[0] == "build" else ()
    monkeypatch.setattr("sys.argv", ["factory", command[0], "m", *command[1:], *heals])
    with pytest.raises(SystemExit):
        main()
    assert "the weights lack model.layers.0.self_attn.k_proj.bias" in capsys.readouterr().err
    assert not Path("home").exists()
