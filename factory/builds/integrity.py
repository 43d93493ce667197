"""Integrity of a build: checksums of its files, and of the stages that it was made from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from factory.artifacts import Build, Checkpoint, Publication
from factory.builds.record import RECIPE
from factory.builds.swap import MARK
from factory.errors import StoreError, VerificationError
from factory.store.files import (
    SUMS,
    changed_files,
    forget,
    read_sums,
    sha256_once,
    visible_files,
    write_atomically,
    write_sums,
)
from factory.store.locks import HOME
from factory.store.stage import KEY, MADE_BY, PRUNE, STAGES
from factory.store.store import Store, damage

# Files of a stage folder that are the store's, not the model's.
NOT_THE_MODEL = {"stage.json", Checkpoint.file_name}
CARD = "model/README.md"
ACCEPTED = "accepted.json"  # names of files that are what somebody made of them, and meant
# In a build folder: what people edit, and what says what lies on the Hub.
NOT_SUMMED = {CARD, SUMS, MARK, ACCEPTED, Publication.file_name}
AGAIN = "run the build again: it lays it out anew"


def check_weights(build: Build, folder: Path) -> None:
    """Compare the weight files with the sums that were taken when they were made.

    Raises:
        VerificationError: One is missing or has changed since.
    """
    for name, sha256 in build.files.items():
        if not (folder / name).is_file() or sha256_once(folder / name) != sha256:
            raise VerificationError(
                f"{name} is missing or has changed since it was made",
                hint=f"run the build again with `rerun={MADE_BY.get(build.shipped, PRUNE.name)}`",
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


@dataclass(frozen=True)
class Verified:
    """What was found in one folder."""

    name: str  # "build", "evaluate source"
    folder: Path
    changed: tuple[str, ...]
    there: bool = True  # a stage may have been removed
    added: tuple[str, ...] = ()  # that would be published and that no build made


def changed_in(build: Build, folder: Path, *, store: Store) -> list[Verified]:
    """Compare every checksum of a build folder and of its stages; the build comes first.

    Raises:
        VerificationError: The build was laid out without checksums, or names a stage that cannot be.
        StoreError: The store's home is no folder.
    """
    if store.home.exists() and not store.home.is_dir():
        raise StoreError(
            f"{store.home} is no folder, so no stage can be in it", hint=f"give another folder with {HOME}"
        )
    changed, added = tuple(changed_since_laid_out(build, folder)), tuple(added_since_laid_out(folder))
    found = [Verified("build", folder, changed, added=added)]
    for name, key in build.stages.items():
        if name.partition(" ")[0] not in STAGES or not KEY.fullmatch(key):
            told = f"{folder / Build.file_name} names {f'{name} {key}'[:80]!r}, which is no stage"
            raise VerificationError(told, hint="run the build again: it lays it out anew")
        stage = store.home / "stages" / name.partition(" ")[0] / key
        there = stage.is_dir()
        found.append(Verified(name, stage, tuple(damage(stage)) if there else (), there))
    return found


def check_all(found: Sequence[Verified]) -> None:
    """Refuse what has changed or was added.

    Raises:
        VerificationError: Names the first file of it.
    """
    changed = [one.folder / name for one in found for name in one.changed]
    if not changed:
        check_nothing_added(found[0].folder)
        return
    others = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    hint = "the same `factory build` again makes anew what has changed"
    if found[0].changed:
        hint += "; if you changed it yourself: `accept`"
    raise VerificationError(f"{changed[0]} is missing or has changed since it was made{others}", hint=hint)
