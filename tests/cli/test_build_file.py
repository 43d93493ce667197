"""Build files: they mean what the flags mean, and what is wrong in one is said with its line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from factory.cli.build_file import BuildOptions
from factory.cli.build_file import read as buildfile_read
from factory.cli.main import main
from factory.config.request import BuildRequest
from factory.errors import UsageError
from factory.evaluation.tasks import task_identity
from tests.builders.commands import asked
from tests.places import GOLDEN

SCHEMA = GOLDEN / "build.schema.json"

WRONG = (  # the file, the line that is named, what else the message must say
    ("model: demo\ndrop: 0.3\nheal_steps: 5\n", 3, "unknown key 'heal_steps'"),
    ("model: demo\ndrop: 0.3\nheal-step: 5\n", 3, "unknown key 'heal-step'"),
    ("model: demo\ndorp: 0.3\n", 2, "unknown key 'dorp'"),
    ("model: demo\ndrop: 0.3\nhome: /tmp\n", 3, "unknown key 'home'"),
    ("<<: {drop: 0.3}\nmodel: demo\n", 1, "unknown key '<<'"),
    ("model: demo\nbuilds:\n- drop: 0.3\n  sampels: 9\n", 4, "unknown key 'sampels'"),
    ("model: demo\nbuilds:\n- drop: 0.3\n- builds: []\n", 4, "unknown key 'builds'"),
    ("model: demo\ndrop: 30%\n", 2, "drop: '30%'"),
    ("model: demo\ndrop: 0\n", 2, "drop: 0"),
    ("model: demo\ndrop: 1.5\n", 2, "drop: 1.5"),
    ("model: demo\ndrop: .nan\n", 2, "drop: nan"),
    ("model: demo\ndrop: true\n", 2, "drop: True"),
    ("model: demo\ndrop:\n", 2, "drop: None"),
    ("model: demo\ndrop: '0.3'\n", 2, "drop: '0.3'"),
    ("model: 7\ndrop: 0.3\n", 1, "model: 7"),
    ("model: [demo]\ndrop: 0.3\n", 1, "model: ['demo']"),
    ("model: mistral-7\ndrop: 0.3\n", 1, "'mistral-7'"),
    ("model: ./nowhere\ndrop: 0.3\n", 1, "'./nowhere'"),
    ("drop: 0.3\n", 1, "model is missing"),
    ("model: demo\n", 1, "--drop is missing"),
    ("model: demo\ndrop: 0.01\n", 2, "--drop 0.01"),
    ("model: demo\nlayers: 3\ndrop: 0.3\n", 2, "--layers with --drop"),
    ("model: demo\nlayers: 3,x\n", 2, "'x' is not a layer number"),
    ("model: demo\nlayers: [3, 3]\n", 2, "names layer 3 twice"),
    ("model: demo\nlayers: [3, [4]]\n", 2, "layers: [3, [4]]"),
    ("model: demo\nlayers: 99\n", 2, "99"),
    ("model: demo\ndrop: 0.3\nsamples: 1\n", 3, "samples: 1"),
    ("model: demo\ndrop: 0.3\nsamples: 8.5\n", 3, "samples: 8.5"),
    ("model: demo\ndrop: 0.3\nsamples: many\n", 3, "samples: 'many'"),
    ("model: demo\ndrop: 0.3\nheal-lr: .inf\n", 3, "heal-lr: inf"),
    ("model: demo\ndrop: 0.3\nheal-lr: -1e-4\n", 3, "heal-lr: -0.0001"),
    ("model: demo\ndrop: 0.3\nseed: 4294967296\n", 3, "seed: 4294967296"),
    ("model: demo\ndrop: 0.3\nno-heal: yes\n", 3, "no-heal: 'yes'"),
    ("model: demo\ndrop: 0.3\nheal: rl\n", 3, "heal: 'rl'"),
    ("model: demo\ndrop: 0.3\ncriterion: best\n", 3, "criterion: 'best'"),
    ("model: demo\ndrop: 0.3\nsequence-length: 99999\n", 3, "--sequence-length 99999"),
    ("model: demo\ndrop: 0.3\nheal-data: nix.jsonl\n", 3, "'nix.jsonl'"),
    ("model: demo\ndrop: 0.3\neval-data: []\n", 3, "--eval-data: () should have at least 1 item"),
    ("model: demo\ndrop: 0.3\nfor-runtimes: []\n", 3, "--for-runtimes: () should have at least 1 item"),
    ("model: demo\ndrop: 0.3\ntasks: mmlu,\n", 3, "--tasks 'mmlu,'"),
    ("model: demo\ndrop: 0.3\npush-to: a b\n", 3, "--push-to 'a b'"),
    ("model: demo\ndrop: 0.3\npublic: true\n", 3, "--public without --push-to"),
    ("model: demo\ndrop: 0.3\ndrop: 0.2\n", 3, "duplicate key 'drop', first in line 2"),
    ("model: demo\ndrop: 0.3\n  samples: 8\n", 3, "mapping values are not allowed"),
    ("model: demo\ndrop: 0.3\n\tsamples: 8\n", 3, "cannot start any token"),
    ("model: demo\ndrop: [0.3\n", 3, "expected"),
    ("model: demo\ndrop: 0.3\n---\nmodel: demo\n", 3, "another document"),
    ("model: demo\ndrop: !!python/name:os.system ''\n", 2, "tags are not supported"),
    ("a: &a 0.3\ndrop: *a\nmodel: demo\n", 2, "aliases"),
    ("model: demo\ndrop: 0.3\nout: \x00\n", 3, "invalid character"),
    ("model: demo\ndrop: 0.3\non: ''\n", 3, "on: '' should have at least 1 character"),
    ("model: demo\ndrop: 0.3\non: ' '\n", 3, "--on is empty"),
    ("model: demo\ndrop: 0.3\nout: ''\n", 3, "out: ''"),
    ("model: demo\non: cpu-basic\ndrop: 0.3\nstate: me/x\n", 4, "--state cannot be combined with --on"),
    ("model: demo\nbuilds: []\ndrop: 0.3\n", 2, "builds: []"),
    ("model: demo\nbuilds: demo\n", 2, "builds: 'demo'"),
    ("model: demo\nbuilds:\n- drop: 0.3\n- 0.4\n", 4, "0.4"),
    ("model: demo\nbuilds:\n- drop: 0.3\n- drop: 0.30\n", 4, "builds/demo-drop30 is already used"),
    ("drop: 0.3\nbuilds:\n- model: demo\n- samples: 8\n", 4, "model is missing"),
    ("- model: demo\n", 1, "not a list of options"),
    ("demo\n", 1, "'demo'"),
    ("", 1, "model is missing"),
)


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The command line in this process: it imports pydantic once for all files."""
    monkeypatch.setattr("sys.argv", ["factory", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(str(stop.code or 0))
    return 0


@pytest.mark.parametrize(("text", "line", "said"), WRONG)
def test_a_wrong_file_is_one_line_that_names_key_and_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    line: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FACTORY_HOME", str(tmp_path / "home"))
    Path("build.yaml").write_text(text)
    assert run("build", "build.yaml", monkeypatch=monkeypatch) in (1, 2)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert len(lines) == 2, err
    assert lines[0].startswith(f"error: build.yaml, line {line}: ")
    assert said in lines[0]
    assert lines[1].startswith("hint: ")
    assert out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["build.yaml"]


def test_forty_files_are_wrong_in_different_ways() -> None:
    assert len({text for text, _, _ in WRONG}) == len(WRONG) >= 40


@pytest.mark.parametrize(
    ("key", "near"),
    [("heal_steps", "heal-steps"), ("dorp", "drop"), ("Push-To", "push-to"), ("build", "builds")],
)
def test_an_unknown_key_offers_the_nearest(tmp_path: Path, key: str, near: str) -> None:
    path = tmp_path / "build.yaml"
    path.write_text(f"model: demo\n{key}: 1\n")
    with pytest.raises(UsageError) as caught:
        buildfile_read(path)
    assert f"did you mean {near!r}?" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"model: demo\nout: \xff\n", "line 2: not UTF-8"),
        (b"[" * 200_000, "nested"),
        (b"#" * 10**6 + b"\n", "1 MB"),
    ],
)
def test_a_file_that_is_no_text_or_a_trap_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "build.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        buildfile_read(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nix\.yaml: No such file"):
        buildfile_read(tmp_path / "nix.yaml")


