"""Write the record of a build: its settings, results and measurements, and the library versions."""

import json
import platform
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from factory import __version__
from factory.artifacts import Build, Comparison, DataSource, Made
from factory.config.references import local_path, with_share
from factory.config.settings import BuildConfig, build_name
from factory.serving.runtimes import verdicts
from factory.store.stage import STAGES

if TYPE_CHECKING:
    from factory.text.text import Texts

# Libraries recorded besides those in the keys of the stages.
LIBRARIES = {"accelerate", "datasets", "huggingface_hub", "safetensors"}
RECIPE = "recipe.yaml"
PROGRAM = "hf-factory"


def describe_build(
    config: BuildConfig,
    texts: "Texts",
    made: Made,
    *,
    comparisons: dict[str, tuple[Comparison, ...]],
    healing: tuple[Comparison, ...],
    keys: Mapping[str, str],
    seconds: Mapping[str, float],
) -> Build:
    """Return everything that `build.json` records, without paths."""
    libraries = LIBRARIES.union(*(stage.libraries for stage in STAGES.values()))
    kept = {field.name for field in fields(Made)} & Build.model_fields.keys()
    return Build(
        **{name: getattr(made, name) for name in kept},
        factory_version=__version__,
        name=build_name(made.source.name, config.drop),
        reference=_without_path(config.reference, made.source.name, made.source.repo_id),
        config=_config_without_paths(config, texts, made),
        profile_samples=made.profile.num_samples,
        sink=made.profile.sink,
        calibration=made.profile.data,
        merge_base=made.result.merge_base,
        merge_losses=made.result.merge_losses,
        guard_losses=made.healed.guard_losses if made.healed else None,
        runtimes=verdicts(made.source.config, made.plan.dropped, folder=made.result.folder),
        source_parameters=made.source.num_parameters,
        result_parameters=made.result.num_parameters,
        source_bytes=made.source.size_bytes,
        result_bytes=made.result.size_bytes,
        comparisons=comparisons,
        healing=healing,
        files=made.result.files,
        stages=dict(keys),
        versions={library: version(library) for library in sorted(libraries)},
        libraries=installed_libraries(),
        seconds=dict(seconds),
        device=made.speed.device,
    )


def write_recipe(build: Build, folder: Path) -> None:
    """Write the settings of a build in readable form, with the versions of its source and texts."""
    source, healing = build.source, build.adapter
    texts = {"measure": _text(build.calibration)} | ({"heal": _healing(healing.data)} if healing else {})
    recipe = {
        "source": source.lineage.model_dump()
        if source.lineage
        else {"repo_id": source.repo_id, "commit": source.commit},
        **{key: value for key, value in build.config.items() if key != "reference"},
        "texts": texts | {"evaluate": [_text(loss.data) for loss in build.evaluations["source"].losses]},
        "dropped": list(build.dropped),
        "made_with": f"hf-factory {build.factory_version}",
    }
    head = "# What this model was made of and how; `factory build REPOSITORY --reproduce` makes it again.\n"
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    (folder / RECIPE).write_text(head + text, encoding="utf-8")


def _healing(data: DataSource) -> Any:
    return [_text(one.data) | {"share": one.share} for one in data.mixed] or _text(data)


def _text(data: DataSource) -> dict[str, str]:
    return {"name": data.name, "version": data.version}


def _config_without_paths(config: BuildConfig, texts: "Texts", made: Made) -> dict[str, Any]:
    """Return the settings with data and tasks by name, so that no local path is published."""
    values: dict[str, Any] = json.loads(config.model_dump_json())
    values["reference"] = _without_path(config.reference, made.source.name, made.source.repo_id)
    values["measure"]["data"] = texts.calibration.data.name
    values["heal"]["data"] = [
        with_share(one.data.name, one.share) for one in texts.healing.data.mixed
    ] or texts.healing.data.name
    values["evaluate"]["data"] = [text.data.name for text in texts.evaluations]
    values["evaluate"]["tasks"] = [Path(task).name for task in config.evaluate.tasks]
    return values


def _without_path(reference: str, name: str, repo_id: str | None) -> str:
    return reference if repo_id or not local_path(reference).is_dir() else name


def installed_libraries(*, of: str = PROGRAM) -> dict[str, str]:
    """Return the versions of Python and of a distribution's installed dependencies, direct and indirect.

    No other packages are listed: build.json is published, and they are the user's business. Optional
    dependencies count if an extra requires them; those not installed are omitted.
    """
    found: dict[str, str] = {}
    left = [(canonicalize_name(of), frozenset[str]())]
    seen = set(left)
    while left:
        name, extras = left.pop()
        try:
            metadata = distribution(name).metadata  # parsed at each access
        except PackageNotFoundError:
            continue
        found[name] = metadata["Version"]
        for text in metadata.get_all("Requires-Dist") or ():
            needed = Requirement(text)
            environments = [{"extra": extra} for extra in extras or {""}]
            if needed.marker and not any(needed.marker.evaluate(env) for env in environments):
                continue
            entry = (canonicalize_name(needed.name), frozenset(needed.extras))
            if entry not in seen:
                seen.add(entry)
                left.append(entry)
    found.pop(canonicalize_name(of), None)
    return {"python": platform.python_version(), **dict(sorted(found.items()))}
