"""From what was typed to the source and the complete configuration that it means."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory import references
from factory.commands.options import remark
from factory.errors import UsageError

if TYPE_CHECKING:
    from factory.artifacts import Build, Source
    from factory.config import BuildConfig, EvaluateSettings, Recipe
    from factory.run import Reporter
    from factory.screen import StageLines


def resolve_model(model: str, recipe: "Recipe | None", *, trust_remote_code: bool = False) -> "Source":
    """The source that an alias, a repository or a folder means; no weight is read."""
    from factory import hub
    from factory.source_card import README, unread_card

    if recipe is None:
        source = hub.resolve(model, trust_remote_code=trust_remote_code)
        if source.folder and (reason := unread_card(source.folder)):
            remark(f"{source.folder / README} is not read, so no licence is known: {reason}")
        return source
    if recipe.source == "embedded":
        found = hub.resolve(str(references.DEMO_MODEL))
        return found.model_copy(update={"name": recipe.alias, "license": "apache-2.0"})
    assert recipe.repo_id is not None
    return hub.resolve(recipe.repo_id, trust_remote_code=trust_remote_code)


def pull_source(source: "Source", reporter: "Reporter") -> "Source":
    """The source with its weights here, and with its code, where that is trusted, known to transformers."""
    from factory import hub
    from factory.remote_code import register

    if source.folder is None:
        reporter.started("pull")
        source = hub.pull(source, progress=lambda done, total: reporter.progressed("pull", done, total, ""))
        reporter.finished("pull", f"{source.repo_id} at {source.commit[:12]}", 0.0, False)
    if source.remote_code:
        register(source)
    return source


def open_tasks(settings: "EvaluateSettings", reporter: "StageLines") -> None:
    """Load the questions that the models will answer: hours later is too late to hear that they are gone."""
    if not settings.tasks:
        return
    from factory.harness import load_tasks

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
    from factory.config import build_name, load_recipe
    from factory.plan import plan_without

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
    from factory import reproduce
    from factory.config import build_name, load_recipe

    found = reproduce.read_build(reference)
    pinned = reproduce.source_reference(found)
    recipe = load_recipe(pinned) if pinned in references.aliases() else None
    source = resolve_model(pinned, recipe, trust_remote_code=options["trust_remote_code"])
    reproduce.check_same_source(found, source)
    files = {
        "measure": options["calibration_data"],
        "heal": options["heal_data"],
        "evaluate": options["eval_data"],
    }
    config = reproduce.same_settings(found, files=files, tasks=_named_tasks(options["tasks"]))
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
    from factory.config import settle

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
