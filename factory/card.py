"""Card: from a build to the README.md that is published with the model; every number comes from the build."""

import json
import math
import re
import shlex
import unicodedata
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from factory.artifacts import Build, Evaluation, TaskScore, layer_ranges
from factory.config import BuildConfig, load_recipe
from factory.references import aliases

HUB = "https://huggingface.co"
_ROOT = Path(__file__).parent
# A wheel carries the template inside the package; an editable install finds it in the repository.
TEMPLATES = next(
    folder
    for folder in (_ROOT / "_resources" / "model_cards", _ROOT.parent / "model_cards")
    if folder.is_dir()
)
ANGULAR_FIGURE = "figures/angular-distance.png"
HEALING_FIGURE = "figures/healing.png"
SIGNIFICANT = 2  # standard errors


def write_card(build: Build, folder: Path, *, repo_id: str | None = None) -> Path:
    """Write README.md into the model folder; the healing curve is shown where its figure lies there."""
    path = folder / "README.md"
    has_figure = (folder / HEALING_FIGURE).is_file()
    path.write_text(render(build, repo_id=repo_id, has_healing_figure=has_figure), encoding="utf-8")
    return path


def render(build: Build, *, repo_id: str | None = None, has_healing_figure: bool) -> str:
    """The card: YAML front matter and Markdown.

    Args:
        build: Everything that is said.
        repo_id: Where it will be published; without it the code on the card loads `./model`.
        has_healing_figure: Whether `figures/healing.png` lies beside the card.

    Raises:
        jinja2.UndefinedError: The template names something that does not exist.
    """
    config = BuildConfig.model_validate(build.config)
    body = (
        _environment()
        .get_template("card.md.j2")
        .render(
            build=build,
            config=config,
            front_matter=Markup(yaml.safe_dump(front_matter(build, repo_id=repo_id), **YAML_STYLE)),
            title=_title(build, repo_id=repo_id),
            model_id=repo_id or "./model",
            source=build.evaluations["source"],
            shipped=build.evaluations[build.shipped],
            quality=quality_rows(build),
            tasks=task_findings(build),
            sizes=size_rows(build),
            command=reproduction_command(build),
            data=data_rows(build),
            license_url=_license_url(build),
            angular_figure=ANGULAR_FIGURE,
            healing_figure=HEALING_FIGURE if has_healing_figure and build.adapter else None,
        )
    )
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


# Front matter -----------------------------------------------------------------------------------

YAML_STYLE: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 10_000}


def front_matter(build: Build, *, repo_id: str | None) -> dict[str, Any]:
    """What the Hub reads: only fields that it knows, only those with a value."""
    source = build.source
    used = [build.calibration]
    if build.adapter and build.shipped == "healed":
        used.append(build.adapter.data)
    fields: dict[str, Any] = {
        "license": source.license,
        "license_name": source.license_name,
        "license_link": _license_url(build) or source.license_link,
        "base_model": source.repo_id,
        # The Hub knows no "pruned"; of what it knows only this fits.
        "base_model_relation": "finetune" if source.repo_id else None,
        "datasets": sorted({data.hub_id for data in used if data.hub_id}),
        "language": list(source.languages),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["layer-pruning", "depth-pruning", "hf-factory"],
        "model-index": [
            {"name": _title(build, repo_id=repo_id), "results": _results(build.evaluations[build.shipped])}
        ],
    }
    return {key: _clean(value) for key, value in fields.items() if value}


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
        dataset = {"type": score.task, "name": score.label, "args": {"num_few_shot": score.num_fewshot}}
        metric = {
            "type": score.metric,
            "value": score.value,
            "name": f"{score.metric}, {score.num_fewshot}-shot",
        }
        results.append({"task": task, "dataset": dataset, "metrics": [metric]})
    return results


def _title(build: Build, *, repo_id: str | None) -> str:
    return repo_id.rpartition("/")[2] if repo_id else build.name


def _license_url(build: Build) -> str | None:
    """The source's licence text; a link relative to the source's repository is made absolute."""
    link, repo_id = build.source.license_link, build.source.repo_id
    if link is None or link.startswith(("https://", "http://")):
        return link
    return f"{HUB}/{quote(repo_id)}/blob/{build.source.commit}/{quote(link)}" if repo_id else None


# Rows of the tables -----------------------------------------------------------------------------


