"""A published build made again, elsewhere: equal weights, or a reason why not."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from factory.artifacts import Build, DataSource, Share
from factory.builds.reproduce import check_same_texts, comparison, same_settings
from factory.errors import DataError
from factory.text.text import NOTHING, Text, Texts
from tests.builders.builds import a_build, demo_healed
from tests.builders.commands import HEAVY, QUICK
from tests.builders.models import save_llama, save_lora
from tests.builders.texts import rhymes
from tests.forks import Ended, Forks
from tests.loopback_hub import Hub

SHORT = "--drop 0.4 --tasks none --samples 4 --eval-documents 2 --sequence-length 32 --heal-steps 3"
TEXTS = [word for use in ("calibration", "heal", "eval") for word in (f"--{use}-data", "acme/rhymes")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reproduce")


@pytest.fixture(scope="module")
def commands(served_hub: Hub, folder: Path) -> Iterator[Forks]:
    variables = served_hub.environment(folder / "hf") | {"HF_HUB_DISABLE_XET": "1"}
    process = Forks(variables, modules=(*HEAVY, "factory.healing.heal", "factory.healing.merge", "datasets"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def world(served_hub: Hub, commands: Forks, folder: Path) -> Hub:
    """A Hub with a model, a data set, and a published build of both, alice/smaller."""
    served_hub.reset()
    served_hub.put_model("acme/tiny", save_llama(folder / "tiny", num_layers=6, max_length=2048))
    put_rhymes(served_hub, "first")
    for name in ("measured", "healed", "evaluated"):
        lines = [json.dumps({"text": f"{name} {text}"}) for text in rhymes(8)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    made = run(commands, folder, "build", "acme/tiny", *SHORT.split(), *TEXTS, "--push-to", "alice/smaller")
    assert made.code == 0, made.stderr
    return served_hub


def put_rhymes(hub: Hub, word: str) -> None:
    files = {
        f"{split}.jsonl": "\n".join(json.dumps({"text": f"{word} {split} {text}"}) for text in rhymes(16))
        for split in ("train", "validation")
    }
    hub.put_dataset("acme/rhymes", {name: text.encode() for name, text in files.items()})


def run(commands: Forks, folder: Path, *words: str, home: str = "home") -> Ended:
    return commands.run(*words, *(["--home", home] if words[0] == "build" else []), folder=folder)


def told(ended: Ended) -> str:
    """The one error and its hint."""
    assert ended.code in (1, 2), ended.stderr
    assert len(ended.stderr.splitlines()) == 2
    return ended.stderr


def test_a_published_build_comes_out_equal_although_model_and_data_have_moved_on(
    world: Hub, commands: Forks, folder: Path
) -> None:
    world.put_model("acme/tiny", save_llama(folder / "other", num_layers=6, seed=1, max_length=2048))
    put_rhymes(world, "second")
    done = run(commands, folder, "build", "alice/smaller", "--reproduce", home="elsewhere")
    assert done.code == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the same weights as alice/smaller, byte for byte"
    assert "✓ heal" in done.stdout
    again = folder / "builds" / "tiny-drop40-reproduced"
    published = world.files("alice/smaller")
    assert (again / "model" / "model.safetensors").read_bytes() == published["model.safetensors"]
    first, second = (
        Build.read(folder / "builds" / name) for name in ("tiny-drop40", "tiny-drop40-reproduced")
    )
    moments = {"seconds", "speed"}
    assert first.model_dump(exclude=moments) == second.model_dump(exclude=moments)


def test_a_build_folder_can_be_repeated_too(world: Hub, commands: Forks, folder: Path) -> None:
    words = ("build", "builds/tiny-drop40", "--reproduce", "--out", "third", "--json")
    done = run(commands, folder, *words)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["reproduced"] == "the same weights as builds/tiny-drop40, byte for byte"


def test_a_build_of_an_adapter_is_repeated_on_the_base_as_it_was(
    world: Hub, commands: Forks, folder: Path
) -> None:
    base = save_llama(folder / "base", num_layers=6)
    adapter = save_lora(folder / "adapter", base)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "acme/base"}))
    commits = [world.put_model("acme/tuned", adapter), world.put_model("acme/base", base)]
    made = run(commands, folder, "build", "acme/tuned", *QUICK, "--push-to", "alice/cut")
    assert made.code == 0, made.stderr
    assert "✓ assemble" in made.stdout
    lineage = Build.read(folder / "builds" / "tuned-drop40").source.lineage
    assert lineage
    assert [lineage.adapter.commit, lineage.base.commit] == commits
    assert "base_model: acme/tuned" in world.files("alice/cut")["README.md"].decode()
    world.put_model("acme/base", save_llama(folder / "moved", num_layers=6, seed=1))
    files = ["--calibration-data", "measured.jsonl", "--eval-data", "evaluated.jsonl"]
    again = run(commands, folder, "build", "alice/cut", "--reproduce", "--dry-run", *files)
    assert again.code == 0, again.stderr
    assert "every stage is finished" in again.stdout


def test_a_mix_is_repeated_with_its_shares_and_its_data_sets_pinned() -> None:
    build = demo_healed()
    hub = DataSource(name="acme/rhymes", version="a0" * 20, hub_id="acme/rhymes", split="train")
    file = DataSource(name="own.jsonl", version="b0" * 32)
    parts = (Share(data=hub, share=2), Share(data=file, share=0.5))
    data = DataSource(name="acme/rhymes*2 + own.jsonl*0.5", version="c0" * 32, mixed=parts)
    assert build.adapter
    build = build.model_copy(update={"adapter": build.adapter.model_copy(update={"data": data})})
    files = {"measure": (), "heal": ("mine.jsonl",), "evaluate": ()}
    config = same_settings(build, files=files, tasks=())
    assert config.heal.data == (f"acme/rhymes@{'a0' * 20}*2", "mine.jsonl*0.5")
    with pytest.raises(DataError, match=r"own\.jsonl .* only its author has"):
        same_settings(build, files=files | {"heal": ()}, tasks=())


def test_what_would_make_it_another_build_is_refused(world: Hub, commands: Forks, folder: Path) -> None:
    for option in (["--drop", "0.3"], ["--heal-lr", "1e-4"], ["--no-heal"], ["--seed", "1"]):
        done = run(commands, folder, "build", "alice/smaller", "--reproduce", *option)
        assert done.code == 2
        assert "with --reproduce" in told(done)
    assert "--drop is missing" in told(run(commands, folder, "build", "acme/tiny"))


def test_a_text_that_was_a_file_must_be_given_and_be_the_same(
    world: Hub, commands: Forks, folder: Path
) -> None:
    assert run(commands, folder, "build", "acme/tiny", *QUICK, "--out", "of-files").code == 0
    words = ("build", "of-files", "--reproduce", "--out", "of-files-again")
    assert "pass it with --calibration-data" in told(run(commands, folder, *words))
    texts = ("--calibration-data", "measured.jsonl", "--eval-data")
    wrong = told(run(commands, folder, *words, *texts, "measured.jsonl"))
    assert "measured.jsonl is" in wrong
    assert "pass the same file with --eval-data" in wrong
    done = run(commands, folder, *words, *texts, "evaluated.jsonl", home="files")
    assert done.code == 0, done.stderr
    assert "the same weights as of-files" in done.stdout


def test_what_cannot_be_repeated_is_told(world: Hub, commands: Forks, folder: Path) -> None:
    def repeat(reference: str) -> str:
        return told(run(commands, folder, "build", reference, "--reproduce"))

    assert "acme/tiny has no build.json" in repeat("acme/tiny")
    assert "tiny has no build.json" in repeat("tiny")
    assert "no repository alice/nothing" in repeat("alice/nothing")
    assert "no revision 'v9'" in repeat("alice/smaller@v9")
    written = json.loads((folder / "builds" / "tiny-drop40" / "build.json").read_text())
    for name, change, words in (
        ("newer", {"factory_version": "9.1", "new_field": 1}, "written by factory 9.1, and"),
        ("odd", {"factory_version": "9.1", "config": {}}, "written by factory 9.1, and"),
        ("local", {"source": written["source"] | {"repo_id": None}}, "was made from a local folder, 'tiny'"),
    ):
        (folder / name).mkdir()
        (folder / name / "build.json").write_text(json.dumps(written | change))
        assert words in repeat(f"./{name}")
    (folder / "broken").mkdir()
    (folder / "broken" / "build.json").write_text("{")
    assert "damaged" in repeat("./broken")


@pytest.mark.parametrize(
    ("use", "given", "message", "hint"),
    [
        ("evaluate", 2, "--eval-data: 2 given, but {name} was made with e.jsonl", "give 1"),
        ("heal", 1, "--heal-data: 1 given, but {name} was made with no such text", "omit --heal-data"),
    ],
)
def test_texts_that_the_build_did_not_have_are_refused(use: str, given: int, message: str, hint: str) -> None:
    build = demo_healed()
    source = build.evaluations["source"]
    data = DataSource(name="e.jsonl", version="0" * 64)
    judged = {"source": source.model_copy(update={"loss": source.loss.model_copy(update={"data": data})})}
    build = build.model_copy(update={"evaluations": build.evaluations | judged, "adapter": None})
    files = {"measure": (), "heal": (), "evaluate": ("e.jsonl",)} | {use: ("x.jsonl",) * given}
    with pytest.raises(DataError) as caught:
        same_settings(build, files=files, tasks=())
    assert caught.value.message == message.format(name=build.name)
    assert str(caught.value.hint).startswith(hint)


def test_another_column_of_the_same_file_is_refused() -> None:
    build = demo_healed()
    data = DataSource(name="a.csv", version="0" * 64)
    texts = {
        name: Text(data.model_copy(update={"name": name}), list[str]().__iter__)
        for name in ("a.csv", "a.csv#body")
    }
    build = build.model_copy(update={"calibration": data, "adapter": None})
    evaluation = Text(build.evaluations["source"].loss.data, list[str]().__iter__)
    check_same_texts(build, Texts(texts["a.csv"], NOTHING, evaluation))
    with pytest.raises(DataError, match=r"a\.csv#body is another column than a\.csv, which"):
        check_same_texts(build, Texts(texts["a.csv#body"], NOTHING, evaluation))


def test_other_weights_are_told_with_what_was_different() -> None:
    published = demo_healed()
    made = a_build(
        **published.model_dump()
        | {
            "files": {"model.safetensors": "11" * 32},
            "versions": published.versions | {"torch": "2.14.0"},
            "device": "CPU, 2 threads",
        }
    )
    assert comparison(published, published, reference="me/x") == "the same weights as me/x, byte for byte"
    said = comparison(published, made, reference="me/x")
    assert said.startswith("weights differ from me/x in 1 of 1 files (torch 2.13.0 there, 2.14.0 here; ")
    assert "CPU, 2 threads here" in said


def test_what_a_strangers_record_claims_is_not_believed(world: Hub, commands: Forks, folder: Path) -> None:
    def repeat(*words: str, **change: object) -> Ended:
        record = json.dumps(written | change).encode()
        world.storage.put("model", "mallory/claims", {"build.json": record})
        return run(commands, folder, "build", "mallory/claims", "--reproduce", "--dry-run", *words)

    written = json.loads(world.files("alice/smaller")["build.json"])
    outside = repeat(name="../../outside\x1b[31m")
    assert outside.code == 0, outside.stderr
    assert outside.stdout.startswith("tiny → builds/tiny-drop40-reproduced\n")
    card = {"README.md": b"---\nlicense: [cc-by-nd-4.0]\n---\n"}
    commit = world.put_model("acme/strict", folder / "tiny", **card)
    strict = written["source"] | {"repo_id": "acme/strict", "commit": commit, "license": "mit"}
    assert "forbids sharing" in told(repeat("--push-to", "alice/free", source=strict))
    (folder / "here.yaml").write_text("task: here")
    tasks = written["config"]["evaluate"] | {"tasks": ["./here.yaml"]}
    config = written["config"] | {"evaluate": tasks}
    assert "pass it with --tasks" in told(repeat(config=config))
    assert "it has no evaluation of the source model" in told(repeat(evaluations={}))
    world.storage.put("model", "mallory/deep", {"build.json": b"[" * 100_000})
    assert "damaged" in told(run(commands, folder, "build", "mallory/deep", "--reproduce"))


@pytest.mark.parametrize(
    "part", ["1 of 2", "without any of 3 documents that serve another use (0123456789abcdef)"]
)
def test_a_text_that_is_divided_otherwise_is_refused(part: str) -> None:
    build = demo_healed()
    assert build.adapter
    calibration, healing, evaluation = (
        Text(data, list[str]().__iter__)
        for data in (build.calibration, build.adapter.data, build.evaluations["source"].loss.data)
    )
    check_same_texts(build, Texts(calibration, healing, evaluation))
    other = Text(healing.data.model_copy(update={"part": part}), healing.rows)
    with pytest.raises(DataError, match="stdlib:train is divided differently here") as caught:
        check_same_texts(build, Texts(calibration, other, evaluation))
    assert caught.value.hint == f"use factory {build.factory_version}"