def as_file(found: list[BuildRequest], path: Path) -> Path:
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in found[0].file_values().items()))
    return path


FLAGS = {
    "drop": st.floats(0.01, 0.99),
    "calibration-data": st.sampled_from(["stdlib:train", "allenai/c4:en@main"]),
    "samples": st.integers(2, 10**6),
    "sequence-length": st.integers(8, 2**20),
    "tokens": st.sampled_from(["last", "all"]),
    "load-in-4bit": st.just(None),
    "plan-documents": st.integers(2, 99),
    "seed": st.integers(0, 2**32 - 1),
    "criterion": st.sampled_from(["angular", "greedy", "loss"]),
    "tasks": st.sampled_from(["none", "mmlu", "mmlu,boolq"]),
    "no-heal": st.just(None),
    "heal": st.sampled_from(["sft", "distill"]),
    "heal-steps": st.integers(1, 99),
    "heal-lr": st.floats(1e-9, 1.0),
    "out": st.sampled_from(["x", "a b/ü"]),
    "push-to": st.sampled_from(["me/x", "x"]),
    "accept-license": st.just(None),
}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries({}, optional=FLAGS), st.booleans())
def test_a_file_asks_for_the_same_as_its_flags(
    tmp_path: Path, flags: dict[str, Any], over_a_file: bool
) -> None:
    flags.setdefault("drop", 0.3)
    words = [w for k, v in flags.items() for w in ([f"--{k}"] if v is None else [f"--{k}", str(v)])]
    typed = asked("demo", *words)
    path = as_file(typed, tmp_path / "build.yaml")
    (read,) = asked(str(path), *(words if over_a_file else []))
    assert read == typed[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--on", ""], "`on`"),
        (["--state", ""], "`state`"),
        (["--on", "cpu-basic", "--state", "me/x"], "`state` cannot be combined with `on`"),
        (["--on", "cpu-basic", "--home", "x"], "`home` cannot be combined with `on`"),
    ],
)
def test_no_flag_is_passed_over_in_silence(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        asked("demo", "--drop", "0.3", *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", ""], "--out is empty"),
        (["--home", " "], "--home is empty"),
        (["--out", "x" * 400], "File name too long"),
        (["--out", "x" * 250], "File name too long"),  # for what it is laid out in
        (["--home", "x" * 5000], "File name too long"),
        (["--samples", "9" * 400], "is not from"),
        (["--heal-rank", "9" * 400], "is not from"),
        (["--seed", "9" * 5000], " characters)"),
        (["--drop", "9" * 5000], " characters)"),
        (["--seam-weight", "nan"], "--seam-weight: nan"),
        (["--tasks", "x" * 400 + ".yaml"], "does not exist"),
    ],
)
def test_a_value_without_measure_is_one_short_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FACTORY_HOME", str(tmp_path / "home"))
    assert run("build", "demo", "--drop", "0.3", *words, monkeypatch=monkeypatch) in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert said in lines[0]
    assert max(map(len, lines)) < 800
    assert list(tmp_path.iterdir()) == []


