"""Card: from a build to the README.md that is published with the model; every number comes from the build."""

import json
import math
import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import ValidationError

from factory import __version__
from factory.artifacts import Build, Evaluation, first_problem, is_block
from factory.config import DEFAULT_OBJECTIVE, SLOWER, BuildConfig, load_recipe, settle
from factory.durable import write_atomically
from factory.errors import StoreError
from factory.findings import (
    comparison,
    data_rows,
    gap_closed,
    precision,
    quality_rows,
    size_rows,
    task_findings,
    worst_parts,
)
from factory.markdown import HUB, clean, filters, markdown, plain
from factory.references import HUB_NAME, aliases

_ROOT = Path(__file__).parent
# A wheel carries the template inside the package; an editable install finds it in the repository.
TEMPLATES = next(
    folder
    for folder in (_ROOT / "_resources" / "model_cards", _ROOT.parent / "model_cards")
    if folder.is_dir()
)
ANGULAR_FIGURE = "figures/angular-distance.png"
HEALING_FIGURE = "figures/healing.png"
EMBEDDED = "demo"  # the one alias that is no repository


def write_card(build: Build, folder: Path, *, repo_id: str | None = None, space: str | None = None) -> Path:
    """Write README.md into the model folder; the healing curve is shown where its figure lies there.

    Raises:
        StoreError: A folder has that name.
    """
    path = folder / "README.md"
    if path.is_dir():
        raise StoreError(f"{path} is a folder, not a card", hint="move it elsewhere")
    has_figure = (folder / HEALING_FIGURE).is_file()
    write_atomically(path, render(build, repo_id=repo_id, space=space, has_healing_figure=has_figure))
    return path


@contextmanager
def renewed_card(build: Build, folder: Path, *, repo_id: str, space: str | None = None) -> Iterator[bool]:
    """Name a repository on the card while it is published there; where that fails, the old card comes back.

    Yields:
        Whether the card is one that somebody has edited, which is kept as it is.
    """
    path = folder / "README.md"
    with ExitStack() as undo:
        kept = path.is_file() and is_edited(path, build)
        if not kept:
            before = path.read_text(encoding="utf-8") if path.is_file() else None
            write_card(build, folder, repo_id=repo_id, space=space)
            undo.callback(write_atomically, path, before) if before else undo.callback(path.unlink)
        yield kept
        undo.pop_all()


def is_edited(path: Path, build: Build) -> bool:
    """Whether a card says something else than would be written, whichever repository and Space it names."""
    content = path.read_bytes()
    text = content.decode("utf-8", "replace")
    named = re.search(r'model="([^"\\\n]+)"', text)
    linked = re.search(rf"\({HUB}/spaces/({HUB_NAME.pattern})\)", text)
    has_figure = (path.parent / HEALING_FIGURE).is_file()
    return all(
        content
        != render(build, repo_id=repo_id, space=linked and linked[1], has_healing_figure=has_figure).encode()
        for repo_id in (None, named and named[1])
    )


def render(
    build: Build, *, repo_id: str | None = None, space: str | None = None, has_healing_figure: bool
) -> str:
    """The card: YAML front matter and Markdown.

    Args:
        build: Everything that is said.
        repo_id: Where it will be published; without it the code on the card loads `./model`.
        space: Where source and result can be tried side by side.
        has_healing_figure: Whether `figures/healing.png` lies beside the card.

    Raises:
        jinja2.UndefinedError: The template names something that does not exist.
    """
    config = settings_of(build)[0]
    body = (
        _environment(TEMPLATES)
        .get_template("card.md.j2")
        .render(
            build=build,
            config=config,
            front_matter=Markup(yaml.safe_dump(front_matter(build, repo_id=repo_id), **YAML_STYLE)),
            title=_title(build, repo_id=repo_id),
            model_id=repo_id or "./model",
            space=space,
            source=build.evaluations["source"],
            shipped=build.evaluations[build.shipped],
            quality=quality_rows(build),
            tasks=sorted(task_findings(build), key=_by_recovery),
            loss=comparison(build, build.shipped, "loss"),
            groups=worst_parts(build),
            writes=any(
                s.writes or s.metric == "exact_match"  # of a build from before that was kept
                for s in build.evaluations["source"].tasks
            ),
            gap_closed=gap_closed(build),
            slower=SLOWER,
            precision=precision(build),
            sizes=size_rows(build),
            command=reproduction_command(build),
            without_option=_without_option(build),
            data=data_rows(build),
            licenses=_license_names(build),
            license_url=_license_url(build),
            is_block=is_block(build.dropped),
            angular_figure=ANGULAR_FIGURE,
            healing_figure=HEALING_FIGURE if has_healing_figure and build.adapter else None,
        )
    )
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


