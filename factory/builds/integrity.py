"""Check a build's integrity: checksums of its files and of the stages it was made from."""

import json
from collections.abc import Mapping, Sequence
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

# Files of a stage folder that belong to the store, not to the model.
NOT_THE_MODEL = {"stage.json", Checkpoint.file_name}
CARD = "model/README.md"
ACCEPTED = "accepted.json"  # names of files that were changed on purpose
# Files of a build folder without checksums: they may be edited, or describe the folder itself.
NOT_SUMMED = {CARD, SUMS, MARK, ACCEPTED, Publication.file_name}
AGAIN = "run the build again to rewrite it"


def check_weights(build: Build, folder: Path) -> None:
    """Compare the weight files with the checksums taken when they were made.

    Raises:
        VerificationError: A weight file is missing or has changed.
    """
    for name, sha256 in build.files.items():
        if not (folder / name).is_file() or sha256_once(folder / name) != sha256:
            raise VerificationError(
                f"{name} is missing or has changed since it was made",
                hint=f"run the build again with `rerun={MADE_BY.get(build.shipped, PRUNE.name)}`",
            )


def check_whole(build: Build, out: Path) -> None:
    """Refuse a build folder that is incomplete or has changed.

    Raises:
        VerificationError: A file is missing or has changed.
    """
    forget()  # what is read here is pushed next
    changed = changed_since_laid_out(build, out)
    if changed:
        others = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        message = f"{out / changed[0]} is missing or has changed since it was made{others}"
        raise VerificationError(message, hint=f"{AGAIN}; if you changed it: `factory verify --accept`")
    if (out / "model" / Build.file_name).read_bytes() != (out / Build.file_name).read_bytes():
        raise VerificationError(f"{out / 'model' / Build.file_name} belongs to another build", hint=AGAIN)


def changed_since_laid_out(build: Build, out: Path) -> list[str]:
    """Return files of a build folder that are missing or have changed; the card may be edited.

    Raises:
        VerificationError: The checksums are missing.
    """
    sums = read_sums(out)
    if sums is None:
        raise VerificationError(f"{out / SUMS} is missing", hint=AGAIN)
    weights = {f"model/{name}": sha256 for name, sha256 in build.files.items()}
    needed = {f"model/{name}" for name in ("config.json", Build.file_name, RECIPE)} - sums.keys()
    return [*changed_files(out, sums | weights, sha256_of=sha256_once), *sorted(needed)]


def added_since_laid_out(out: Path) -> list[str]:
    """Return files that would be published with a build but were added to it: notes, keys, anything."""
    known = {CARD, *(read_sums(out) or ())}
    names = [path.relative_to(out).as_posix() for path in visible_files(out / "model")]
    return [name for name in names if name not in known]


def check_nothing_added(out: Path) -> None:
    """Refuse to publish files that the build did not make.

    Raises:
        VerificationError: Files were added; names them.
    """
    if added := added_since_laid_out(out):
        named = ", ".join(added[:5]) + (f" and {len(added) - 5} more" if len(added) > 5 else "")
        raise VerificationError(
            f"{out} contains files that its build did not make: {named}",
            hint=f"remove them, or run `factory verify {out} --accept` to publish them too",
        )


def take_sums(build: Build, out: Path) -> None:
    """Write the checksums of all files in a build folder, except those in `NOT_SUMMED`."""
    names = [path.relative_to(out).as_posix() for path in sorted(out.rglob("*")) if path.is_file()]
    weights = {f"model/{name}": sha256 for name, sha256 in build.files.items()}
    write_sums(out, [name for name in names if name not in NOT_SUMMED], known=weights)


def add_sums(out: Path, new: Mapping[str, str]) -> None:
    """Add checksums of files that were put into a finished build folder; the others stay as recorded.

    Args:
        new: Name of each file below `out` → sha256.
    """
    known = {**(read_sums(out) or {}), **new}
    write_sums(out, [name for name in known if name in new or (out / name).is_file()], known=known)


def accept(build: Build, out: Path) -> None:
    """Accept the files of a build folder as they are now; the user's own survive when it is rewritten."""
    try:
        sums = read_sums(out)
    except StoreError:
        sums = None
    if sums is not None:  # without checksums their origin is unknown
        theirs = {*changed_files(out, sums), *added_since_laid_out(out), *accepted(out)}
        theirs -= {f"model/{name}" for name in build.files}
        names = sorted(name for name in theirs if name.startswith("model/") and (out / name).is_file())
        write_atomically(out / ACCEPTED, json.dumps(names))
    take_sums(build, out)


def accepted(out: Path) -> set[str]:
    """Return the names of the files that `accept` recorded for a build folder."""
    try:
        return set(map(str, json.loads((out / ACCEPTED).read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError):
        return set()


@dataclass(frozen=True)
class Verified:
    """Result of verifying one folder."""

    name: str  # "build", "evaluate source"
    folder: Path
    changed: tuple[str, ...]
    there: bool = True  # a stage may have been removed
    added: tuple[str, ...] = ()  # files that would be published but that no build made


def changed_in(build: Build, folder: Path, *, store: Store) -> list[Verified]:
    """Compare every checksum of a build folder and of its stages; the build comes first.

    Raises:
        VerificationError: The build has no checksums, or names an invalid stage.
        StoreError: The store's home is not a folder.
    """
    if store.home.exists() and not store.home.is_dir():
        raise StoreError(f"{store.home} is not a folder", hint=f"choose another one with {HOME}")
    changed, added = tuple(changed_since_laid_out(build, folder)), tuple(added_since_laid_out(folder))
    found = [Verified("build", folder, changed, added=added)]
    for name, key in build.stages.items():
        if name.partition(" ")[0] not in STAGES or not KEY.fullmatch(key):
            message = f"{folder / Build.file_name} names {f'{name} {key}'[:80]!r}, which is not a stage"
            raise VerificationError(message, hint=AGAIN)
        stage = store.home / "stages" / name.partition(" ")[0] / key
        exists = stage.is_dir()
        found.append(Verified(name, stage, tuple(damage(stage)) if exists else (), exists))
    return found


def check_all(found: Sequence[Verified]) -> None:
    """Refuse folders with changed or added files.

    Raises:
        VerificationError: Files have changed or were added; names the first.
    """
    changed = [one.folder / name for one in found for name in one.changed]
    if not changed:
        check_nothing_added(found[0].folder)
        return
    others = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    hint = "run the same `factory build` again to restore it"
    if found[0].changed:
        hint += "; if you changed it: `accept`"
    raise VerificationError(f"{changed[0]} is missing or has changed since it was made{others}", hint=hint)
