"""Reproduce a finished build from its `build.json`, and compare the result."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from factory import __version__
from factory.artifacts import Build, DataSource, Source, check_size, first_problem, layer_ranges
from factory.config.choices import STANDARD_LIBRARY
from factory.config.references import EMBEDDED, ModelReference, with_share
from factory.config.settings import BuildConfig
from factory.errors import DataError, HubError, StoreError, UnknownModelError, VerificationError
from factory.evaluation.task_files import is_task_file
from factory.text.text import Texts, column_in

DATA_OPTIONS = {"measure": "calibration-data", "heal": "heal-data", "evaluate": "eval-data"}


def read_build(reference: ModelReference) -> Build:
    """Read the `build.json` of a build.

    Args:
        reference: Folder of a build or of a published model, or a repository.

    Raises:
        UnknownModelError: The reference is an alias or a file.
        HubError: The repository cannot be reached, or has no `build.json`.
        StoreError: The `build.json` cannot be read by this version.
    """
    folder = reference.path
    if folder and folder.is_dir():
        path = folder / Build.file_name
    elif reference.repo_id:
        path = _download(reference.repo_id, reference.revision)
    else:
        raise UnknownModelError(
            f"{reference.text!r} is not a build", hint="give a build folder, or the repository of a build"
        )
    try:
        check_size(path.stat().st_size)
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{folder} has no {Build.file_name}", hint="pass a build folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(reference.text, error) from error
    try:
        build = Build.model_validate(value)
        BuildConfig.model_validate(build.config)
    except ValidationError as error:
        by = value.get("factory_version") if isinstance(value, dict) else None
        raise StoreError(
            f"{Build.file_name} of {reference.text} was written by factory {by or '(unknown version)'}, and "
            f"{__version__} cannot read it: {first_problem(error)}",
            hint=f"use factory {by}"
            if by not in (None, __version__)
            else "it is damaged, or was not written by `factory build`",
        ) from error
    return build


def _damaged(name: str, error: Exception) -> StoreError:
    return StoreError(f"{Build.file_name} of {name} is damaged: {error}", hint="try another revision")


def _download(repo_id: str, revision: str | None) -> Path:
    """Download the `build.json` of a repository at one commit."""
    from huggingface_hub import hf_hub_download

    from factory.hub.client import hub_api, patiently
    from factory.hub.errors import hub_errors

    with hub_errors(repo_id, revision=revision):
        api = hub_api()
        commit = patiently(lambda: api.resolve_revision(repo_id, revision=revision).resolved)
        found = api.get_paths_info(repo_id, Build.file_name, revision=commit)
        if not found:
            raise HubError(
                f"{repo_id} has no {Build.file_name}",
                hint="only models published by `factory push` can be reproduced",
            )
        try:
            check_size(getattr(found[0], "size", 0))  # before it is downloaded
        except ValueError as error:
            raise _damaged(repo_id, error) from error
        return Path(hf_hub_download(repo_id, Build.file_name, revision=commit))


def source_reference(build: Build) -> str:
    """Return a reference to the same source: repository and commit, or the alias of the embedded model.

    Raises:
        VerificationError: The source was a folder.
    """
    source = build.source
    origin = source.lineage.adapter if source.lineage else source
    if origin.repo_id:
        return f"{origin.repo_id}@{origin.commit}"
    if build.reference == EMBEDDED:
        return build.reference
    raise VerificationError(
        f"{build.name} was made from a local folder, {source.name!r}, which only its author has",
        hint=f"with that folder: factory build FOLDER --drop {build.config['drop']:g} and its other settings",
    )


def base_reference(build: Build) -> str | None:
    """Return a reference to the base that the build's adapter was merged into; None without an adapter."""
    base = build.source.lineage.base if build.source.lineage else None
    return f"{base.repo_id}@{base.commit}" if base and base.repo_id else None


def check_same_source(build: Build, found: Source) -> None:
    """Compare the resolved source with that of the build.

    Anything else that the build says about its source, above all its licence, is not trusted.

    Raises:
        VerificationError: The source differs.
    """
    if found.commit != build.source.commit:
        raise VerificationError(
            f"{build.source.name} is {found.commit[:12]} here, but {build.name} was made from "
            f"{build.source.commit[:12]}",
            hint=f"use factory {build.factory_version}",
        )


