"""Whether a build, and the stages that it was made from, are still what they were when they were made."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from factory.artifacts import Build
from factory.errors import StoreError, VerificationError
from factory.layout import added_since_laid_out, changed_since_laid_out, check_nothing_added
from factory.locks import HOME
from factory.store import KEY, STAGES, Store, damage


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
        hint += "; if you changed it yourself: --accept"
    raise VerificationError(f"{changed[0]} is missing or has changed since it was made{others}", hint=hint)
