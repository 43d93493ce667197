"""Publishing through the command line: where it goes, what is in it, what the licence says."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from factory.artifacts import Build, DistanceProfile
from factory.builds.folder import check_out, kept_aside, lay_out
from factory.builds.integrity import accept, added_since_laid_out, check_whole, take_sums
from factory.builds.swap import leftovers
from factory.errors import StoreError, VerificationError
from factory.hub.push import label
from factory.report.card import write_card
from tests.builders.commands import HEAVY, QUICK
from tests.builders.files import content_of, flip_a_bit
from tests.builders.models import save_llama
from tests.builders.texts import rhymes
from tests.forks import Ended, Forks
from tests.loopback_hub import Hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("publication")


@pytest.fixture(scope="module")
def commands(served_hub: Hub, folder: Path) -> Iterator[Forks]:
    variables = served_hub.environment(folder / "hf") | {"FACTORY_HOME": str(folder / "home")}
    process = Forks(variables | {"HF_HUB_DISABLE_XET": "1"}, modules=HEAVY)
    yield process
    process.close()


@pytest.fixture(scope="module")
def built(served_hub: Hub, commands: Forks, folder: Path) -> Path:
    """A build of acme/tiny, licence mit; what the loopback Hub held is gone afterwards."""
    served_hub.reset()
    save_llama(folder / "tiny", num_layers=6)
    (folder / "tiny" / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("measured", "healed", "evaluated"):
        lines = [json.dumps({"text": f"{name} {text}"}) for text in rhymes(8)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    served_hub.put_model("acme/tiny", folder / "tiny")
    done = commands.run("build", "acme/tiny", *QUICK, folder=folder)
    assert done.code == 0, done.stderr
    return folder / "builds" / "tiny-drop40"


@pytest.fixture
def build(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "build")
    return tmp_path / "build"


def licensed(build: Path, **fields: str | list[str] | None) -> Path:
    """The build as if its source had another licence."""
    for path in (build / "build.json", build / "model" / "build.json"):
        value = json.loads(path.read_text())
        value["source"] |= fields
        path.write_text(json.dumps(value))
    (build / "model" / "README.md").unlink()  # of the other licence
    take_sums(Build.read(build), build)
    return build


def told(ended: Ended) -> str:
    """The one error and its hint."""
    assert ended.code == 1, ended.stderr
    lines = ended.stderr.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("hint: ")
    return ended.stderr


def test_by_default_it_goes_to_a_private_repository_named_after_model_and_fraction(
    hub: Hub, commands: Forks, build: Path
) -> None:
    done = commands.run("push", str(build), "--message", "First of all", folder=build.parent)
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout == f"{hub.url}/alice/tiny-drop40\n"
    repository = hub.repository("alice/tiny-drop40")
    assert repository.private
    assert hub.files("alice/tiny-drop40") == content_of(build / "model")
    assert [commit.message for commit in repository.commits.values()][1:] == ["First of all"]
    publication = json.loads((build / "publication.json").read_text())
    assert publication["commit"] == repository.refs["main"]
    assert publication["files"].keys() == content_of(build / "model").keys()


def test_the_recipe_says_what_it_was_made_of_and_how(build: Path) -> None:
    recipe = yaml.safe_load((build / "model" / "recipe.yaml").read_text())
    found = json.loads((build / "build.json").read_text())
    assert recipe["source"] == {"repo_id": "acme/tiny", "commit": found["source"]["commit"]}
    assert recipe["drop"] == 0.4
    assert recipe["measure"] == found["config"]["measure"]
    assert recipe["texts"]["measure"] == {
        "name": "measured.jsonl",
        "version": found["calibration"]["version"],
    }
    evaluated = found["evaluations"]["source"]["loss"]["data"]
    assert recipe["texts"]["evaluate"] == [{"name": "evaluated.jsonl", "version": evaluated["version"]}]
    assert recipe["dropped"] == found["plan"]["dropped"]


def test_a_second_push_sends_nothing(hub: Hub, commands: Forks, build: Path) -> None:
    def sent() -> list[str]:
        return [r.path for r in hub.requests if r.method in ("POST", "PUT") and "/validate-" not in r.path]

    assert commands.run("push", str(build), "twice", folder=build.parent).code == 0
    before = sent()
    assert (
        commands.run("push", str(build), "twice", folder=build.parent).stderr == "note: already up to date\n"
    )
    assert sent() == before


def test_builds_of_one_name_and_other_weights_are_told_apart(build: Path) -> None:
    one = Build.read(build)
    other = one.model_copy(update={"files": {"model.safetensors": 64 * "0"}})
    assert label(one) != label(other)
    assert {name.split()[0] for name in (label(one), label(other))} == {one.name}


def test_a_branch_and_a_pull_request_are_where_they_were_asked_for(
    hub: Hub, commands: Forks, build: Path
) -> None:
    hub.storage.put("model", "alice/shared", {"thesis.txt": b"years of work"})
    proposal = ("push", str(build), "alice/shared", "--create-pr")
    assert "--public" in told(commands.run(*proposal, folder=build.parent))
    for note in ("", "note: already up to date\n"):
        proposed = commands.run(*proposal, "--public", folder=build.parent)
        assert (proposed.code, proposed.stderr) == (0, note)
        assert proposed.stdout == f"{hub.url}/alice/shared/discussions/1\n"
    assert "model.safetensors" in hub.files("alice/shared", revision="refs/pr/1")
    assert hub.repository("alice/shared").pull_requests[1].title == f"Publish {label(Build.read(build))}"
    assert hub.files("alice/shared").keys() == {"thesis.txt"}
    branch = commands.run("push", str(build), "alice/own", "--revision", "v2", folder=build.parent)
    assert branch.code == 0, branch.stderr
    assert "model.safetensors" in hub.files("alice/own", revision="v2")
    assert hub.files("alice/own") == {}


def test_other_peoples_content_and_a_public_repository_are_left_alone(
    hub: Hub, commands: Forks, build: Path
) -> None:
    hub.storage.put("model", "alice/thesis", {"thesis.txt": b"years of work"})
    assert "thesis.txt" in told(commands.run("push", str(build), "alice/thesis", folder=build.parent))
    hub.storage.create("model", "alice/open")
    assert "--public" in told(commands.run("push", str(build), "alice/open", folder=build.parent))
    assert hub.files("alice/open") == {}
    public = commands.run("push", str(build), "alice/open", "--public", folder=build.parent)
    assert public.code == 0, public.stderr
    assert hub.files("alice/open") == content_of(build / "model")


def test_a_licence_that_forbids_it_stops_a_push_before_the_first_request(
    hub: Hub, commands: Forks, build: Path
) -> None:
    licensed(build, license="cc-by-nc-nd-4.0")
    refused = told(commands.run("push", str(build), "alice/nd", folder=build.parent))
    assert "cc-by-nc-nd-4.0, forbids sharing" in refused
    assert not hub.requests
    accepted = commands.run("push", str(build), "alice/nd", "--accept-license", folder=build.parent)
    assert accepted.code == 0
    assert accepted.stderr.startswith("note: the licence of acme/tiny")
    assert "license: cc-by-nc-nd-4.0" in hub.files("alice/nd")["README.md"].decode()


def test_a_missing_licence_is_told_and_published(hub: Hub, commands: Forks, build: Path) -> None:
    done = commands.run("push", str(licensed(build, license=None)), "alice/none", folder=build.parent)
    assert done.code == 0
    assert done.stderr == (
        "note: acme/tiny names no licence, so nothing permits publishing derived models; ask its owner\n"
    )


def test_a_build_that_is_to_be_published_hears_of_the_licence_before_it_starts(
    hub: Hub, commands: Forks, folder: Path, built: Path
) -> None:
    (folder / "tiny" / "README.md").write_text("---\nlicense: [mit, cc-by-nd-4.0]\n---\n")
    hub.put_model("acme/strict", folder / "tiny")
    command = ["build", "acme/strict", *QUICK, "--push-to", "strict"]
    assert "forbids sharing" in told(commands.run(*command, folder=folder))
    assert not (folder / "builds" / "strict-drop40").exists()
    (folder / "tiny" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    hub.put_model("acme/strict", folder / "tiny")
    dry = commands.run(*command, "--dry-run", folder=folder)
    assert dry.code == 0, dry.stderr
    assert dry.stderr == (
        "note: the licence of acme/strict, cc-by-nc-4.0, allows no commercial use, "
        "not even of derived models\n"
    )


def test_what_a_card_says_of_its_licence_cannot_paint_the_terminal(
    hub: Hub, commands: Forks, build: Path
) -> None:
    licensed(build, license="other", license_name="own\x1b[31m\nerror: none of that")
    done = commands.run("push", str(build), "alice/own", folder=build.parent)
    assert done.code == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("name", ["config.json", "build.json", "recipe.yaml"])
def test_a_model_that_is_not_whole_is_not_published(
    hub: Hub, commands: Forks, build: Path, name: str
) -> None:
    (build / "model" / name).unlink()
    assert f"{name} is missing" in told(commands.run("push", str(build), "alice/part", folder=build.parent))
    assert not hub.requests


def test_a_model_with_the_record_of_another_build_is_not_published(
    hub: Hub, commands: Forks, build: Path
) -> None:
    value = json.loads((build / "model" / "build.json").read_text())
    (build / "model" / "build.json").write_text(json.dumps(value | {"device": "another"}))
    take_sums(Build.read(build), build)
    refused = told(commands.run("push", str(build), "alice/other", folder=build.parent))
    assert "build.json belongs to another build" in refused
    assert not hub.requests


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/tokenizer.json", "profile.json"])
def test_a_flipped_bit_in_a_build_is_found_before_it_is_published(
    hub: Hub, commands: Forks, build: Path, name: str
) -> None:
    flip_a_bit(build / name)
    refused = told(commands.run("push", str(build), "alice/rotten", folder=build.parent))
    assert f"{name} is missing or has changed since it was made" in refused
    assert not hub.requests
    verified = commands.run("verify", str(build), folder=build.parent)
    assert verified.code == 1
    assert f"✗ build             {build}  changed: {name}" in verified.stdout


def test_a_bit_that_flips_between_two_builds_of_one_process_is_found_though_the_time_stays(
    build: Path,
) -> None:
    found, path = Build.read(build), build / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    path.unlink()  # it shares its bytes with the store
    path.write_bytes(content)
    check_whole(found, build)
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(bytes([content[-3] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(VerificationError, match=r"model\.safetensors is missing or has changed"):
        check_whole(found, build)


def laid_out_again(build: Path, model: Path, **changes: float) -> None:
    """Another build, or the same, into the folder of one; `model` is where its weights lie."""
    if not model.exists():
        names = shutil.ignore_patterns("README.md", "figures", "build.json", "recipe.yaml", "*.txt")
        shutil.copytree(build / "model", model, ignore=names)
    found = Build.read(build)
    lay_out(found.model_copy(update=changes), DistanceProfile.read(build), model, out=build)


def test_files_that_the_factory_did_not_make_stay_when_a_build_is_laid_out_anew(build: Path) -> None:
    for name in ("notes.txt", "model/.git/HEAD", "model/mine.txt"):
        (build / name).parent.mkdir(exist_ok=True)
        (build / name).write_text(f"years of work: {name}")
    (build / "link").symlink_to("nowhere")
    laid_out_again(build, build.parent / "weights", source_bytes=1)
    for name in ("notes.txt", "model/.git/HEAD", "model/mine.txt"):
        assert (build / name).read_text() == f"years of work: {name}"
    assert (build / "link").readlink() == Path("nowhere")
    assert Build.read(build).source_bytes == 1
    check_whole(Build.read(build), build)


def test_a_link_to_a_build_stays_when_it_is_laid_out_anew_and_what_it_leads_to_is_written(
    build: Path,
) -> None:
    (build / "notes.txt").write_text("years of work")
    link = build.parent / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(build)
    laid_out_again(link, build.parent / "weights", source_bytes=1)
    assert link.readlink() == build
    assert [path.name for path in link.parent.iterdir()] == ["link"]
    assert (build / "notes.txt").read_text() == "years of work"
    assert Build.read(build).source_bytes == 1


@pytest.mark.parametrize("name", [".build.partial", ".build.old"])
def test_a_folder_beside_a_build_that_the_factory_did_not_make_stays(build: Path, name: str) -> None:
    mine = build.with_name(name)
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert leftovers(build) == []  # `factory gc` leaves it
    with pytest.raises(StoreError, match=f"{name} is in the way and was not made by the factory"):
        check_out(build)
    with pytest.raises(StoreError, match="is in the way"):
        laid_out_again(build, build.parent / "weights", source_bytes=1)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_an_edited_card_stays_with_its_build_and_is_kept_beside_another(build: Path) -> None:
    card, kept = build / "model" / "README.md", build / "README.md.edited"
    written = card.read_text()
    laid_out_again(build, build.parent / "weights", source_bytes=1)
    assert not kept.exists()  # nobody had edited it
    card.write_text(written + "My own words.\n")
    laid_out_again(build, build.parent / "weights")
    assert card.read_text() == written + "My own words.\n"
    laid_out_again(build, build.parent / "weights", source_bytes=2)
    assert "My own words." not in card.read_text()
    assert kept.read_text() == written + "My own words.\n"
    assert kept_aside(build) == {"README.md.edited"}


def test_what_was_accepted_stays_when_another_build_is_laid_out(build: Path) -> None:
    model, settings = build / "model", "generation_config.json"
    laid_out_again(build, build.parent / "weights")
    (model / "mine.txt").write_text("years of work")
    (model / settings).write_text('{"do_sample": true}')
    for _ in range(2):  # accepting again forgets nothing
        accept(Build.read(build), build)
    check_whole(Build.read(build), build)
    laid_out_again(build, build.parent / "weights", source_bytes=1)
    assert (model / "mine.txt").read_text() == "years of work"
    assert added_since_laid_out(build) == ["model/mine.txt"]  # of another build: not published unasked
    assert json.loads((model / settings).read_text()) != {"do_sample": True}
    assert (build / f"{settings}.edited").read_text() == '{"do_sample": true}'
    assert kept_aside(build) == {f"{settings}.edited"}
    (model / "mine.txt").unlink()
    check_whole(Build.read(build), build)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_build_that_somebody_else_owns_is_told_in_one_line(commands: Forks, build: Path) -> None:
    for folder in (build, build / "model"):
        folder.chmod(0o555)
    try:
        with pytest.raises(StoreError, match="cannot write a build to"):
            check_out(build)
        for command in (("card", str(build)), ("verify", str(build), "--accept")):
            assert "Permission denied" in told(commands.run(*command, folder=build.parent))
    finally:
        for folder in (build, build / "model"):
            folder.chmod(0o755)


@pytest.mark.parametrize("name", [b"two\nlines.txt", b"\x1b[2Jpaints.txt", b"\xff.txt"])
def test_a_file_whose_name_is_no_text_is_not_accepted_and_told_in_one_line(
    commands: Forks, build: Path, name: bytes
) -> None:
    (Path(os.fsdecode(os.fsencode(build / "model") + b"/" + name))).write_text("x")
    before = (build / "SHA256SUMS").read_text()
    refused = told(commands.run("verify", str(build), "--accept", folder=build.parent))
    assert "is not a valid name in a checksum list" in refused
    assert "\x1b" not in refused
    assert (build / "SHA256SUMS").read_text() == before
    assert "contains files that its build did not make" in told(
        commands.run("verify", str(build), folder=build.parent)
    )


def test_what_somebody_changed_on_purpose_is_published_once_they_say_so(
    hub: Hub, commands: Forks, build: Path
) -> None:
    (build / "model" / "generation_config.json").write_text('{"do_sample": true}')
    refused = told(commands.run("push", str(build), "alice/mine", folder=build.parent))
    assert "`factory verify --accept`" in refused
    assert commands.run("verify", str(build), "--accept", folder=build.parent).code == 0
    assert commands.run("push", str(build), "alice/mine", folder=build.parent).code == 0
    flip_a_bit(build / "model" / "model.safetensors")
    assert commands.run("verify", str(build), "--accept", folder=build.parent).code == 1  # never the weights


def test_files_that_the_build_did_not_make_are_published_only_once_somebody_says_so(
    hub: Hub, commands: Forks, build: Path
) -> None:
    (build / "model" / "notes").mkdir()
    (build / "model" / "notes" / "diary.txt").write_text("Dear diary")
    (build / "model" / "token.txt").write_text("hf_secret")
    refused = told(commands.run("push", str(build), "alice/more", folder=build.parent))
    assert "contains files that its build did not make: model/notes/diary.txt, model/token.txt\n" in refused
    assert f"`factory verify {build} --accept`" in refused
    assert not hub.requests
    verified = commands.run("verify", str(build), folder=build.parent)
    assert verified.code == 1
    assert f"✗ build             {build}  added: model/notes/diary.txt, model/token.txt" in verified.stdout
    (build / "model" / "token.txt").unlink()
    assert commands.run("verify", str(build), "--accept", folder=build.parent).code == 0
    assert commands.run("push", str(build), "alice/more", folder=build.parent).code == 0
    assert hub.files("alice/more")["notes/diary.txt"] == b"Dear diary"


READS = """
import sys
def note(event, arguments):
    if event == "open" and str(arguments[0]).endswith("model.safetensors"):
        frame = sys._getframe(1)
        while frame and "/factory/" not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame and frame.f_code.co_name == "sha256_of_file":
            open({log!r}, "a").write("x")
