"""Whole builds through the real command line: what they leave, how they resume, what they say."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from factory.artifacts import Build
from tests.builders.models import save_llama
from tests.builders.texts import rhymes
from tests.forks import Ended, Forks, fork_once
from tests.kills import MODULES
from tests.loopback_hub import Hub
from tests.waiting import HUNG_SECONDS

QUICK = [
    "--samples",
    "8",
    "--sequence-length",
    "128",
    "--heal-steps",
    "3",
    "--limit",
    "12",
    "--eval-documents",
    "4",
]
DEMO = ["build", "demo", "--drop", "0.3", *QUICK]
TINY = ["--sequence-length", "64", "--heal-steps", "4"]
SPLITS = ("train", "validation")

INHERITED = (
    "PATH",
    "PYTHONPATH",
    "HOME",
    "COVERAGE_PROCESS_START",
    "COVERAGE_PROCESS_CONFIG",
    "ATEN_CPU_CAPABILITY",  # how sums are rounded, and on what: as in the processes of `forks`
    "CUDA_VISIBLE_DEVICES",
)


def environment(home: Path, **more: str) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    own = {"FACTORY_HOME": str(home / "home"), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
    return inherited | own | {"OMP_NUM_THREADS": "1"} | more  # as in forks: with as many threads, equal bytes


def factory(*arguments: str, home: Path, **more: str) -> Ended:
    return fork_once(environment(home, **more), *arguments, folder=home)


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """For most builds: what they import takes longer than what they do."""
    harness = ("lm_eval.evaluator", "lm_eval.models.huggingface", "factory.evaluation.harness")
    process = Forks(environment(tmp_path_factory.mktemp("forks")), modules=(*MODULES, *harness))
    yield process
    process.close()


def forked(forks: Forks, *arguments: str, home: Path, before: str = "") -> Ended:
    """As `factory`, with nothing left to import."""
    own = f"import os; os.environ['FACTORY_HOME'] = {str(home / 'home')!r}"
    return forks.run(*arguments, folder=home, before=f"{own}\n{before}")


@pytest.fixture(scope="module")
def built(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed build of the demo; the folder it was made in."""
    home = tmp_path_factory.mktemp("built")
    done = forked(forks, *DEMO, home=home)
    assert done.code == 0, done.stderr
    (home / "output").write_text(done.stdout)
    return home


BUILD = Path("builds") / "demo-drop30"


def test_the_build_says_what_it_will_do_what_it_does_and_what_came_of_it(built: Path) -> None:
    output = (built / "output").read_text()
    assert "dropping 7 of 24 (29%)" in output
    for stage in (
        "measure",
        "plan",
        "prune",
        "heal",
        "merge",
        "evaluate source",
        "evaluate healed",
        "evaluate healed 2",
        "speed",
        "card",
    ):
        assert f"✓ {stage}" in output
    assert "source" in output
    assert "Loss on stdlib:held-out (like), nats per token" in output
    assert "factory push builds/demo-drop30" in output
    assert "\x1b" not in output  # no terminal, no colours


def test_the_table_and_the_build_agree(built: Path) -> None:
    build = Build.read(built / BUILD)
    output = (built / "output").read_text()
    for evaluation in build.evaluations.values():
        assert f"{evaluation.loss.nats:.3f} ± {evaluation.loss.stderr:.3f}" in output


def test_a_text_like_the_healing_text_and_one_unlike_it_are_told_apart(built: Path) -> None:
    build = Build.read(built / BUILD)
    names = ("stdlib:held-out", "stdlib:prose")
    for evaluation in build.evaluations.values():
        assert tuple(loss.data.name for loss in evaluation.losses) == names
    compared = [one for one in build.comparisons["healed"] if one.measure == "loss"]
    healing = build.healing
    assert tuple(one.text for one in compared) == tuple(one.text for one in healing) == names
    for index, one in enumerate(healing):
        pruned, healed = (build.evaluations[name].losses[index].nats for name in ("pruned", "healed"))
        assert one.difference == pytest.approx(healed - pruned, abs=1e-4)
    card = (built / BUILD / "model" / "README.md").read_text()
    for page in ((built / "output").read_text(), card):
        assert "Loss on stdlib:held-out (like), nats per token" in page
        assert "Loss on stdlib:prose (unlike), nats per token" in page
    output = (built / "output").read_text()
    assert "On stdlib:held-out, like the healing text, " in output
    assert "On stdlib:prose, unlike the healing text, " in output
    assert card.count("| evaluation text |") == 2


