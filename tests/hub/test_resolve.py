"""A folder is read with suspicion: what cannot be is refused by its field, what is odd is made plain."""

import json
from pathlib import Path
from typing import Any

import pytest

from factory.checkpoint.header import TensorInfo
from factory.errors import CheckpointError
from factory.hub.resolve import resolve
from factory.model.architecture import DecoderStack, _by_layer
from tests.builders.models import save_llama


def edited(folder: Path, **values: Any) -> Path:
    path = save_llama(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_where_a_model_was_on_disk_is_not_recorded(tmp_path: Path) -> None:
    assert "alice" not in str(resolve(str(edited(tmp_path, _name_or_path="/home/alice/x"))).config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", ["llama"]),
        ("text_config", "x"),
        ("num_hidden_layers", 0),
        ("vocab_size", -1),
        ("vocab_size", "many"),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [3]),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_field(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=field):
        resolve(str(edited(tmp_path, **{field: value})))


@pytest.mark.parametrize(("field", "value"), [("num_hidden_layers", 3), ("hidden_size", 32)])
def test_weights_of_another_model_are_refused(tmp_path: Path, field: str, value: int) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json says"):
        resolve(str(edited(tmp_path, **{field: value})))


def test_an_adapter_beside_whole_weights_is_refused_by_name(tmp_path: Path) -> None:
    save_llama(tmp_path)
    resolve(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"an adapter \(adapter_config\.json\) beside its weights"):
        resolve(str(tmp_path))


def test_layers_of_multi_token_prediction_may_follow_the_last(tmp_path: Path) -> None:
    folder = edited(tmp_path, num_hidden_layers=3, num_nextn_predict_layers=1)
    assert resolve(str(folder)).num_layers == 3


def test_card_metadata_becomes_text(tmp_path: Path) -> None:
    card = "---\nlanguage: [no, en]\nlicense_name: 3\n---\n"
    (save_llama(tmp_path) / "README.md").write_text(card)
    source = resolve(str(tmp_path))
    assert (source.languages, source.license_name) == (("no", "en"), "3")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("[cc-by-nd-4.0, other]", ("cc-by-nd-4.0", "other")),
        ("[mit]", "mit"),
        ("[mit, null, false, mit, [cc-by-nd-4.0]]", ("mit", "cc-by-nd-4.0")),
        ("{name: CC-BY-ND-4.0, link: LICENSE}", "CC-BY-ND-4.0"),
        ("&a [mit, *a]", None),  # an alias of itself: the whole front matter is left unread
        ("[2.0, mit]", ("2.0", "mit")),
        ("unknown", "unknown"),
        ("[]", None),
        ("''", None),
        ("no", None),
        ("2026-01-01", None),
    ],
)
def test_every_licence_that_a_card_names_is_read(
    tmp_path: Path, written: str, read: str | tuple[str, ...] | None
) -> None:
    (save_llama(tmp_path) / "README.md").write_text(f"---\nlicense: {written}\n---\n")
    assert resolve(str(tmp_path)).license == read


def test_what_a_folder_descends_from_is_read_of_its_card_and_paths_are_not(tmp_path: Path) -> None:
    card = "---\nbase_model: [org/base, /home/me/base, ./base, org/base, 3]\n---\n"
    (save_llama(tmp_path) / "README.md").write_text(card)
    assert resolve(str(tmp_path)).base_models == ("org/base",)


def named(name: object) -> str:
    return json.dumps({"factory_version": "0.0.1", "name": name})


@pytest.mark.parametrize(
    ("folder", "build", "name"),
    [
        ("builds/x/model", named("Llama-drop34"), "Llama-drop34"),
        ("elsewhere", named("Llama-drop34"), "elsewhere"),
        ("builds/x/model", '{"name": "no build of ours"}', "model"),
        ("builds/x/model", "{", "model"),
        ("builds/x/model", "[]", "model"),
        ("builds/x/model", named("../../x"), "model"),
        ("builds/x/model", named(".."), "model"),
        ("builds/x/model", named("a/b"), "model"),
        ("builds/x/model", named("x" * 300), "model"),
        ("builds/x/model", named(3), "model"),
        ("Llama-tuned/checkpoint-500", "", "Llama-tuned-checkpoint-500"),
        (f"models--org--Llama-3/snapshots/{'0' * 40}", "", "Llama-3"),
        (f"models--Llama-3/snapshots/{'0' * 40}", "", "0" * 40),
    ],
)
def test_a_folder_whose_own_name_says_nothing_is_called_after_what_it_holds(
    tmp_path: Path, folder: str, build: str, name: str
) -> None:
    save_llama(tmp_path / folder)
    (tmp_path / folder / "build.json").write_text(build)
    assert resolve(str(tmp_path / folder)).name == name


@pytest.mark.parametrize("name", ["a\u2028b.jinja", "a\nb", "a\udcff.txt"])
def test_a_file_name_that_is_no_line_is_refused(tmp_path: Path, name: str) -> None:
    (save_llama(tmp_path) / name).touch()
    with pytest.raises(CheckpointError, match="has a file named 'a"):
        resolve(str(tmp_path))


def test_each_layer_has_its_tensors_and_too_many_are_refused() -> None:
    names = [f"layers.{index}.{part}" for index in (0, 1, 10) for part in "ab"] + ["x.layers.0.a"]
    tensors = {name: TensorInfo(name, "F32", (1,), Path("x"), 0, 4) for name in names}
    layers = _by_layer(tensors, DecoderStack("llama", 2, "layers."))
    assert [[tensor.name for tensor in layer] for layer in layers] == [names[:2], names[2:4]]
    with pytest.raises(CheckpointError, match="10,001 layers"):
        _by_layer(tensors, DecoderStack("llama", 10_001, "layers."))


def test_a_name_has_no_control_characters(tmp_path: Path) -> None:
    assert resolve(str(save_llama(tmp_path / "a\x1b[31m\nb"))).name == "a[31mb"


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE", "additional_chat_templates/rag.jinja"])
def test_whatever_gets_copied_counts_for_the_commit_of_a_folder(tmp_path: Path, name: str) -> None:
    before = resolve(str(save_llama(tmp_path))).commit
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    assert resolve(str(tmp_path)).commit != before