def same_settings(
    build: Build, *, files: Mapping[str, tuple[str, ...]], tasks: tuple[str, ...] | None
) -> BuildConfig:
    """Return the build's settings with its data sets pinned to their commits.

    Args:
        files: Local paths of files that the build was made with, by "measure", "heal" and "evaluate", in
            the order of the build's texts.
        tasks: Tasks to evaluate on instead.

    Raises:
        DataError: A required file was not given. Names in `build.json` are never looked up on this
            machine, since its author is not trusted and a task file can run code.
    """
    values = BuildConfig.model_validate(build.config).model_dump(mode="json")
    used = _used(build)
    for use, texts in used.items():
        _check_number(build, texts, len(files[use]), option=DATA_OPTIONS[use])
        given = dict(enumerate(files[use]))
        if len(given) < len(texts):  # only those that are nowhere else
            places = [index for index, data in enumerate(texts) if _is_file(data)]
            given = dict(zip(places, given.values(), strict=False))
        pinned = [
            _pinned(data, given.get(index), option=DATA_OPTIONS[use], name=build.name)
            for index, data in enumerate(texts)
        ]
        values[use]["data"] = pinned[0] if use == "measure" else pinned
    if build.adapter and (shares := build.adapter.data.mixed):
        pairs = zip(values["heal"]["data"], shares, strict=True)
        values["heal"]["data"] = [with_share(data, one.share) for data, one in pairs]
    if "heal" not in used:  # in the settings, but never read
        _check_number(build, [], len(files["heal"]), option=DATA_OPTIONS["heal"])
        values["heal"]["data"] = [values["measure"]["data"]]
    if tasks is not None:
        values["evaluate"]["tasks"] = tasks
    elif task_files := [task for task in values["evaluate"]["tasks"] if is_task_file(task)]:
        raise DataError(
            f"task {task_files[0]} was a local file of the author of {build.name}",
            hint="pass it with `tasks`, or use `tasks=none`: the weights do not depend on it",
        )
    return BuildConfig.model_validate(values)


def _check_number(build: Build, texts: Sequence[DataSource], num_given: int, *, option: str) -> None:
    """Refuse texts that would be ignored: either all of the build's are given, or its local files."""
    num_files = sum(map(_is_file, texts))
    if num_given > len(texts) or num_files < num_given < len(texts):
        names = ", ".join(text.name for text in texts) or "no such text"
        raise DataError(
            f"--{option}: {num_given} given, but {build.name} was made with {names}",
            hint=f"give {num_files} or {len(texts)}, in this order" if num_files else f"omit --{option}",
        )


def _used(build: Build) -> dict[str, list[DataSource]]:
    used = {"measure": [build.calibration]}
    used["evaluate"] = [loss.data for loss in build.evaluations["source"].losses]
    return used | ({"heal": list(build.adapter.data.texts)} if build.adapter else {})


def _is_file(data: DataSource) -> bool:
    return not data.hub_id and data.name not in STANDARD_LIBRARY


def _pinned(data: DataSource, file: str | None, *, option: str, name: str) -> str:
    if file is not None:
        return file
    if data.hub_id:
        return f"{data.name}@{data.version}"
    if data.name in STANDARD_LIBRARY:
        return data.name
    raise DataError(
        f"{name} was made with {data.name} (sha256 {data.version[:12]}…), a file that only its author has",
        hint=f"pass it with --{option}",
    )


def check_same_texts(build: Build, texts: Texts) -> None:
    """Compare the opened texts with those of the build.

    Raises:
        DataError: A text differs, or has another version or other documents.
    """
    opened = {"measure": [texts.calibration], "heal": texts.healings, "evaluate": texts.evaluations}
    pairs = [
        (use, data, text.data)
        for use, used in _used(build).items()
        for data, text in zip(used, opened[use], strict=True)
    ]
    for use, data, found in pairs:
        if found.version != data.version:
            here, there = found.version[:12], data.version[:12]
            raise DataError(
                f"{found.name} is {here}… here, but {build.name} was made with {there}…",
                hint="Python's standard library: use the Python version of the build"
                if data.name in STANDARD_LIBRARY
                else f"pass the same file with --{DATA_OPTIONS[use]}",
            )
    for use, data, found in pairs:
        if column_in(found.name) != column_in(data.name):
            raise DataError(
                f"{found.name} is another column than {data.name}, which {build.name} was made with",
                hint=f"pass the same column with --{DATA_OPTIONS[use]}",
            )
        if found.part != data.part:  # if another text differs, that was reported above as the cause
            raise DataError(
                f"{found.name} is divided differently here: {found.part or 'whole'}, but "
                f"{build.name} was made with {data.part or 'the whole'}",
                hint=f"use factory {build.factory_version}",
            )


def comparison(published: Build, made: Build, *, reference: str) -> str:
    """Say in one line whether the weights are equal, and if not, what was different."""
    if made.files == published.files:
        return f"the same weights as {reference}, byte for byte"
    differing = sum(made.files.get(name) != sha256 for name, sha256 in published.files.items())
    reasons = [
        f"{library} {version} there, {made.versions.get(library, 'none')} here"
        for library, version in published.versions.items()
        if made.versions.get(library) != version
    ]
    if made.device != published.device:
        reasons.append(f"{published.device} there, {made.device} here")
    if made.dropped != published.dropped:
        reasons.insert(
            0, f"layers {layer_ranges(published.dropped)} there, {layer_ranges(made.dropped)} here"
        )
    return (
        f"weights differ from {reference} in {differing} of {len(published.files)} files"
        f" ({'; '.join(reasons) or 'same libraries and device'})"
    )