def test_nothing_in_the_published_folder_names_a_place_or_a_user(built: Path) -> None:
    for path in (built / BUILD / "model").rglob("*"):
        if path.suffix in (".json", ".md", ".svg"):
            text = path.read_text()
            assert str(built) not in text
            assert os.environ.get("HOME", "/root") + "/" not in text


def test_the_published_folder_is_complete(built: Path) -> None:
    model = built / BUILD / "model"
    names = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert names >= {
        "README.md",
        "build.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "figures/angular-distance.png",
        "figures/angular-distance.svg",
        "figures/healing.png",
    }
    assert not names & {"stage.json", "checkpoint.json", "adapter_model.safetensors"}


RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokens = tokenizer("def main():", return_tensors="pt").input_ids
settings = dict(max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True)
written = model.generate(tokens, use_cache=True, **settings)
uncached = model(written.sequences[:, :-1], use_cache=False).logits[:, tokens.shape[1] - 1 :]
print(json.dumps({
    "parameters": model.num_parameters(),
    "layers": model.config.num_hidden_layers,
    "steps": len(written.logits),
    "off by": float((torch.stack(written.logits, dim=1) - uncached).abs().max()),
}))
"""


def test_the_model_loads_elsewhere_and_gives_the_same_logits_with_and_without_a_cache(built: Path) -> None:
    done = fork_once(environment(built), str(built / BUILD / "model"), folder=built, program=RELOAD)
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    build = Build.read(built / BUILD)
    assert found["steps"] > 1
    assert found["off by"] < 1e-3
    assert found["layers"] == 24 - 7
    assert found["parameters"] == build.result_parameters
    assert f"{build.result_parameters / 1e6:.2f}" in (built / BUILD / "model" / "README.md").read_text()


def test_a_second_build_reuses_every_stage_and_imports_nothing_heavy(built: Path) -> None:
    program = (
        "import sys; from factory.cli.main import main\n"
        f"sys.argv = ['factory', *{DEMO!r}]\n"
        "main()\n"
        "print(sorted({'torch', 'transformers', 'trl', 'peft', 'datasets', 'lm_eval'} & set(sys.modules)))"
    )
    before = (built / BUILD / "build.json").read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=built,
        env=environment(built),
        capture_output=True,
        text=True,
        timeout=HUNG_SECONDS,
        check=True,
    )
    assert "nothing to do" in done.stdout
    assert "✓" not in done.stdout
    assert done.stdout.count("reused") == 13
    assert done.stdout.splitlines()[-1] == "[]"
    assert (built / BUILD / "build.json").read_bytes() == before


def test_a_build_file_and_the_same_flags_have_the_same_stage_keys(forks: Forks, built: Path) -> None:
    printed = forked(forks, *DEMO, "--print-config", home=built)
    (built / "build.yaml").write_text(printed.stdout)
    (built / "two.yaml").write_text(f"{printed.stdout}builds: [{{}}, {{no-heal: true, out: other}}]\n")
    done = forked(forks, "build", "build.yaml", home=built)
    assert done.code == 0, done.stderr
    assert done.stdout.count("reused") == 13
    done = forked(forks, "build", "two.yaml", home=built)
    assert done.code == 0, done.stderr
    assert done.stdout.count("reused") == 13 + 7
    summary = done.stdout.splitlines()[-3:]
    assert [line.split()[0] for line in summary] == ["build", str(BUILD), "other"]
    assert Build.read(built / "other").stages.items() < Build.read(built / BUILD).stages.items() | {
        ("speed", Build.read(built / "other").stages["speed"])
    }


def test_one_build_that_fails_does_not_stop_those_after_it(forks: Forks, built: Path, hub: Hub) -> None:
    online = {**hub.environment(built / "hf"), "HF_HUB_OFFLINE": "0"}
    text = forked(forks, *DEMO, "--print-config", home=built).stdout
    (built / "three.yaml").write_text(f"{text}builds: [{{push-to: bob/x}}, {{no-heal: true, out: other}}]\n")
    done = factory("build", "three.yaml", home=built, **online)
    assert done.code == 1
    note, error = done.stderr.splitlines()[:2]
    assert note == "note: three.yaml, line 8: --heal-steps has no effect: --no-heal skips healing"
    assert error.startswith(f"error: {BUILD}: your token may not write to bob/x")
    assert "failed: your token" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("other")


def test_another_fraction_that_means_the_same_layers_shares_their_checkpoint(
    forks: Forks, built: Path
) -> None:
    done = forked(forks, "build", "demo", "--drop", "0.31", *QUICK, home=built)
    assert done.code == 0, done.stderr
    assert done.stdout.count("reused") == 12
    assert "✓ card" in done.stdout
    assert (built / "builds" / "demo-drop31" / "model" / "model.safetensors").stat().st_nlink > 1


def test_json_is_the_build_and_nothing_else_on_standard_output(forks: Forks, built: Path) -> None:
    done = forked(forks, *DEMO, "--json", home=built)
    assert done.code == 0
    assert Build.model_validate(json.loads(done.stdout)).plan.num_layers == 24


def test_show_prints_the_map_and_the_table(forks: Forks, built: Path) -> None:
    done = forked(forks, "show", str(BUILD), home=built)
    assert done.code == 0, done.stderr
    assert "Loss on stdlib:prose (unlike), nats per token" in done.stdout


def test_ls_and_gc_know_what_the_builds_use(forks: Forks, built: Path) -> None:
    assert "evaluate" in forked(forks, "ls", home=built).stdout
    found = json.loads(forked(forks, "ls", "--json", home=built).stdout)
    (build,) = [one for one in found["builds"] if Path(one["folder"]).name == BUILD.name]
    assert (build["model"], build["num_layers"]) == ("demo", 24)
    assert sum(stage["size_bytes"] for stage in found["stages"]) == found["size_bytes"]
    assert any(build["folder"] in stage["builds"] for stage in found["stages"])
    assert json.loads(forked(forks, "show", "--json", str(BUILD), home=built).stdout)["name"] == BUILD.name
    assert json.loads(forked(forks, "gc", "--dry-run", "--json", home=built).stdout)["freed_bytes"] == 0
    assert forked(forks, "gc", "--dry-run", home=built).stdout == "0 bytes could be freed\n"


INTERRUPT = r"""
import os, re, signal, sys
def watch(name, arguments):
    if name == "os.mkdir" and re.search(r"stages/measure/\w+\.partial$", str(arguments[0])):
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(watch)
"""


def test_an_interrupted_build_says_how_to_go_on(forks: Forks, tmp_path: Path) -> None:
    done = forked(forks, *DEMO, home=tmp_path, before=INTERRUPT)
    assert done.code == 130
    assert done.stderr.strip() == "error: interrupted\nhint: the same command resumes from here"


def test_a_build_without_healing_ships_the_pruned_model(forks: Forks, built: Path) -> None:
    done = forked(
        forks, *DEMO, "--no-heal", "--heal-data", "not-there.jsonl", "--out", "unhealed", home=built
    )
    assert done.code == 0, done.stderr
    build = Build.read(built / "unhealed")
    assert build.config["heal"]["data"] == "nothing"
    assert (build.shipped, build.adapter, sorted(build.evaluations)) == ("pruned", None, ["pruned", "source"])
    assert "this build was not healed" in done.stdout


def test_a_folder_that_is_no_build_is_not_overwritten(forks: Forks, built: Path) -> None:
    (built / "mine").mkdir()
    (built / "mine" / "thesis.txt").write_text("years of work")
    done = forked(forks, *DEMO, "--out", "mine", home=built)
    assert done.code == 1
    assert "mine already exists and is not a build folder" in done.stderr
    assert (built / "mine" / "thesis.txt").read_text() == "years of work"


def test_any_folder_can_be_built_from_local_files_though_its_tracker_fails(
    forks: Forks, tmp_path: Path
) -> None:
    save_llama(tmp_path / "tiny", num_layers=6, max_length=2048)
    for name in ("calibration", "healing", "evaluation"):
        lines = [json.dumps({"text": f"{name} {text}"}) for text in rhymes(30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    texts = "--calibration-data calibration.jsonl --heal-data healing.jsonl --eval-data evaluation.jsonl"
    (tmp_path / "tensorboard.py").write_text("raise OSError('no room')")
    command = ("build", "tiny", "--drop", "0.4", *texts.split(), *TINY, "--report-to", "tensorboard")
    done = forked(forks, *command, home=tmp_path, before=f"import sys; sys.path.insert(0, {str(tmp_path)!r})")
    assert done.code == 0, done.stderr
    assert done.stderr == "note: tensorboard failed; healing continues without it: no room\n"
    build = Build.read(tmp_path / "builds" / "tiny-drop40")
    assert len(build.dropped) == 2
    assert build.reference == "tiny"
    assert build.calibration.name == "calibration.jsonl"
    assert not build.evaluations["source"].tasks


def test_a_build_is_published_whole_and_comes_back_byte_for_byte(built: Path, hub: Hub) -> None:
    online = {**hub.environment(built / "hf"), "HF_HUB_OFFLINE": "0"}
    done = factory(*DEMO, "--push-to", "smaller-demo", home=built, **online)
    assert done.code == 0, done.stderr
    assert f"{hub.url}/alice/smaller-demo" in done.stdout
    model = built / BUILD / "model"
    local = {p.relative_to(model).as_posix(): p.read_bytes() for p in model.rglob("*") if p.is_file()}
    assert hub.files("alice/smaller-demo") == local
    assert "alice/smaller-demo" in local["README.md"].decode()
    publication = json.loads((built / BUILD / "publication.json").read_text())
    assert publication["private"] is True
    again = factory("push", str(BUILD), "smaller-demo", home=built, **online)
    assert again.code == 0, again.stderr
    assert len(hub.repository("alice/smaller-demo").commits) == 2  # the Hub's own first one, and ours


def test_a_model_and_texts_from_the_hub_are_pinned_to_their_commits(tmp_path: Path, hub: Hub) -> None:
    commit = hub.put_model("acme/tiny", save_llama(tmp_path / "tiny", num_layers=6, max_length=2048))
    lines = {name: [json.dumps({"text": f"{name} {text}"}) for text in rhymes(30)] for name in SPLITS}
    files = {f"{name}.jsonl": "\n".join(rows).encode() for name, rows in lines.items()}
    data = hub.put_dataset("acme/rhymes", files)
    online = {**hub.environment(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    texts = [word for use in ("calibration", "heal", "eval") for word in (f"--{use}-data", "acme/rhymes")]
    command = ["build", "acme/tiny", "--drop", "0.4", *texts, "--tasks", "none", *TINY]
    done = factory(*command, home=tmp_path, **online)
    assert done.code == 0, done.stderr
    build = Build.read(tmp_path / "builds" / "tiny-drop40")
    assert (build.source.repo_id, build.source.commit) == ("acme/tiny", commit)
    assert build.calibration.version == data
    assert (build.calibration.split, build.adapter and build.adapter.data.split) == ("validation", "train")
    card = (tmp_path / "builds" / "tiny-drop40" / "model" / "README.md").read_text()
    assert "base_model: acme/tiny" in card
    assert "- acme/rhymes" in card
    assert "✓ pull" in done.stdout
    again = factory(*command, home=tmp_path, **online)
    assert again.stdout.count("reused") == 10, again.stderr
    assert "pull" not in again.stdout


def test_publishing_without_a_login_is_refused_before_the_build(forks: Forks, tmp_path: Path) -> None:
    done = forked(forks, *DEMO, "--push-to", "me/x", home=tmp_path)
    assert done.code == 1
    assert "hf auth login" in done.stderr
    assert not (tmp_path / "home").exists()


def bad_model(folder: Path, kind: str) -> None:
    folder.mkdir()
    if kind == "empty":
        return
    if kind == "pickle":
        (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 4}')
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}.")
    elif kind == "no decoder":
        save_llama(folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "bert", "architectures": ["BertModel"]}
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "problem"),
    [("empty", "model.safetensors"), ("pickle", "pytorch_model.bin"), ("no decoder", "bert")],
)
def test_a_folder_that_cannot_be_built_is_refused_in_one_line(
    forks: Forks, tmp_path: Path, kind: str, problem: str
) -> None:
    bad_model(tmp_path / "model", kind)
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "x"}\n')
    texts = [word for option in ("calibration", "heal", "eval") for word in (f"--{option}-data", str(data))]
    done = forked(forks, "build", "./model", "--drop", "0.5", *texts, home=tmp_path)
    assert done.code == 1, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert problem in lines[0]
    assert lines[1].startswith("hint: ")
    assert not (tmp_path / "home").exists()
    assert not (tmp_path / "builds").exists()