def quality_rows(build: Build) -> list[list[str]]:
    """Head, losses and tasks: a column a model, then the recovery where there are tasks."""
    names = [name for name in ("source", "pruned", "healed") if name in build.evaluations]
    evaluations = [build.evaluations[name] for name in names]
    losses = [evaluation.loss for evaluation in evaluations]
    findings = task_findings(build)
    rows = [
        ["", *(f"{name} (this model)" if name == build.shipped else name for name in names)],
        ["Loss, nats per token ↓", *(_with_error(loss.nats, loss.stderr) for loss in losses)],
        ["Loss / log V ↓", *(_number(loss.normalized) for loss in losses)],
        ["Perplexity ↓", *(_number(loss.perplexity) for loss in losses)],
    ]
    if findings:
        rows = [[*row, "recovery" if row is rows[0] else ""] for row in rows]
    for finding in findings:
        task: TaskScore = finding["source"]
        chance = "" if task.chance is None else f" (chance {_number(task.chance)})"
        scores = [_score_of(evaluation, task) for evaluation in evaluations]
        rows.append(
            [
                f"{task.label}, {task.num_fewshot}-shot, {task.metric} ↑{chance}",
                *(_with_error(score.value, score.stderr) for score in scores),
                "n/a" if finding["recovery"] is None else _percent(finding["recovery"]),
            ]
        )
    return rows


def task_findings(build: Build) -> list[dict[str, Any]]:
    """For each task: score of the source and of this model, and what follows from the two."""
    findings = []
    for source in build.evaluations["source"].tasks:
        shipped = _score_of(build.evaluations[build.shipped], source)
        error = math.hypot(source.stderr or 0, shipped.stderr or 0)
        findings.append(
            {
                "source": source,
                "shipped": shipped,
                "recovery": recovery(source, shipped),
                "at_chance": is_above_chance(source) and not is_above_chance(shipped),
                "worse": source.value - shipped.value > SIGNIFICANT * error,
                "says_nothing": source.chance is not None and not is_above_chance(source),
            }
        )
    return sorted(findings, key=lambda finding: 1.0 if finding["recovery"] is None else finding["recovery"])


def _score_of(evaluation: Evaluation, like: TaskScore) -> TaskScore:
    return next(s for s in evaluation.tasks if (s.task, s.metric) == (like.task, like.metric))


def is_above_chance(score: TaskScore) -> bool:
    """Whether a score exceeds chance by more than two standard errors."""
    return score.chance is not None and score.value - score.chance > SIGNIFICANT * (score.stderr or 0)


def recovery(source: TaskScore, shipped: TaskScore) -> float | None:
    """(score − chance) / (source − chance); None where the source is not clearly above chance."""
    if source.chance is None or not is_above_chance(source):
        return None
    return (shipped.value - source.chance) / (source.value - source.chance)


def size_rows(build: Build) -> list[list[str]]:
    """Label, source, this model, ratio: parameters, bytes and, where measured, tokens a second."""
    before, after = build.source_parameters, build.result_parameters
    rows = [["Parameters", f"{before:,}", f"{after:,}", _ratio(after, before)]]
    before, after = build.source_bytes, build.result_bytes
    rows.append(["Weight files", _size(before), _size(after), _ratio(after, before)])
    if build.speed:
        old, new = build.speed.source, build.speed.result
        for label, speed, spread in (
            ("Reading the prompt, tokens/s", "prefill_tokens_per_second", "prefill_spread"),
            ("Writing, tokens/s", "decode_tokens_per_second", "decode_spread"),
        ):
            rates = [_rate(getattr(side, speed), getattr(side, spread)) for side in (old, new)]
            rows.append([label, *rates, _ratio(getattr(new, speed), getattr(old, speed))])
    return rows


def data_rows(build: Build) -> list[tuple[str, str, str]]:
    """Use, name and version of each text."""
    loss = build.evaluations[build.shipped].loss
    used = [("calibration text", build.calibration)]
    if build.adapter:
        used.append(("healing text", build.adapter.data))
    used.append(("evaluation text", loss.data))
    return [(use, f"{d.name}, {d.split} split" if d.split else d.name, d.version) for use, d in used]


# Reproduction -----------------------------------------------------------------------------------


