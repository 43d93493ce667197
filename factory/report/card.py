"""Render a build as the README.md published with its model; every number comes from the build."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from factory.artifacts import Build, Evaluation, Gguf, Ggufs, PruningPlan, TokenLoss, is_block
from factory.config.criteria import criterion_of
from factory.config.objectives import OBJECTIVES
from factory.config.references import HUB_NAME
from factory.config.settings import SLOWER
from factory.errors import StoreError
from factory.report.command import reproduction_command, settings_of, without_option
from factory.report.markdown import HUB, clean, filters, markdown
from factory.report.notes import goal_note, tie_note
from factory.report.tables import (
    comparison,
    data_rows,
    headline,
    loss_findings,
    precision,
    quality_table,
    size_table,
    task_findings,
    worst_parts,
)
from factory.resources import CARD_TEMPLATES
from factory.store.files import write_atomically

ANGULAR_FIGURE = "figures/angular-distance.png"
HEALING_FIGURE = "figures/healing.png"


def write_card(build: Build, folder: Path, *, repo_id: str | None = None, space: str | None = None) -> Path:
    """Write README.md into the model folder, with the healing curve if its figure is there.

    Raises:
        StoreError: README.md is a folder.
    """
    path = folder / "README.md"
    if path.is_dir():
        raise StoreError(f"{path} is a folder, not a card", hint="move it elsewhere")
    write_atomically(path, render(build, repo_id=repo_id, space=space, **_beside(folder)))
    return path


@contextmanager
def renewed_card(build: Build, folder: Path, *, repo_id: str, space: str | None = None) -> Iterator[bool]:
    """Name a repository on the card while it is published; if that fails, restore the old card.

    Yields:
        Whether the card was edited by hand, and is therefore unchanged.
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
    """Return whether a card differs from the one that would be written, whatever repository it names."""
    content = path.read_bytes()
    text = content.decode("utf-8", "replace")
    named = re.search(r'model="([^"\\\n]+)"', text)
    linked = re.search(rf"\({HUB}/spaces/({HUB_NAME.pattern})\)", text)
    beside = _beside(path.parent)
    return all(
        content != render(build, repo_id=repo_id, space=linked and linked[1], **beside).encode()
        for repo_id in (None, named and named[1])
    )


def _beside(folder: Path) -> dict[str, Any]:
    """Return what lies in the model folder and belongs on the card."""
    found = Ggufs.find(folder)
    ggufs = found.files if found else ()
    return {"has_healing_figure": (folder / HEALING_FIGURE).is_file(), "ggufs": ggufs}


def render(
    build: Build,
    *,
    repo_id: str | None = None,
    space: str | None = None,
    has_healing_figure: bool,
    ggufs: Sequence[Gguf] = (),
) -> str:
    """Render the card: YAML front matter and Markdown.

    Args:
        build: Build that the card describes.
        repo_id: Repository to publish to; without it the code on the card loads `./model`.
        space: Space that compares source and result side by side.
        has_healing_figure: Whether `figures/healing.png` is beside the card.
        ggufs: GGUF files beside the card.

    Raises:
        jinja2.UndefinedError: The template uses an undefined name.
    """
    config = settings_of(build)[0]
    body = (
        _environment(CARD_TEMPLATES)
        .get_template("card.md.j2")
        .render(
            build=build,
            config=config,
            objective=OBJECTIVES[build.adapter.objective]
            if build.adapter and build.adapter.objective
            else None,
            choice=_choice(build.plan),
            goal=goal_note(config.size, parameters=build.result_parameters) if config.size else None,
            ties=tie_note(build.plan, num_samples=build.profile_samples),
            front_matter=Markup(yaml.safe_dump(front_matter(build, repo_id=repo_id), **YAML_STYLE)),
            title=_title(build, repo_id=repo_id),
            model_id=repo_id or "./model",
            space=space,
            source=build.evaluations["source"],
            shipped=build.evaluations[build.shipped],
            headline=list(zip(*headline(build), strict=True)),
            quality=quality_table(build),
            example="def read_lines(path):"
            if build.calibration.name.startswith("stdlib:")
            else "A glacier is",
            tasks=sorted(task_findings(build), key=_by_recovery),
            loss=comparison(build, build.shipped, "loss"),
            groups=worst_parts(build),
            writes=any(
                s.writes or s.metric == "exact_match"  # builds before `writes` was recorded
                for s in build.evaluations["source"].tasks
            ),
            losses=loss_findings(build),
            decision=build.decision,
            slower=SLOWER,
            precision=precision(build),
            sizes=size_table(build),
            command=reproduction_command(build),
            without_option=without_option(build),
            data=data_rows(build),
            licenses=_license_names(build),
            license_url=_license_url(build),
            is_block=is_block(build.dropped),
            angular_figure=ANGULAR_FIGURE,
            ggufs=ggufs,
            healing_figure=HEALING_FIGURE if has_healing_figure and build.adapter else None,
        )
    )
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


@lru_cache
def _environment(templates: Path) -> Environment:
    """Return a folder's jinja2 environment, cached because compiling takes ten times as long as rendering."""
    environment = Environment(
        loader=FileSystemLoader(templates),
        undefined=StrictUndefined,
        autoescape=False,  # escapes HTML, not Markdown: `finalize` does that instead
        finalize=lambda value: value if isinstance(value, Markup) else markdown(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters())
    return environment


YAML_STYLE: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 10_000}


def front_matter(build: Build, *, repo_id: str | None) -> dict[str, Any]:
    """Return the metadata for the Hub: only fields that it knows and that have a value."""
    source = build.source
    used = [build.calibration]
    if build.adapter and build.shipped == "healed":
        used += build.adapter.data.texts
    fields: dict[str, Any] = {
        "license": _one_or_all(source.licenses),
        "license_name": source.license_name,
        "license_link": _license_url(build) or source.license_link,
        "base_model": source.repo_id or _one_or_all(source.base_models),
        # The Hub has no "pruned"; of its values only this one fits.
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
    task = {"type": "text-generation", "name": "Text Generation"}
    results = [_loss_result(loss, task) for loss in evaluation.losses]
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


def _loss_result(loss: TokenLoss, task: dict[str, str]) -> dict[str, Any]:
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
    return {
        "task": task,
        "dataset": {key: value for key, value in text.items() if value},
        "metrics": [metric for metric in metrics if math.isfinite(metric["value"])],
    }


def _choice(plan: PruningPlan) -> str:
    """Explain how the layers were chosen if not by the distance."""
    order = ", ".join(map(str, plan.order or ()))
    return criterion_of(plan.criterion).card.format(num_documents=f"{plan.num_documents or 0:,}", order=order)


def _by_recovery(finding: dict[str, Any]) -> float:
    return math.inf if finding["recovery"] is None else float(finding["recovery"])


def _title(build: Build, *, repo_id: str | None) -> str:
    return repo_id.rpartition("/")[2] if repo_id else build.name


def _license_names(build: Build) -> tuple[str, ...]:
    """Return the source's licences in readable form: unknown to the Hub ("other"), by their own name."""
    own = build.source.license_name
    return tuple(own if own and name == "other" else name for name in build.source.licenses)


def _license_url(build: Build) -> str | None:
    """Return the link to the source's licence; one relative to its repository is made absolute."""
    link, repo_id = build.source.license_link, build.source.repo_id
    if link is None or link.startswith(("https://", "http://")):
        return link
    return f"{HUB}/{quote(repo_id)}/blob/{build.source.commit}/{quote(link)}" if repo_id else None
