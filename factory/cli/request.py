"""From the command line to a request: options and build files, read and checked."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from factory.cli.builds import check_publishable
from factory.cli.options import remark
from factory.config import references
from factory.config.request import Request
from factory.errors import UsageError
from factory.resources import DEMO_MODEL

if TYPE_CHECKING:
    from factory.artifacts import Build, Source
    from factory.cli.console import StageLines
    from factory.config.settings import BuildConfig, EvaluateSettings, Recipe
    from factory.pipeline.run import Reporter

# What a build can be given that repeats another: nothing that would make it another build.
WITH_REPRODUCE = {
    *("model", "reproduce", "calibration_data", "heal_data", "eval_data", "tasks", "out", "home"),
    *(
        "processes",
        "state",
        "push_to",
        "public",
        "accept_license",
        "trust_remote_code",
        "run_task_code",
        "rerun",
        "dry_run",
        "as_json",
    ),
}
ONCE = (
    "reproduce",
    "home",
    "rerun",
    "dry-run",
    "json",
    "print-config",
    "detach",
    "upload",
)  # of a run, not of a build
WITHOUT = "leave one of them out"


def requests(model: str, options: dict[str, Any]) -> list[Request]:
    """What to build. A flag beside a file holds for each of its builds.

    Raises:
        UsageError: A file that cannot be read or says what no flag could.
    """
    context = click.get_current_context()
    flags = {flag_of(param): param for param in context.command.params if param.name in options}
    typed = {
        flag: _written(param, options[str(param.name)])
        for flag, param in flags.items()
        if context.get_parameter_source(str(param.name)) == ParameterSource.COMMANDLINE and flag not in ONCE
    }
    if not model.endswith((".yaml", ".yml")):
        one = Request(model, options, {"model": model} | typed, None)
        _check(one, context)
        return [one]
    from factory.cli.build_file import read, replacing

    if options["reproduce"]:
        raise UsageError(f"--reproduce with {model!r}, a build file", hint="give the build itself")
    found = []
    for entry in read(Path(model)):
        kept = replacing(entry.values, typed)
        complete = dict(options)
        for flag, value in kept.items():
            if flag != "model":
                with entry.located(flag):
                    complete[str(flags[flag].name)] = _meant(flags[flag], value, context)
        found.append(Request(str(kept["model"]), complete, kept | typed, entry))
        _check(found[-1], context)
    return found


def _check(request: Request, context: click.Context) -> None:
    """Refuse what click's types let through: from the standard library alone."""
    with request.located():
        references.check_model(request.model)
        _check_options(request.options, context)
        _check_place(request.options, context)
        for name in ("timeout", "detach", "upload"):
            if request.options[name] and not request.options["on"]:
                raise UsageError(f"--{name} without --on", hint="add --on HARDWARE, as in --on a100-large")
    read = ("calibration_data", *(("heal_data",) if request.options["heal_enabled"] else ()), "eval_data")
    for data in read:
        if request.options[data] is not None:
            with request.located(data.replace("_", "-")):
                references.check_data(request.options[data])


def _check_options(options: dict[str, Any], context: click.Context) -> None:
    rate, repository, tasks = options["heal_lr"], options["push_to"], options["tasks"]
    if options["reproduce"]:
        typed = {
            name
            for name in context.params
            if context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        }
        if others := sorted(typed - WITH_REPRODUCE):
            option = next(p for p in context.command.params if p.name == others[0]).opts[0]
            raise UsageError(
                f"{option} with --reproduce, which repeats a build as it was", hint="leave one of them out"
            )
    elif options["layers"] and (options["drop"] or options["criterion"]):
        other = "--drop" if options["drop"] else "--criterion"
        raise UsageError(f"--layers with {other}: each says which layers go", hint="leave one of them out")
    elif not options["layers"] and options["drop"] is None:
        raise UsageError(
            "--drop is missing", hint="--drop 0.3 drops three of ten layers, --layers 3,7 those two"
        )
    if rate is not None and not math.isfinite(rate):
        raise UsageError(f"--heal-lr {rate} is no learning rate", hint="--heal-lr 3e-4")
    if options["seam_weight"] is not None and not math.isfinite(options["seam_weight"]):
        raise UsageError(f"--seam-weight {options['seam_weight']} is no weight", hint="--seam-weight 0.1")
    if options["public"] and not repository:
        raise UsageError("--public without --push-to", hint="add --push-to owner/name")
    if repository is not None and not re.fullmatch(r"([\w.-]+/|~/)?[\w.-]+", repository):
        raise UsageError(f"--push-to {repository!r} is no repository name", hint="--push-to owner/name")
    if tasks is not None and not all(name.strip() for name in tasks.split(",")):
        raise UsageError(f"--tasks {tasks!r} has an empty name", hint="--tasks mmlu,boolq, or --tasks none")