def reproduction_command(build: Build) -> Markup:
    """The command that makes this build, with each setting that differs from what it would be unsaid."""
    config = BuildConfig.model_validate(build.config)
    if build.source.repo_id:
        reference = f"{build.source.repo_id}@{build.source.commit}"
    else:
        reference = build.reference if build.reference in aliases() else f"./{build.reference}"
    parts = ["factory build", _shell(reference), f"--drop {config.drop:g}"]
    if config.seed:
        parts.append(f"--seed {config.seed}")
    if not config.heal_enabled:
        parts.append("--no-heal")
    usual: Any = (
        load_recipe(reference) if reference in aliases() else BuildConfig(reference="", drop=config.drop)
    )
    sections = ["measure", "heal", "evaluate"] if config.heal_enabled else ["measure", "evaluate"]
    for section in sections:
        asked = {**getattr(config, section).model_dump(mode="json"), "data": _data_name(build, section)}
        for key, value in getattr(usual, section).model_dump(mode="json").items():
            if asked[key] != value:
                text = asked[key] if isinstance(asked[key], str) else json.dumps(asked[key])
                parts.append(f"--set {_shell(f'{section}.{key}={text}')}")
    return Markup(" \\\n  ".join([" ".join(parts[:3]), *parts[3:]]))


def _data_name(build: Build, section: str) -> str:
    """The text's name, never the path that was typed."""
    if section == "measure":
        return build.calibration.name
    if section == "heal" and build.adapter:
        return build.adapter.data.name
    return build.evaluations["source"].loss.data.name


def _shell(text: str) -> str:
    return shlex.quote(_plain(text))


# Text -------------------------------------------------------------------------------------------


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=False,  # HTML's rules are not Markdown's: `finalize` escapes instead
        finalize=lambda value: value if isinstance(value, Markup) else markdown(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        code=code,
        count=_count,
        exact=lambda value: f"{value:,}",
        hub_url=lambda repo_id: Markup(f"{HUB}/{quote(_plain(repo_id))}"),
        url=lambda text: Markup(quote(_plain(text), safe=":/?=&%#~+,;@")),
        python=lambda text: Markup(json.dumps(_plain(text), ensure_ascii=False)),
        layers=layer_ranges,
        number=_number,
        percent=_percent,
        general=lambda value: f"{value:g}",
        duration=_duration,
        rule=lambda cells: Markup("|---|" + "--:|" * (len(cells) - 1)),
        row=lambda cells: Markup(f"| {' | '.join(markdown(cell) for cell in cells)} |"),
    )
    return environment


def _plain(text: str) -> str:
    """Text on one line without control, format (such as right-to-left) and surrogate characters."""
    spaced = " ".join(text.split())
    return "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"))


def _clean(value: Any) -> Any:
    """`_plain` on every string of a nested value."""
    if isinstance(value, str):
        return _plain(value)
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list) else value


def markdown(text: str) -> Markup:
    """Text that shows as it is, in prose and in tables: nothing in it is Markdown, HTML or a link."""
    escaped = re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", _plain(text))
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(re.sub(r"://|(?<=www)\.", lambda match: "\\" + match[0], escaped, flags=re.IGNORECASE))


def code(text: str) -> Markup:
    """A code span; with a backtick or a table's bar in it, escaped text, which no span can hold safely."""
    plain = _plain(text)
    return markdown(plain) if "`" in plain or "|" in plain or not plain else Markup(f"`{plain}`")


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "∞"


def _with_error(value: float, stderr: float | None) -> str:
    return _number(value) if stderr is None else f"{_number(value)} ± {_number(stderr)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _count(value: int) -> str:
    """7241732096 → "7.24 billion"."""
    for size, name in ((10**9, " billion"), (10**6, " million"), (10**3, " thousand")):
        if value >= size:
            return f"{value / size:.3g}{name}"
    return str(value)


def _size(size_bytes: int) -> str:
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size_bytes >= size:
            return f"{size_bytes / size:.2f} {unit}"
    return f"{size_bytes} B"


def _ratio(after: float, before: float) -> str:
    return f"{after / before:.2f} ×" if before else "n/a"


def _rate(tokens_per_second: float, spread: float) -> str:
    digits = 0 if tokens_per_second >= 100 else 1
    return f"{tokens_per_second:,.{digits}f} ± {100 * spread:.0f} %"
