"""Deploying the comparison Space: what it holds, names and costs, and that a second time changes nothing."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from factory.builds.integrity import take_sums
from factory.resources import SPACE as APP
from factory.store.files import sha256_of_file
from tests.builders.builds import demo_healed
from tests.builders.commands import LIGHT
from tests.builders.files import content_of
from tests.builders.models import save_llama
from tests.forks import Ended, Forks
from tests.loopback_hub import Hub
from tests.loopback_hub.storage import Repository

SOURCE = "acme/tiny"
MODEL = "alice/tiny-drop30"
SPACE = f"{MODEL}-compare"


@pytest.fixture(scope="module")
def commands(served_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    variables = served_hub.environment(tmp_path_factory.mktemp("hf")) | {"HF_HUB_DISABLE_XET": "1"}
    process = Forks(variables, modules=(*LIGHT, "factory.builds.deploy_space"))
    yield process
    process.close()


@pytest.fixture
def build(hub: Hub, tmp_path: Path) -> Path:
    """A build of acme/tiny that was not published yet."""
    folder = tmp_path / "build"
    save_llama(folder / "model", num_layers=2)
    commit = hub.put_model(SOURCE, folder / "model")
    source = demo_healed().source.model_copy(update={"name": "tiny", "repo_id": SOURCE, "commit": commit})
    files = {"model.safetensors": sha256_of_file(folder / "model" / "model.safetensors")}
    made = demo_healed().model_copy(update={"reference": SOURCE, "source": source, "files": files})
    for place in (folder, folder / "model"):
        made.write(place)
    (folder / "model" / "recipe.yaml").write_text("drop: 0.3\n")
    take_sums(made, folder)
    return folder


@pytest.fixture
def pushed(commands: Forks, build: Path) -> Path:
    done = commands.run("push", str(build), MODEL, "--public", folder=build.parent)
    assert done.code == 0, done.stderr
    return build


def deployed(commands: Forks, build: Path, *options: str) -> Ended:
    done = commands.run("space", str(build), "--deploy", *options, folder=build.parent)
    assert done.code == 0, done.stderr
    return done


def refused(commands: Forks, build: Path, *options: str, code: int = 1) -> str:
    """The one error and its hint."""
    done = commands.run("space", str(build), "--deploy", *options, folder=build.parent)
    assert done.code == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("hint: ")
    return done.stderr


def space(hub: Hub, name: str = SPACE) -> Repository:
    return hub.repository(name, kind="space")


def variables(hub: Hub) -> dict[str, str]:
    return {key: entry["value"] for key, entry in space(hub).fields["variables"].items()}


def front_matter(readme: bytes) -> dict[str, object]:
    fields: dict[str, object] = yaml.safe_load(readme.decode().split("---\n")[1])
    return fields


def changes(hub: Hub) -> list[tuple[str, str]]:
    """Every request that could have changed something."""
    return [
        (request.method, request.path)
        for request in hub.requests
        if request.method in ("POST", "PUT", "DELETE")
        and not request.path.startswith(("/api/validate-yaml", f"/api/models/{MODEL}/paths-info"))
    ]


def test_a_name_that_no_space_can_have_is_refused_before_anything_is_written(
    hub: Hub, commands: Forks, pushed: Path
) -> None:
    before, requests = content_of(pushed), len(hub.requests)
    assert "'alice/two words' is not a repository name" in refused(commands, pushed, "alice/two words")
    assert (content_of(pushed), len(hub.requests)) == (before, requests)


def test_the_space_gets_its_files_in_one_commit_and_its_variables_first(
    hub: Hub, commands: Forks, pushed: Path
) -> None:
    done = deployed(commands, pushed)
    assert (done.stdout, done.stderr) == (f"{hub.url}/spaces/{SPACE}\n", "")
    repository, files = space(hub), hub.files(SPACE, kind="space")
    own = {path.name: path.read_bytes() for path in APP.iterdir() if path.is_file()}
    del own["terminal.py"]  # of `factory chat`
    assert files.keys() == own.keys()
    assert {name for name in own if files[name] != own[name]} == {"README.md"}
    assert front_matter(files["README.md"]) == front_matter(own["README.md"]) | {
        "title": "tiny and tiny-drop30",
        "models": [SOURCE, MODEL],
        "tags": ["hf-factory"],
    }
    assert files["README.md"].split(b"---\n", 2)[2] == own["README.md"].split(b"---\n", 2)[2]
    assert len(repository.commits) == 2
    assert (repository.fields["sdk"], repository.fields["hardware"]) == ("gradio", "zero-a10g")
    assert not repository.private
    assert variables(hub) == {
        "SOURCE_MODEL": SOURCE,
        "SOURCE_REVISION": hub.repository(SOURCE).refs["main"],
        "PRUNED_MODEL": MODEL,
        "PRUNED_REVISION": hub.repository(MODEL).refs["main"],
    }
    paths = [path for _, path in changes(hub)]
    assert paths[-1] == f"/api/spaces/{SPACE}/commit/main"
    assert paths.count(f"/api/spaces/{SPACE}/variables") == 4


def test_the_card_links_to_the_space_and_the_link_outlives_a_push(
    hub: Hub, commands: Forks, pushed: Path
) -> None:
    before = hub.files(MODEL)
    deployed(commands, pushed)
    after = hub.files(MODEL)
    assert {name for name in after if after[name] != before.get(name)} == {"README.md"}
    link = f"[{SPACE}](https://huggingface.co/spaces/{SPACE})"
    assert link in after["README.md"].decode()
    assert commands.run("card", str(pushed), folder=pushed.parent).code == 0
    again = commands.run("push", str(pushed), MODEL, "--public", folder=pushed.parent)
    assert (again.code, again.stderr) == (0, "note: already up to date\n")
    assert hub.files(MODEL) == after
    assert json.loads((pushed / "publication.json").read_text())["space"] == SPACE


def test_deploying_again_changes_nothing(hub: Hub, commands: Forks, pushed: Path) -> None:
    deployed(commands, pushed)
    hub.requests.clear()
    done = deployed(commands, pushed)
    assert changes(hub) == []
    assert (done.stdout, done.stderr) == (f"{hub.url}/spaces/{SPACE}\n", "note: already up to date\n")
    deployed(commands, pushed, "--hardware", "zero-a10g")
    assert changes(hub) == []


def test_a_space_is_brought_up_to_date_where_it_differs(hub: Hub, commands: Forks, pushed: Path) -> None:
    deployed(commands, pushed)
    hub.storage.put("space", SPACE, {"app.py": b"old", "notes.txt": b"mine"})
    space(hub).fields["variables"]["SOURCE_REVISION"]["value"] = "main"
    space(hub).fields["variables"]["MAX_NEW_TOKENS"] = {"value": "64", "description": None}
    hub.requests.clear()
    deployed(commands, pushed)
    files = hub.files(SPACE, kind="space")
    assert files["app.py"] == (APP / "app.py").read_bytes()
    assert files["notes.txt"] == b"mine"
    assert variables(hub)["SOURCE_REVISION"] == hub.repository(SOURCE).refs["main"]
    assert variables(hub)["MAX_NEW_TOKENS"] == "64"
    assert hub.count("POST", "/variables") == hub.count("POST", "/commit/") == 1


def test_another_name_and_other_hardware_are_taken(hub: Hub, commands: Forks, pushed: Path) -> None:
    hub.storage.paying.add("alice")
    done = deployed(commands, pushed, "mine", "--hardware", "t4-small")
    assert done.stdout == f"{hub.url}/spaces/alice/mine\n"
    assert space(hub, "alice/mine").fields["hardware"] == "t4-small"
    deployed(commands, pushed)  # it is known by now
    assert ("space", SPACE) not in hub.storage.repositories
    assert space(hub, "alice/mine").fields["hardware"] == "t4-small"
    deployed(commands, pushed, "--hardware", "l4x1")
    assert space(hub, "alice/mine").fields["hardware"] == "l4x1"


def test_a_402_says_what_else_is_possible_and_leaves_everything_as_it_was(
    hub: Hub, commands: Forks, pushed: Path
) -> None:
    before = hub.files(MODEL)
    told = refused(commands, pushed, "--hardware", "cpu-basic")
    assert f"requires payment to run {SPACE} on cpu-basic (402): A PRO subscription is required" in told
    assert "--hardware zero-a10g is free for two Spaces" in told
    assert "without --deploy the same page runs on this machine" in told
    for name in ("one", "two"):
        hub.storage.create("space", f"alice/{name}", hardware="zero-a10g")
    assert "may have two Spaces on ZeroGPU: delete one" in refused(commands, pushed)
    assert ("space", SPACE) not in hub.storage.repositories
    assert hub.files(MODEL) == before


def test_a_402_for_other_hardware_keeps_the_space_as_it_is(hub: Hub, commands: Forks, pushed: Path) -> None:
    deployed(commands, pushed)
    assert "to run alice/tiny-drop30-compare on a100-large (402)" in refused(
        commands, pushed, "--hardware", "a100-large"
    )
    assert space(hub).fields["hardware"] == "zero-a10g"


def test_a_private_model_has_a_private_space_that_needs_a_token(
    hub: Hub, commands: Forks, build: Path
) -> None:
    assert commands.run("push", str(build), MODEL, folder=build.parent).code == 0
    done = deployed(commands, build)
    assert space(hub).private
    settings = f"{hub.url}/spaces/{SPACE}/settings"
    assert done.stderr == (
        f"note: not everyone may read {MODEL}: give the Space a secret HF_TOKEN that may, at {settings}\n"
    )
    space(hub).fields["secrets"] = {"HF_TOKEN": {"value": "x", "description": None}}
    assert deployed(commands, build).stderr == "note: already up to date\n"


def test_a_model_that_was_made_public_on_the_hub_has_a_public_space(
    hub: Hub, commands: Forks, build: Path
) -> None:
    assert commands.run("push", str(build), MODEL, folder=build.parent).code == 0
    hub.repository(MODEL).private = False
    assert deployed(commands, build).stderr == ""
    assert not space(hub).private


def test_a_model_that_was_made_private_takes_its_space_along_and_one_made_public_says_that_it_does_not(
    hub: Hub, commands: Forks, pushed: Path
) -> None:
    deployed(commands, pushed)
    assert not space(hub).private
    hub.repository(MODEL).private = True
    told = deployed(commands, pushed).stderr
    assert space(hub).private
    assert "up to date" not in told
    hub.repository(MODEL).private = False
    told = deployed(commands, pushed).stderr
    assert space(hub).private
    settings = f"{hub.url}/spaces/{SPACE}/settings"
    assert told == (
        "note: already up to date\n"
        f"note: the Space is private, its model public: {settings} makes it public\n"
    )


def test_an_edited_card_is_kept_and_told(hub: Hub, commands: Forks, pushed: Path) -> None:
    card = pushed / "model" / "README.md"
    card.write_bytes(card.read_bytes() + b"\nMine.\n")
    assert "the edited card was kept; link the Space" in deployed(commands, pushed).stderr
    assert hub.files(MODEL)["README.md"] == card.read_bytes()
    assert variables(hub)["PRUNED_REVISION"] == hub.repository(MODEL).refs["main"]


def test_somebody_elses_space_is_left_alone(hub: Hub, commands: Forks, pushed: Path) -> None:
    hub.storage.put("space", "alice/game", {"game.py": b"play", "README.md": b"---\ntitle: Game\n---\n"})
    assert "the Space alice/game has other files: game.py" in refused(commands, pushed, "alice/game")
    assert hub.files("alice/game", kind="space").keys() == {"game.py", "README.md"}


def test_a_build_that_was_not_published_is_refused_before_the_first_request(
    hub: Hub, commands: Forks, build: Path
) -> None:
    told = refused(commands, build)
    assert "has not been published" in told
    assert f"factory push {build}" in told
    assert not hub.requests


def test_a_repository_that_holds_another_build_by_now_is_refused(
    hub: Hub, commands: Forks, pushed: Path
) -> None:
    hub.storage.put("model", MODEL, {"build.json": b"{}"})
    assert f"the main branch of {MODEL} does not contain this build" in refused(commands, pushed)
    assert ("space", SPACE) not in hub.storage.repositories
    del hub.storage.repositories["model", MODEL]
    assert f"no repository {MODEL}" in refused(commands, pushed)


def test_a_source_that_a_space_could_not_load_is_refused(hub: Hub, commands: Forks, pushed: Path) -> None:
    hub.requests.clear()
    known = json.loads((pushed / "build.json").read_text())
    for change, told in (
        ({"repo_id": None}, "the source of demo-drop30, 'tiny': it is not on the Hub"),
        ({"remote_code": True}, "tiny needs its own code"),
    ):
        (pushed / "build.json").write_text(json.dumps(known | {"source": known["source"] | change}))
        assert told in refused(commands, pushed, code=2 if "repo_id" in change else 1)
    assert not hub.requests


def test_options_that_do_not_go_together_are_refused(hub: Hub, commands: Forks, pushed: Path) -> None:
    assert "--deploy runs nothing on this machine" in refused(commands, pushed, "--port", "8000", code=2)
    done = commands.run("space", str(pushed), "--hardware", "t4-small", folder=pushed.parent)
    assert (done.code, "--hardware without --deploy" in done.stderr) == (2, True)


def test_a_deployment_cut_short_is_completed_by_the_same_command(
    hub: Hub, commands: Forks, pushed: Path
) -> None:
    faults = [hub.fail("POST", f"/{MODEL}/commit/", status=403), hub.fail("POST", "/variables", status=403)]
    for fault in faults:
        assert "may not write" in refused(commands, pushed)
        fault.times = 0
    deployed(commands, pushed)
    assert len(space(hub).commits) == 2
    assert len(variables(hub)) == 4
    assert SPACE in hub.files(MODEL)["README.md"].decode()