def test_a_task_whose_name_is_too_long_for_a_file_is_a_name() -> None:
    assert task_identity("x" * 400) == "x" * 400


def test_what_is_typed_goes_before_the_file_and_an_entry_before_what_all_share(tmp_path: Path) -> None:
    path = tmp_path / "build.yaml"
    path.write_text(
        "model: demo\nsamples: 8\ndrop: 0.5\nbuilds:\n- {}\n- samples: 9\n- layers: 3,5-6\n  out: x\n"
    )
    found = asked(str(path))
    assert [(r.samples, r.drop, r.layers) for r in found] == [
        (8, 0.5, None),
        (9, 0.5, None),
        (8, None, (3, 5, 6)),
    ]
    found = asked(str(path), "--drop", "0.2", "--samples", "7")
    assert [(r.samples, r.drop, r.layers) for r in found] == [(7, 0.2, None)] * 3


def test_the_printed_file_asks_for_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--layers", "3,7-9", "--no-heal", "--heal-lr", "1e-5", "--load-in-4bit", "--tasks", "none"]
    assert run("build", "demo", *words, "--print-config", monkeypatch=monkeypatch) == 0
    path = tmp_path / "build.yaml"
    path.write_text(capsys.readouterr().out)
    typed = asked("demo", *words)
    assert asked(str(path)) == typed
    path.write_text("model: demo\nbuilds: [{drop: 0.1}, {drop: 0.2, out: x}]\n")
    assert run("build", str(path), "--print-config", monkeypatch=monkeypatch) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    before, after = asked(str(path)), asked(str(tmp_path / "again.yaml"))
    assert before == after


def test_a_file_holds_every_option_that_says_what_to_build() -> None:
    fields = {str(field.alias) for field in BuildOptions.model_fields.values()}
    of_run = {"reproduce", "home", "detach", "upload", "rerun"}
    assert fields == {name.replace("_", "-") for name in BuildRequest.options().keys() - of_run}


def test_the_published_schema_is_that_of_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a wanted change: UPDATE_GOLDEN=1 pytest tests/cli/test_build_file.py."""
    assert run("schema", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    if os.environ.get("UPDATE_GOLDEN"):
        SCHEMA.write_text(printed)
    assert printed == SCHEMA.read_text()
    described = json.loads(printed)["properties"]
    assert described["samples"]["minimum"] == 2
    assert all(field.get("description") for key, field in described.items() if key != "builds")
