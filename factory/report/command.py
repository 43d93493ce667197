"""Reconstruct the command that reproduces a build."""

import json
import shlex
from typing import Any

from markupsafe import Markup
from pydantic import ValidationError

from factory import __version__
from factory.artifacts import Build, first_problem
from factory.config.objectives import DEFAULT_OBJECTIVE
from factory.config.references import EMBEDDED, aliases
from factory.config.request import BuildRequest
from factory.config.settings import BuildConfig, settle
from factory.errors import StoreError
from factory.report.markdown import plain

SECTIONS = ("measure", "plan", "heal", "evaluate")
WITH_LENGTH = ("measure", "heal", "evaluate")  # sections whose sequence length is one option
IMPLIED = {("measure", "exact_length"), ("plan", "layers")}  # set by --sequence-length and --layers
# (section, setting) → the option that alone decides it.
FLAGS = {
    tuple(option.sets[0].split(".")): "--" + name.replace("_", "-")
    for name, (_, option) in BuildRequest.options().items()
    if len(option.sets) == 1 and "." in option.sets[0] and name != "layers"
}


def reproduction_command(build: Build) -> Markup:
    """Return the command that makes this build, with every option that differs from its default."""
    config = settings_of(build)[0]
    chosen = config.plan.layers
    cut = f"--layers {','.join(map(str, chosen))}" if chosen else f"--drop {config.drop:g}"
    parts = [f"factory build {shlex.quote(plain(_reference(build)))} {cut}"]
    if build.source.remote_code:
        parts.append("--trust-remote-code")
    if any(score.runs_code for score in build.evaluations["source"].tasks):
        parts.append("--run-task-code")
    if config.seed:
        parts.append(f"--seed {config.seed}")
    if not config.heal_enabled:
        parts.append("--no-heal")
    if config.heal_enabled and config.merge_base != "auto":
        parts.append(f"--merge-base {config.merge_base}")
    differing = differing_settings(build)
    lengths = {getattr(config, section).sequence_length for section in WITH_LENGTH}
    if len(lengths) == 1 and any(key == "sequence_length" for _, key in differing):
        parts.append(f"--sequence-length {lengths.pop()}")
    parts += [part for name, value in differing.items() if name in FLAGS for part in _flags(name, value)]
    return Markup(" \\\n  ".join(parts))


def _flags(name: tuple[str, str], value: Any) -> list[str]:
    """Return an option with its value, once for each text."""
    if isinstance(value, bool):
        return [FLAGS[name]]
    if name[1] == "data" and isinstance(value, list):
        return [f"{FLAGS[name]} {shlex.quote(plain(text))}" for text in value]
    text = (",".join(value) or "none") if isinstance(value, list) else str(value)
    return [f"{FLAGS[name]} {shlex.quote(plain(text))}"]


def differing_settings(build: Build) -> dict[tuple[str, str], Any]:
    """Return (section, name) → value of all settings that do not follow from the reference and the drop."""
    config = settings_of(build)[0]
    request = BuildRequest(
        model=_reference(build) if _reference(build) in aliases() else "owner/name",
        heal=config.heal.objective,
    )
    usual = settle(request, build.source, drop=config.drop).model_dump(mode="json")
    usual["heal"]["objective"] = DEFAULT_OBJECTIVE.name
    return {
        (section, key): value
        for section in SECTIONS
        if section != "heal" or config.has_adapter
        for key, value in getattr(config, section).model_dump(mode="json").items()
        if value != usual[section][key]
    }


def settings_of(build: Build) -> tuple[BuildConfig, dict[str, Any]]:
    """Return the settings of a finished build, possibly of another version.

    Returns:
        The settings, and by name those that this version does not have.

    Raises:
        StoreError: This version does not accept a value.
    """
    known: dict[str, Any] = {}
    gone: dict[str, Any] = {}
    for name, value in build.config.items():
        field = BuildConfig.model_fields.get(name)
        if field is None:
            gone[name] = value
        elif name in SECTIONS and isinstance(value, dict):
            names = getattr(field.annotation, "model_fields", {})
            known[name] = {key: inner for key, inner in value.items() if key in names}
            gone |= {f"{name}.{key}": inner for key, inner in value.items() if key not in names}
        else:
            known[name] = value
    try:
        return BuildConfig.model_validate(known), gone
    except ValidationError as error:
        raise StoreError(
            f"{build.name} was made by factory {build.factory_version}, and {__version__} cannot read it: "
            f"{first_problem(error)}",
            hint=f"use factory {build.factory_version}",
        ) from error


def _reference(build: Build) -> str:
    """Return the alias as typed, since it implies settings, or the repository with its commit."""
    origin = build.source.lineage.adapter if build.source.lineage else build.source
    repo_id = origin.repo_id
    if build.reference in aliases() and (repo_id or build.reference == EMBEDDED):
        return build.reference
    return f"{repo_id}@{origin.commit}" if repo_id else f"./{build.reference}"


def without_option(build: Build) -> str:
    """Return settings that no option of the command can set, as `heal.dropout = 0.1`."""
    config, gone = settings_of(build)
    one_length = len({getattr(config, section).sequence_length for section in WITH_LENGTH}) == 1
    left = {
        name: value
        for name, value in differing_settings(build).items()
        if name not in FLAGS and name not in IMPLIED and not (name[1] == "sequence_length" and one_length)
    }
    named = {f"{section}.{key}": value for (section, key), value in left.items()} | gone
    return ", ".join(f"{name} = {json.dumps(value)}" for name, value in named.items())
