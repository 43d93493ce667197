"""The build folder: what is published, laid out whole or not at all."""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from factory import __version__
from factory.artifacts import Build, Checkpoint, Comparison, DistanceProfile, Publication
from factory.config import BuildConfig, build_name
from factory.durable import write_atomically
from factory.errors import StoreError, VerificationError
from factory.libraries import installed_libraries
from factory.place import MARK, begin, beside, check_beside, is_build, is_writable, swap
from factory.references import local_path
from factory.sums import SUMS, changed_files, forget, read_sums, sha256_once, visible_files, write_sums

if TYPE_CHECKING:
    from factory.pipeline import Made
    from factory.run import Texts

LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "huggingface_hub",
    "lm_eval",
    "peft",
    "safetensors",
    "torch",
    "transformers",
    "trl",
)
# Facts of the moment or the machine: two builds that differ only in these are the same build.
MOMENTARY = {"seconds", "speed", "versions", "libraries", "factory_version"}
# Files of a stage folder that are the store's, not the model's.
NOT_THE_MODEL = {"stage.json", Checkpoint.file_name}
RECIPE = "recipe.yaml"
CARD = "model/README.md"
ACCEPTED = "accepted.json"  # names of files that are what somebody made of them, and meant
# In a build folder: what people edit, and what says what lies on the Hub.
NOT_SUMMED = {CARD, SUMS, MARK, ACCEPTED, Publication.file_name}
AGAIN = "run the build again: it lays it out anew"
DISTANCE_FIGURE = "angular-distance"
HEALING_FIGURE = "healing"


def describe_build(
    config: BuildConfig,
    texts: "Texts",
    made: "Made",
    *,
    comparisons: dict[str, tuple[Comparison, ...]],
    keys: Mapping[str, str],
    seconds: Mapping[str, float],
) -> Build:
    """Everything that `build.json` says, without paths."""
    return Build(
        factory_version=__version__,
        name=build_name(made.source.name, config.drop),
        reference=_without_path(config.reference, made.source.name, made.source.repo_id),
        config=_config_without_paths(config, texts, made),
        source=made.source,
        plan=made.plan,
        profile_samples=made.profile.num_samples,
        calibration=made.profile.data,
        adapter=made.adapter,
        merge_base=made.shipped.merge_base,
        merge_losses=made.shipped.merge_losses,
        guard_losses=made.healed.guard_losses if made.healed else None,
        shipped=made.shipped_name,
        source_parameters=made.source.num_parameters,
        result_parameters=made.shipped.num_parameters,
        source_bytes=made.source.size_bytes,
        result_bytes=made.shipped.size_bytes,
        evaluations=made.evaluations,
        comparisons=comparisons,
        speed=made.speed,
        files=made.shipped.files,
        stages=dict(keys),
        versions={library: version(library) for library in LIBRARIES},
        libraries=installed_libraries(),
        seconds=dict(seconds),
        device=made.speed.device,
    )


def read_if_same(build: Build, out: Path) -> Build | None:
    """The build that lies in `out`, if it was made from the same stages and is whole.

    Raises:
        StoreError: `out` holds something that is no build.
    """
    check_out(out)
    if not (out / Build.file_name).is_file():
        return None
    try:
        found = Build.read(out)
    except StoreError:
        return None  # of another version, or damaged: a build all the same, which a new one replaces
    if not (_is_same(found, build) and (out / CARD).is_file()):
        return None
    try:
        check_whole(build, out)
    except (StoreError, VerificationError):
        return None  # laying it out again mends it
    return found


def check_out(out: Path) -> None:
    """Refuse, before any work, a place where no build can be laid out.

    Raises:
        StoreError: A file, a folder that is no build, or a place that cannot be written.
    """
    out = out.resolve()
    if out == Path(out.anchor):
        raise StoreError(f"cannot write a build to {out}", hint="give another folder with --out")
    try:  # it is laid out beside itself
        with suppress(FileNotFoundError, NotADirectoryError):
            beside(out)[0].lstat()
        writable = is_writable(out)
    except OSError as error:
        raise StoreError(
            f"cannot write a build to {out}: {error.strerror}", hint="give another folder with --out"
        ) from error
    if not writable:
        raise StoreError(f"cannot write a build to {out}", hint="give another folder with --out")
    check_beside(out)
    is_empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not (is_build(out) or is_empty):
        raise StoreError(
            f"{out} is there already and is no build", hint="give another folder with --out, or move it away"
        )