def _check_place(options: dict[str, Any], context: click.Context) -> None:
    """Refuse a name that is empty, and what a job has for itself: neither may be passed over in silence."""
    for name, value in options.items():
        if isinstance(value, str) and not value.strip():
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} is empty", hint=f"give --{flag} a value, or leave it out")
    if options["on"] is None:
        return
    if options["state"] is not None:
        raise UsageError("--state with --on: a job keeps its stages in a bucket of its own", hint=WITHOUT)
    if context.get_parameter_source("home") == ParameterSource.COMMANDLINE:
        raise UsageError("--home with --on: a job does not see folders of this machine", hint=WITHOUT)


def flag_of(param: click.Parameter) -> str:
    """A parameter's name on the command line and in a file: "load-in-4bit"."""
    return max(param.opts, key=len).removeprefix("--")


def _meant(param: click.Parameter, value: Any, context: click.Context) -> Any:
    """What the flag would give the command for a value of a file."""
    if isinstance(param, click.Option) and param.is_flag:
        return bool(value) != (param.flag_value is False)
    return param.type_cast_value(context, value)


def _written(param: click.Parameter, value: Any) -> Any:
    """A flag's value as a file writes it."""
    if isinstance(param, click.Option) and param.is_flag:
        return True
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def config_text(given: list[dict[str, Any]]) -> str:
    """A build file that asks for this."""
    import yaml

    value = given[0] if len(given) == 1 else {"builds": given}
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def resolve_model(model: str, recipe: "Recipe | None", *, trust_remote_code: bool = False) -> "Source":
    """The source that an alias, a repository or a folder means; no weight is read."""
    from factory.hub.resolve import resolve
    from factory.hub.source_card import README, unread_card

    if recipe is None:
        source = resolve(model, trust_remote_code=trust_remote_code)
        if source.folder and (reason := unread_card(source.folder)):
            remark(f"{source.folder / README} is not read, so no licence is known: {reason}")
        return source
    if recipe.source == "embedded":
        found = resolve(str(DEMO_MODEL))
        return found.model_copy(update={"name": recipe.alias, "license": "apache-2.0"})
    assert recipe.repo_id is not None
    return resolve(recipe.repo_id, trust_remote_code=trust_remote_code)


def pull_source(source: "Source", reporter: "Reporter") -> "Source":
    """The source with its weights here, and with its code, where that is trusted, known to transformers."""
    from factory.hub.pull import pull
    from factory.hub.remote_code import register

    if source.folder is None:
        reporter.started("pull")
        source = pull(source, progress=lambda done, total: reporter.progressed("pull", done, total, ""))
        reporter.finished("pull", f"{source.repo_id} at {source.commit[:12]}", 0.0, False)
    if source.remote_code:
        register(source)
    return source


def open_tasks(settings: "EvaluateSettings", reporter: "StageLines") -> None:
    """Load the questions that the models will answer: hours later is too late to hear that they are gone."""
    if not settings.tasks:
        return
    from factory.evaluation.harness import load_tasks

    reporter.started("questions")
    try:
        load_tasks(settings)
    finally:
        reporter.stop()


@dataclass(frozen=True)
class Asked:
    """What a build command asks for, complete."""

    reference: str  # as typed
    source: "Source"
    config: "BuildConfig"
    out: Path
    repeats: "Build | None" = None  # a finished build that is made again


def ask(model: str, options: dict[str, Any]) -> Asked:
    """What `factory build` is to make, of what, and where; no weight is read."""
    from factory.config.settings import build_name, load_recipe
    from factory.pruning.criteria import plan_without

    if options["reproduce"]:
        return _ask_again(model, options)
    recipe = load_recipe(model) if model in references.aliases() else None
    source = resolve_model(model, recipe, trust_remote_code=options["trust_remote_code"])
    drop = options["drop"]
    if options["layers"]:
        plan_without(options["layers"], num_layers=source.num_layers)  # refuses what the model lacks
        drop = len(options["layers"]) / source.num_layers
    config = settle_options(model, drop, recipe, source, options)
    out = options["out"] or Path("builds") / build_name(source.name, config.drop)
    return Asked(model, source, config, out)


def _ask_again(reference: str, options: dict[str, Any]) -> Asked:
    """The same for a build that repeats a finished one."""
    from factory.builds.reproduce import check_same_source, read_build, same_settings, source_reference
    from factory.config.settings import build_name, load_recipe

    found = read_build(reference)
    pinned = source_reference(found)
    recipe = load_recipe(pinned) if pinned in references.aliases() else None
    source = resolve_model(pinned, recipe, trust_remote_code=options["trust_remote_code"])
    check_same_source(found, source)
    files = {
        "measure": options["calibration_data"],
        "heal": options["heal_data"],
        "evaluate": options["eval_data"],
    }
    config = same_settings(found, files=files, tasks=_named_tasks(options["tasks"]))
    out = options["out"] or Path("builds") / f"{build_name(source.name, config.drop)}-reproduced"
    return Asked(reference, source, config, out, repeats=found)


def _named_tasks(tasks: str | None) -> tuple[str, ...] | None:
    """--tasks as names; None where it was not given."""
    if tasks is None:
        return None
    return () if tasks == "none" else tuple(name.strip() for name in tasks.split(","))