sys.addaudithook(note)
"""


def test_weights_are_read_once_for_their_checksum_in_a_publication(
    commands: Forks, build: Path, tmp_path: Path
) -> None:
    before = READS.format(log=str(tmp_path / "log"))
    done = commands.run("push", str(build), "alice/once", folder=build.parent, before=before)
    assert done.code == 0, done.stderr
    assert (tmp_path / "log").read_text() == "x"


def test_hidden_files_are_not_published(hub: Hub, commands: Forks, build: Path) -> None:
    before = content_of(build / "model").keys()
    (build / "model" / ".env").write_text("SECRET=1")
    for name in (".cache", ".git"):  # the client itself refuses files below these
        (build / "model" / name).mkdir()
        (build / "model" / name / "config").write_text("x")
    done = commands.run("push", str(build), "alice/hidden", folder=build.parent)
    assert done.code == 0, done.stderr
    assert hub.files("alice/hidden").keys() == before


def test_an_edited_card_is_published_as_it_is_and_told(hub: Hub, commands: Forks, build: Path) -> None:
    card = build / "model" / "README.md"
    edited = card.read_bytes() + b"\nIt likes coffee.\r\n"
    card.write_bytes(edited)
    done = commands.run("push", str(build), "alice/edited", folder=build.parent)
    assert done.code == 0, done.stderr
    assert done.stderr == (
        f"note: the edited card was kept; its model id may be stale (`factory card {build}` rewrites it)\n"
    )
    assert hub.files("alice/edited")["README.md"] == edited == card.read_bytes()
    assert commands.run("card", str(build), folder=build.parent).code == 0
    done = commands.run("push", str(build), "alice/edited", folder=build.parent)
    assert (done.code, done.stderr) == (0, "")
    assert 'model="alice/edited"' in hub.files("alice/edited")["README.md"].decode()


@pytest.mark.parametrize("kind", ["latin-1", "folder"])
def test_what_is_no_card_in_place_of_one_stops_a_push_in_one_line(
    hub: Hub, commands: Forks, build: Path, kind: str
) -> None:
    card = build / "model" / "README.md"
    before = card.read_bytes() + "Amélie".encode("latin-1")
    card.unlink()
    if kind == "folder":
        card.mkdir()
    else:
        card.write_bytes(before)
    line = told(commands.run("push", str(build), "alice/none", folder=build.parent))
    assert ("is a folder" if kind == "folder" else "can't decode byte") in line
    assert card.is_dir() or card.read_bytes() == before
    assert ("model", "alice/none") not in hub.storage.repositories


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("{push-to: alice/x, out: a}", "{push-to: x, out: b}"),
        ("{push-to: ~/x, out: a}", "{push-to: Alice/x, out: b}"),
        ("{out: one}", "{out: two/../one}"),
        ("{out: ./one}", "{out: link}"),
    ],
)
def test_builds_of_one_file_that_take_one_place_are_refused(
    commands: Forks, built: Path, tmp_path: Path, first: str, second: str
) -> None:
    (tmp_path / "link").symlink_to("one")
    lines = [f"model: {built.parent.parent / 'tiny'}", "drop: 0.4", "builds:", f"- {first}", f"- {second}"]
    (tmp_path / "build.yaml").write_text("\n".join(lines))
    ended = commands.run("build", "build.yaml", "--dry-run", folder=tmp_path)
    assert (ended.code, "is already used by the build in line 4" in ended.stderr) == (2, True), ended.stderr


def test_a_card_that_nobody_edited_names_the_repository_it_goes_to(
    hub: Hub, commands: Forks, build: Path
) -> None:
    card = build / "model" / "README.md"
    before = card.read_bytes()
    refusal = hub.fail("POST", "/commit/", status=403)
    assert "may not write" in told(commands.run("push", str(build), "alice/never", folder=build.parent))
    assert card.read_bytes() == before
    refusal.times = 0
    for name in ("alice/first", "alice/second"):
        done = commands.run("push", str(build), name, folder=build.parent)
        assert (done.code, done.stderr) == (0, "")
        assert f'model="{name}"' in hub.files(name)["README.md"].decode()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "alice/",
        "/x",
        "a/b/c",
        "alice/two words",
        "alice/a--b",
        "a..b",
        "~/x.git",
        "alice/\u00e9",
        "x" * 97,
    ],
)
def test_a_name_that_no_repository_can_have_is_refused_before_anything_is_written(
    hub: Hub, commands: Forks, build: Path, name: str
) -> None:
    before = content_of(build)
    refused = told(commands.run("push", str(build), name, folder=build.parent))
    assert f"{name!r} is not a repository name" in refused
    assert not hub.requests
    assert content_of(build) == before


def test_a_name_that_was_refused_once_is_not_published_under_another(
    hub: Hub, commands: Forks, build: Path
) -> None:
    card = build / "model" / "README.md"
    write_card(Build.read(build), card.parent, repo_id="alice/two words")  # as earlier versions left it
    done = commands.run("push", str(build), "alice/good", folder=build.parent)
    assert (done.code, done.stderr) == (0, "")
    assert "two words" not in hub.files("alice/good")["README.md"].decode()