def lay_out(build: Build, profile: DistanceProfile, model: Path, *, out: Path) -> None:
    """Write `out/model` (exactly what is published) and `out/build.json`, then swap it in at once."""
    forget()
    out = out.resolve()
    partial = begin(out)
    target = partial / "model"
    target.mkdir()
    for path in sorted(model.rglob("*")):
        if path.is_file() and path.name not in NOT_THE_MODEL:
            (target / path.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
            # Weights share their bytes with the store; what people edit by hand does not.
            place = link_or_copy if path.suffix == ".safetensors" else shutil.copyfile
            place(path, target / path.relative_to(model))
    check_weights(build, target)
    write_card_and_figures(build, profile, target)
    write_recipe(build, target)
    for folder in (target, partial):
        build.write(folder)
    profile.write(partial)
    take_sums(build, partial)
    if (out / Publication.file_name).is_file():  # what lies on the Hub stays known
        shutil.copyfile(out / Publication.file_name, partial / Publication.file_name)
    if out.is_dir():
        keep_others(out, partial)
        keep_edited_card(build, out, partial)
    swap(partial, out)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file where the file system allows it, else copy it."""
    try:
        os.link(source.resolve(), target)  # the Hub's cache holds symlinks: link what they point to
    except OSError:
        shutil.copyfile(source, target)


def check_weights(build: Build, folder: Path) -> None:
    """Compare the weight files with the sums that were taken when they were made.

    Raises:
        VerificationError: One is missing or has changed since.
    """
    for name, sha256 in build.files.items():
        if not (folder / name).is_file() or sha256_once(folder / name) != sha256:
            stage = "merge" if build.shipped == "healed" else "prune"
            raise VerificationError(
                f"{name} is missing or has changed since it was made",
                hint=f"run the build again with --rerun {stage}",
            )


def check_whole(build: Build, out: Path) -> None:
    """Refuse a build folder that is not what was laid out.

    Raises:
        VerificationError: A file is missing or has changed.
    """
    forget()  # what is pushed next is what is read here
    changed = changed_since_laid_out(build, out)
    if changed:
        others = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        told = f"{out / changed[0]} is missing or has changed since it was made{others}"
        raise VerificationError(told, hint=f"{AGAIN}; if you changed it yourself: `factory verify --accept`")
    if (out / "model" / Build.file_name).read_bytes() != (out / Build.file_name).read_bytes():
        raise VerificationError(f"{out / 'model' / Build.file_name} is of another build", hint=AGAIN)


def changed_since_laid_out(build: Build, out: Path) -> list[str]:
    """Files of a build folder that are missing or not what was laid out; the card may be edited.

    Raises:
        VerificationError: Nothing says what they were.
    """
    sums = read_sums(out)
    if sums is None:
        raise VerificationError(f"{out / SUMS} is missing", hint=AGAIN)
    weights = {f"model/{name}": sha256 for name, sha256 in build.files.items()}
    needed = {f"model/{name}" for name in ("config.json", Build.file_name, RECIPE)} - sums.keys()
    return [*changed_files(out, sums | weights, sha256_of=sha256_once), *sorted(needed)]


def added_since_laid_out(out: Path) -> list[str]:
    """Files that would be published with a build and that it did not lay out: notes, keys, whatever it is."""
    known = {CARD, *(read_sums(out) or ())}
    names = [path.relative_to(out).as_posix() for path in visible_files(out / "model")]
    return [name for name in names if name not in known]


def check_nothing_added(out: Path) -> None:
    """Refuse to publish what nobody made with the build.

    Raises:
        VerificationError: Names the files.
    """
    if added := added_since_laid_out(out):
        named = ", ".join(added[:5]) + (f" and {len(added) - 5} more" if len(added) > 5 else "")
        raise VerificationError(
            f"{out} holds what its build did not make: {named}",
            hint=f"remove it, or `factory verify {out} --accept` has it published too",
        )


def take_sums(build: Build, out: Path) -> None:
    """Write down the checksums of every file of a build folder but the card and itself."""
    names = [path.relative_to(out).as_posix() for path in sorted(out.rglob("*")) if path.is_file()]
    weights = {f"model/{name}": sha256 for name, sha256 in build.files.items()}
    write_sums(out, [name for name in names if name not in NOT_SUMMED], known=weights)


def accept(build: Build, out: Path) -> None:
    """Take the files of a build folder as they are now; somebody's own stay when it is laid out anew."""
    try:
        sums = read_sums(out)
    except StoreError:
        sums = None
    if sums is not None:  # else nothing says whose they are
        theirs = {*changed_files(out, sums), *added_since_laid_out(out), *accepted(out)}
        theirs -= {f"model/{name}" for name in build.files}
        names = sorted(name for name in theirs if name.startswith("model/") and (out / name).is_file())
        write_atomically(out / ACCEPTED, json.dumps(names))
    take_sums(build, out)


def accepted(out: Path) -> set[str]:
    """What `accept` remembered of a build folder."""
    try:
        return set(map(str, json.loads((out / ACCEPTED).read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError):
        return set()


def write_recipe(build: Build, folder: Path) -> None:
    """Write the settings of a build for people, with what pins its source and its texts."""
    source, healing = build.source, build.adapter
    texts = {"measure": build.calibration, "evaluate": build.evaluations["source"].loss.data}
    if healing:
        texts["heal"] = healing.data
    recipe = {
        "source": {"repo_id": source.repo_id, "commit": source.commit},
        **{key: value for key, value in build.config.items() if key != "reference"},
        "texts": {use: {"name": text.name, "version": text.version} for use, text in texts.items()},
        "dropped": list(build.dropped),
        "made_with": f"hf-factory {build.factory_version}",
    }
    head = "# What this model was made of and how; `factory build REPOSITORY --reproduce` makes it again.\n"
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    (folder / RECIPE).write_text(head + text, encoding="utf-8")


def write_card_and_figures(build: Build, profile: DistanceProfile, folder: Path) -> None:
    """README.md and figures of a build, into the folder that is published."""
    from factory.card import write_card
    from factory.plots import distance_figure, healing_figure

    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    distance_figure(profile, build.plan, path_stem=figures / DISTANCE_FIGURE)
    if build.adapter:
        healing_figure(build.adapter, path_stem=figures / HEALING_FIGURE)
    write_card(build, folder)


def keep_others(out: Path, partial: Path) -> None:
    """Take into the new folder the files of the old one that no build made, to the place where they lay."""
    try:
        made = read_sums(out)
    except StoreError:
        made = None
    theirs = accepted(out)
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        is_made = name in {*NOT_SUMMED, Build.file_name, DistanceProfile.file_name}
        if name.startswith("model/"):  # without sums: what the new one has
            is_made |= (partial / name).is_file() if made is None else name in made and name not in theirs
        if is_made or (path.is_dir() and not path.is_symlink()):
            continue
        place = partial / name
        if os.path.lexists(place):
            place = free_place(partial, path.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:  # it stays in the old folder until the new one is in its place
            os.link(path, place, follow_symlinks=False)
        except OSError:
            shutil.copy2(path, place, follow_symlinks=False)


def keep_edited_card(build: Build, out: Path, partial: Path) -> None:
    """Take over a card that somebody has edited; that of another build is kept beside the model."""
    from factory.card import is_edited

    card = out / CARD
    if not card.is_file():
        return
    place = free_place(partial, card.name)
    try:
        found = Build.read(out)
        if not is_edited(card, found):
            return
        if _is_same(found, build):
            place = partial / CARD
    except StoreError:
        pass  # nothing says what the card was
    shutil.copyfile(card, place)


def kept_aside(out: Path) -> set[str]:
    """Names of cards and other files that were kept beside the model of a build."""
    return {path.name for path in out.glob("*.edited*")}


def free_place(folder: Path, name: str) -> Path:
    """Where a file can be kept that somebody made and whose own place is taken; it is not published."""
    names = (f"{name}.edited{number or ''}" for number in count())
    return next(folder / free for free in names if not os.path.lexists(folder / free))


def _is_same(found: Build, build: Build) -> bool:
    return found.model_dump(exclude=MOMENTARY) == build.model_dump(exclude=MOMENTARY)


def _config_without_paths(config: BuildConfig, texts: "Texts", made: "Made") -> dict[str, Any]:
    """Settings with data and tasks by name, so that nothing says where they lay on this machine."""
    values: dict[str, Any] = json.loads(config.model_dump_json())
    values["reference"] = _without_path(config.reference, made.source.name, made.source.repo_id)
    values["measure"]["data"] = texts.calibration.data.name
    values["heal"]["data"] = texts.healing.data.name
    values["evaluate"]["data"] = texts.evaluation.data.name
    values["evaluate"]["tasks"] = [Path(task).name for task in config.evaluate.tasks]
    return values


def _without_path(reference: str, name: str, repo_id: str | None) -> str:
    return reference if repo_id or not local_path(reference).is_dir() else name