def settle_options(
    model: str, drop: float, recipe: "Recipe | None", source: "Source", options: dict[str, Any]
) -> "BuildConfig":
    """One complete configuration: options over the recipe over the defaults. What a command lacks is unset.

    Raises:
        UsageError: Sequences longer than the model was made for.
    """
    from factory.config.settings import settle

    length = options.get("sequence_length")
    max_length = _max_length(source.config)
    if length is not None and length > max_length:
        raise UsageError(
            f"--sequence-length {length} is more than the {max_length} tokens the model was made for",
            hint=f"give {max_length} or fewer",
        )
    return settle(
        model,
        drop=drop,
        recipe=recipe,
        num_parameters=source.num_parameters,
        max_length=max_length,
        is_folder=source.repo_id is None,
        overrides={
            "seed": options.get("seed"),
            "heal_enabled": options.get("heal_enabled"),
            "merge_base": options.get("merge_base"),
            "measure": {
                "data": options.get("calibration_data"),
                "num_samples": options.get("samples"),
                "sequence_length": length,
                "exact_length": True if length else None,
                "tokens": options.get("tokens"),
                "four_bit": options.get("four_bit") or None,
            },
            "plan": {
                "criterion": options.get("criterion"),
                "layers": options.get("layers"),
                "num_documents": options.get("plan_documents"),
                "sequence_length": length,
            },
            "heal": {
                "data": options.get("heal_data"),
                "objective": options.get("heal_objective"),
                "num_steps": options.get("heal_steps"),
                "learning_rate": options.get("heal_lr"),
                "rank": options.get("heal_rank"),
                "modules": options.get("heal_modules"),
                "layers": options.get("heal_layers"),
                "bits": options.get("heal_bits"),
                "seam_weight": options.get("seam_weight"),
                "sequence_length": length,
            },
            "evaluate": {
                "data": options.get("eval_data"),
                "num_documents": options.get("eval_documents"),
                "backend": options.get("eval_backend"),
                "sequence_length": length,
                "tasks": _named_tasks(options.get("tasks")),
                "limit": options.get("limit"),
            },
        },
    )


def _max_length(config: dict[str, Any]) -> int:
    """Tokens the model was made for, by its configuration; 2048 where it does not say."""
    text_config = config.get("text_config")
    for part in (text_config if isinstance(text_config, dict) else {}, config):
        for name in ("max_position_embeddings", "n_positions", "n_ctx"):
            if type(part.get(name)) is int and part[name] > 0:
                return int(part[name])
    return 2048


def look_at_all(requests: list[Request]) -> list[Asked]:
    """What each build is to make, and that none takes another's place."""
    asked = []
    for request in requests:
        with request.located():
            asked.append(look_at(request))
    check_apart(requests, asked)
    return asked


def look_at(request: Request) -> Asked:
    """What one build is to make, and whether it may be published."""
    from factory.hub.push import full_name

    options = request.options
    if options["require_healing"] and not options["heal_enabled"]:
        raise UsageError("--require-healing and --no-heal are both there", hint="leave one of them away")
    if options["push_to"]:
        full_name(options["push_to"])  # nobody logged in: say so now, not after hours
    asked = ask(request.model, options)
    if options["push_to"]:
        check_publishable(asked.source, accepted=options["accept_license"])
    return asked


def check_apart(requests: list[Request], asked: list[Asked]) -> None:
    """Refuse builds that would overwrite one another, however their places are written."""
    from factory.hub.push import full_name

    taken: dict[tuple[str, str], int] = {}
    for request, one in zip(requests, asked, strict=True):
        line, repository = request.entry.line if request.entry else 0, request.options["push_to"]
        places = [("out", str(one.out), str(one.out.resolve()))]
        if repository is not None:
            places.append(("push-to", repository, full_name(repository).casefold()))
        for key, written, place in places:
            if (key, place) in taken:
                with request.located(key):
                    raise UsageError(
                        f"{written} is where the build in line {taken[key, place]} goes",
                        hint=f"give each build its own `{key}`",
                    )
            taken[key, place] = line


def preview_lines(config: "BuildConfig") -> list[tuple[str, str]]:
    heal, measure, evaluate = config.heal, config.measure, config.evaluate
    samples = measure.num_samples or f"until the choice is certain, at most {measure.max_samples:,}"
    tokens = heal.num_steps * heal.batch_size * heal.sequence_length
    healing = (
        f"{heal.num_steps:,} steps of {heal.batch_size} × {heal.sequence_length} tokens "
        f"({tokens / 1e6:.2f} M) of {heal.data}, {heal.objective}, "
        f"LoRA rank {heal.rank} over {heal.bits} bits, rate {heal.learning_rate:g}"
        if config.heal_enabled
        else "no"
    )
    tasks = ", ".join(evaluate.tasks) or "no tasks (--tasks mmlu,boolq adds some)"
    return [
        ("measure", f"{samples} documents of {measure.data}"),
        ("heal", healing),
        ("evaluate", f"loss on {evaluate.num_documents} documents of {evaluate.data}; {tasks}"),
    ]
