"""Write the build folder atomically, keeping what the user edited or added."""

import os
import shutil
from contextlib import suppress
from itertools import count
from pathlib import Path

from factory.artifacts import Build, DistanceProfile, Ggufs, Publication
from factory.builds.integrity import (
    CARD,
    NOT_SUMMED,
    NOT_THE_MODEL,
    accepted,
    check_weights,
    check_whole,
    take_sums,
)
from factory.builds.record import write_recipe
from factory.builds.swap import begin, beside, check_beside, is_build, is_writable, swap
from factory.errors import StoreError, VerificationError
from factory.serving.modelfile import MODELFILE
from factory.store.files import forget, read_sums

# Facts about the moment or the machine: two builds that differ only in these are the same build.
MOMENTARY = {"seconds", "speed", "versions", "libraries", "factory_version"}
DISTANCE_FIGURE = "angular-distance"
HEALING_FIGURE = "healing"


def read_if_same(build: Build, out: Path) -> Build | None:
    """Return the build in `out` if it was made from the same stages and is complete.

    Raises:
        StoreError: `out` contains something other than a build.
    """
    check_out(out)
    if not (out / Build.file_name).is_file():
        return None
    try:
        found = Build.read(out)
    except StoreError:
        return None  # of another version, or damaged: still a build, which a new one may replace
    if not (_is_same(found, build) and (out / CARD).is_file()):
        return None
    try:
        check_whole(build, out)
    except (StoreError, VerificationError):
        return None  # writing it again repairs it
    return found


def check_out(out: Path) -> None:
    """Refuse, before any work, a path where no build can be written.

    Raises:
        StoreError: The path is a file, a folder other than a build, or not writable.
    """
    out = out.resolve()
    if out == Path(out.anchor):
        raise StoreError(f"cannot write a build to {out}", hint="choose another folder with `out`")
    try:  # the build is first written beside its place
        with suppress(FileNotFoundError, NotADirectoryError):
            beside(out)[0].lstat()
        writable = is_writable(out)
    except OSError as error:
        raise StoreError(
            f"cannot write a build to {out}: {error.strerror}", hint="choose another folder with `out`"
        ) from error
    if not writable:
        raise StoreError(f"cannot write a build to {out}", hint="choose another folder with `out`")
    check_beside(out)
    is_empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not (is_build(out) or is_empty):
        raise StoreError(
            f"{out} already exists and is not a build folder",
            hint="choose another folder with `out`, or move it away",
        )


def lay_out(build: Build, profile: DistanceProfile, model: Path, *, out: Path) -> None:
    """Write `out/model` (exactly what is published) and `out/build.json`, then swap them in atomically."""
    forget()
    out = out.resolve()
    partial = begin(out)
    target = partial / "model"
    target.mkdir()
    for path in sorted(model.rglob("*")):
        if path.is_file() and path.name not in NOT_THE_MODEL:
            (target / path.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
            # Weights share their bytes with the store; files that may be edited by hand do not.
            place = link_or_copy if path.suffix == ".safetensors" else shutil.copyfile
            place(path, target / path.relative_to(model))
    check_weights(build, target)
    keep_ggufs(build, out / "model", target)
    write_card_and_figures(build, profile, target)
    write_recipe(build, target)
    for folder in (target, partial):
        build.write(folder)
    profile.write(partial)
    take_sums(build, partial)
    if (out / Publication.file_name).is_file():  # keep the record of what is on the Hub
        shutil.copyfile(out / Publication.file_name, partial / Publication.file_name)
    if out.is_dir():
        keep_others(out, partial)
        keep_edited_card(build, out, partial)
    swap(partial, out)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file where the file system allows it, else copy it."""
    try:
        os.link(source.resolve(), target)  # the Hub's cache contains symlinks: link their targets
    except OSError:
        shutil.copyfile(source, target)


def write_card_and_figures(build: Build, profile: DistanceProfile, folder: Path) -> None:
    """Write README.md and figures of a build into the folder that is published."""
    from factory.report.card import write_card
    from factory.report.figures import distance_figure, healing_figure

    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    distance_figure(profile, build.plan, path_stem=figures / DISTANCE_FIGURE)
    if build.adapter and build.adapter.objective:
        healing_figure(build.adapter, path_stem=figures / HEALING_FIGURE)
    write_card(build, folder)


def keep_ggufs(build: Build, old: Path, target: Path) -> None:
    """Carry GGUF files over to a new model folder, with what belongs to them, if its weights are the same."""
    try:
        found = Ggufs.read(old)
    except StoreError:
        return  # there are none, or their record is damaged
    names = [one.name for one in found.files]
    if found.weights == build.files and all((old / name).is_file() for name in (*names, MODELFILE)):
        for name in (*names, MODELFILE, Ggufs.file_name):
            link_or_copy(old / name, target / name)


def keep_others(out: Path, partial: Path) -> None:
    """Carry files that no build made over from the old folder to the new one, at the same paths."""
    try:
        made = read_sums(out)
    except StoreError:
        made = None
    theirs = accepted(out)
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        is_made = name in {*NOT_SUMMED, Build.file_name, DistanceProfile.file_name}
        if name.startswith("model/"):  # without sums, what the new folder has counts as made
            is_made |= (partial / name).is_file() if made is None else name in made and name not in theirs
        if is_made or (path.is_dir() and not path.is_symlink()):
            continue
        place = partial / name
        if os.path.lexists(place):
            place = free_place(partial, path.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:  # linked, so that it stays in the old folder until the swap
            os.link(path, place, follow_symlinks=False)
        except OSError:
            shutil.copy2(path, place, follow_symlinks=False)


def keep_edited_card(build: Build, out: Path, partial: Path) -> None:
    """Keep a card edited by hand; an edited card of another build is kept beside the model."""
    from factory.report.card import is_edited

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
        pass  # the original card is unknown
    shutil.copyfile(card, place)


def kept_aside(out: Path) -> set[str]:
    """Return names of cards and other files that were kept beside the model of a build."""
    return {path.name for path in out.glob("*.edited*")}


def free_place(folder: Path, name: str) -> Path:
    """Return an unused path, outside what is published, for a user's file whose own path is taken."""
    names = (f"{name}.edited{number or ''}" for number in count())
    return next(folder / free for free in names if not os.path.lexists(folder / free))


def _is_same(found: Build, build: Build) -> bool:
    return found.model_dump(exclude=MOMENTARY) == build.model_dump(exclude=MOMENTARY)