@lru_cache
def _environment(templates: Path) -> Environment:
    """The one of a folder; it compiles a template once, which takes ten times as long as filling it in."""
    environment = Environment(
        loader=FileSystemLoader(templates),
        undefined=StrictUndefined,
        autoescape=False,  # HTML's rules are not Markdown's: `finalize` escapes instead
        finalize=lambda value: value if isinstance(value, Markup) else markdown(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters())
    return environment


# Front matter -----------------------------------------------------------------------------------

YAML_STYLE: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 10_000}


def front_matter(build: Build, *, repo_id: str | None) -> dict[str, Any]:
    """What the Hub reads: only fields that it knows, only those with a value."""
    source = build.source
    used = [build.calibration]
    if build.adapter and build.shipped == "healed":
        used.append(build.adapter.data)
    fields: dict[str, Any] = {
        "license": _one_or_all(source.licenses),
        "license_name": source.license_name,
        "license_link": _license_url(build) or source.license_link,
        "base_model": source.repo_id or _one_or_all(source.base_models),
        # The Hub knows no "pruned"; of what it knows only this fits.
        "base_model_relation": "finetune" if source.repo_id or source.base_models else None,
        "datasets": sorted({data.hub_id for data in used if data.hub_id}),
        "language": list(source.languages),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["layer-pruning", "depth-pruning", "hf-factory"] + ["custom_code"] * source.remote_code,
        "model-index": [
            {"name": _title(build, repo_id=repo_id), "results": _results(build.evaluations[build.shipped])}
        ],
    }
    return {key: clean(value) for key, value in fields.items() if value}


def _one_or_all(texts: tuple[str, ...]) -> str | list[str] | None:
    return list(texts) if len(texts) > 1 else next(iter(texts), None)


def _results(evaluation: Evaluation) -> list[dict[str, Any]]:
    loss, task = evaluation.loss, {"type": "text-generation", "name": "Text Generation"}
    text = {
        "type": loss.data.hub_id or loss.data.name,
        "name": loss.data.name,
        "split": loss.data.split,
        "revision": loss.data.version,
    }
    metrics: list[dict[str, Any]] = [
        {"type": "loss", "value": loss.nats, "name": "Loss (nats per token)"},
        {"type": "normalized_loss", "value": loss.normalized, "name": "Loss / log V"},
        {"type": "perplexity", "value": loss.perplexity, "name": "Perplexity"},
    ]
    results: list[dict[str, Any]] = [
        {
            "task": task,
            "dataset": {key: value for key, value in text.items() if value},
            "metrics": [metric for metric in metrics if math.isfinite(metric["value"])],
        }
    ]
    for score in evaluation.tasks:
        dataset: dict[str, Any] = {"type": score.task, "name": score.label}
        if len(score.data) == 1:
            data = score.data[0]
            dataset |= {"type": data.hub_id, "split": data.split, "revision": data.version}
        if score.num_fewshot is not None:
            dataset["args"] = {"num_few_shot": score.num_fewshot}
        metric = {"type": score.metric, "value": score.value, "name": f"{score.metric}, {score.shots}"}
        if math.isfinite(score.value):
            results.append({"task": task, "dataset": dataset, "metrics": [metric]})
    return results


def _by_recovery(finding: dict[str, Any]) -> float:
    return math.inf if finding["recovery"] is None else float(finding["recovery"])


def _title(build: Build, *, repo_id: str | None) -> str:
    return repo_id.rpartition("/")[2] if repo_id else build.name


def _license_names(build: Build) -> tuple[str, ...]:
    """The source's licences for people: one that the Hub has no identifier for by its own name."""
    own = build.source.license_name
    return tuple(own if own and name == "other" else name for name in build.source.licenses)


def _license_url(build: Build) -> str | None:
    """The source's licence text; a link relative to the source's repository is made absolute."""
    link, repo_id = build.source.license_link, build.source.repo_id
    if link is None or link.startswith(("https://", "http://")):
        return link
    return f"{HUB}/{quote(repo_id)}/blob/{build.source.commit}/{quote(link)}" if repo_id else None


# Reproduction -----------------------------------------------------------------------------------

FLAGS = {
    ("measure", "data"): "--calibration-data",
    ("measure", "num_samples"): "--samples",
    ("measure", "tokens"): "--tokens",
    ("measure", "four_bit"): "--load-in-4bit",
    ("plan", "criterion"): "--criterion",
    ("plan", "num_documents"): "--plan-documents",
    ("heal", "data"): "--heal-data",
    ("heal", "objective"): "--heal",
    ("heal", "num_steps"): "--heal-steps",
    ("heal", "learning_rate"): "--heal-lr",
    ("heal", "rank"): "--heal-rank",
    ("heal", "modules"): "--heal-modules",
    ("heal", "layers"): "--heal-layers",
    ("heal", "bits"): "--heal-bits",
    ("heal", "seam_weight"): "--seam-weight",
    ("evaluate", "data"): "--eval-data",
    ("evaluate", "num_documents"): "--eval-documents",
    ("evaluate", "tasks"): "--tasks",
    ("evaluate", "limit"): "--limit",
    ("evaluate", "backend"): "--eval-backend",
}
SECTIONS = ("measure", "plan", "heal", "evaluate")
WITH_LENGTH = ("measure", "heal", "evaluate")  # whose sequence length is one option
IMPLIED = {("measure", "exact_length"), ("plan", "layers")}  # by --sequence-length, in place of --drop


def reproduction_command(build: Build) -> Markup:
    """The command that makes this build, with each option whose absence would mean something else."""
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
    for name, value in differing.items():
        if name in FLAGS and isinstance(value, bool):
            parts.append(FLAGS[name])
        elif name in FLAGS:
            text = (",".join(value) or "none") if isinstance(value, list) else str(value)
            parts.append(f"{FLAGS[name]} {shlex.quote(plain(text))}")
    return Markup(" \\\n  ".join(parts))


def differing_settings(build: Build) -> dict[tuple[str, str], Any]:
    """(section, name) → value of each setting that the reference and the drop alone would not give."""
    asked = settings_of(build)[0]
    text_config = build.source.config.get("text_config") or build.source.config
    usual = settle(
        asked.reference,
        drop=asked.drop,
        recipe=load_recipe(build.reference) if _reference(build) in aliases() else None,
        num_parameters=build.source.num_parameters,
        max_length=int(text_config.get("max_position_embeddings") or 2048),
        is_folder=build.source.repo_id is None,
        overrides={"heal": {"objective": asked.heal.objective}},
    ).model_dump(mode="json")
    usual["heal"]["objective"] = DEFAULT_OBJECTIVE
    return {
        (section, key): value
        for section in SECTIONS
        if section != "heal" or asked.heal_enabled
        for key, value in getattr(asked, section).model_dump(mode="json").items()
        if value != usual[section][key]
    }


def settings_of(build: Build) -> tuple[BuildConfig, dict[str, Any]]:
    """The settings of a finished build, also of one that another version made.

    Returns:
        The settings, and by name those that this version does not have.

    Raises:
        StoreError: A value that this version does not take.
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
            f"{build.name} is of factory {build.factory_version}, which {__version__} does not read: "
            f"{first_problem(error)}",
            hint=f"install hf-factory {build.factory_version}",
        ) from error


def _reference(build: Build) -> str:
    """An alias as it was typed, since it stands for settings too; a repository with its commit."""
    repo_id = build.source.repo_id
    if build.reference in aliases() and (repo_id or build.reference == EMBEDDED):
        return build.reference
    return f"{repo_id}@{build.source.commit}" if repo_id else f"./{build.reference}"


def _without_option(build: Build) -> str:
    """Settings that no option of the command sets, as `heal.dropout = 0.1`."""
    config, gone = settings_of(build)
    one_length = len({getattr(config, section).sequence_length for section in WITH_LENGTH}) == 1
    left = {
        name: value
        for name, value in differing_settings(build).items()
        if name not in FLAGS and name not in IMPLIED and not (name[1] == "sequence_length" and one_length)
    }
    named = {f"{section}.{key}": value for (section, key), value in left.items()} | gone
    return ", ".join(f"{name} = {json.dumps(value)}" for name, value in named.items())
