"""The command line: arguments in, screens and exit codes out. Heavy libraries are imported only to work."""

import io
import math
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from factory import __version__, references
from factory.errors import FactoryError, UsageError

if TYPE_CHECKING:
    from factory.artifacts import Source
    from factory.config import BuildConfig, Recipe

RERUN_STAGES = ("measure", "plan", "prune", "heal", "merge", "evaluate", "speed")
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Fraction(click.ParamType[float]):
    """A number strictly between 0 and 1."""

    name = "fraction"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Refuse what is no fraction, with the value in the message."""
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 < number < 1:
            raise UsageError(
                f"--drop {value} is not a fraction between 0 and 1",
                hint="--drop 0.3 drops three of ten layers",
            )
        return number


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="factory")
def cli() -> None:
    """Make a language model smaller: drop the layers it needs least, heal the cut, measure, publish.

    \b
    factory build demo --drop 0.3          a whole build on this machine, no network, minutes
    factory build mistral-7b --drop 0.3    the same for a model on the Hub
    """


home_option = click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="FACTORY_HOME",
    help="Where finished stages are kept, for reuse by all builds.  [default: user cache]",
)


@cli.command(context_settings=CONTEXT)
@click.argument("model")
@click.option("--drop", type=Fraction(), required=True, help="Fraction of the decoder layers to drop.")
@click.option("--calibration-data", metavar="DATA", help="Text to measure on.")
@click.option("--heal-data", metavar="DATA", help="Text to heal on.")
@click.option("--eval-data", metavar="DATA", help="Text for the loss; keep it apart from the other two.")
@click.option("--tasks", metavar="A,B", help="lm-eval tasks or YAML files; 'none' for none.")
@click.option("--limit", type=click.IntRange(1), help="Samples a task, for a quick look.")
@click.option("--samples", type=click.IntRange(2), help="Documents to measure on.")
@click.option("--sequence-length", type=click.IntRange(8), help="Tokens a sequence, in all stages.")
@click.option("--heal/--no-heal", "heal_enabled", default=True, help="Heal the cut, or leave it.")
@click.option("--heal-steps", type=click.IntRange(1), help="Optimiser steps.")
@click.option("--heal-lr", type=click.FloatRange(0, min_open=True), help="Peak learning rate.")
@click.option("--heal-rank", type=click.IntRange(1), help="LoRA rank; alpha equals it.")
@click.option("--eval-documents", type=click.IntRange(2), help="Documents for the loss.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of everything that is drawn.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Build folder.  [default: builds/NAME]")
@home_option
@click.option("--push-to", metavar="REPO", help="Publish on the Hub as owner/name when done.")
@click.option("--public", is_flag=True, help="With --push-to: a public repository, not a private one.")
@click.option("--rerun", type=click.Choice(RERUN_STAGES), multiple=True, help="Make a stage again.")
@click.option("--dry-run", is_flag=True, help="Stop after saying what would happen.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, for programs.")
def build(model: str, drop: float, **options: Any) -> None:
    """Build a smaller MODEL: an alias, a Hub repository owner/name[@revision], or a folder.

    DATA is a .jsonl, .jsonl.xz, .jsonl.gz, .txt or .parquet file, or a Hub data set
    owner/name[:config][@revision]. The same command again goes on where it was cut short, and
    reuses whatever is finished.
    """
    references.check_model(model)
    _check_options(options)
    for data in ("calibration_data", "heal_data", "eval_data"):
        if options[data] is not None:
            references.check_data(options[data])
    _build(model, drop, options)


def _build(model: str, drop: float, options: dict[str, Any]) -> None:
    from factory import hub, pipeline
    from factory.config import build_name, load_recipe
    from factory.decoder import check_decoder
    from factory.identity import check_tasks
    from factory.layout import check_out
    from factory.preview import preview
    from factory.screen import StageLines, console, show_preview, show_result
    from factory.store import Store, default_home

    if options["push_to"]:
        hub.full_name(options["push_to"])  # nobody logged in: say so now, not after hours
    as_json = options["as_json"]
    screen = console(stderr=as_json)
    reporter = StageLines(screen)
    recipe = load_recipe(model) if model in references.aliases() else None
    source = _resolve(model, recipe)
    config = _settle(model, drop, recipe, source, options)
    out = options["out"] or Path("builds") / build_name(source.name, drop)
    store = Store((options["home"] or default_home()).absolute())
    check_tasks(config.evaluate, search=False)
    check_out(out)
    texts = pipeline.open_texts(config)
    run = pipeline.Run(config, store, reporter, texts, rerun=frozenset(options["rerun"]))
    pending = pipeline.pending(run, source)
    if "prune" in pending:
        check_decoder(source.config)
    check_tasks(config.evaluate, search="evaluate" in pending)
    if {"measure", "heal", "evaluate"} & set(pending):
        pipeline.check_texts(texts)
    shown = preview(source, config, pending=pending, home=store.home)
    if not (as_json and options["dry_run"]):
        show_preview(screen, shown, title=f"{source.name} → {out}", lines=_preview_lines(config))
    if options["dry_run"]:
        if as_json:
            _print_json(vars(shown))
        return
    try:
        if source.folder is None and pending:
            reporter.started("pull")
            source = hub.pull(
                source, progress=lambda done, total: reporter.progressed("pull", done, total, "")
            )
            reporter.finished("pull", f"{source.repo_id} at {source.commit[:12]}", 0.0, False)
        made = pipeline.build(run, source, out=out)
    finally:
        reporter.stop()
    url, publication = None, None
    if options["push_to"]:
        message = f"Publish {made.name}"
        publication = pipeline.publish(
            out, options["push_to"], private=not options["public"], message=message
        )
        url = publication.url
    if as_json:
        published = {"publication": publication.model_dump(mode="json")} if publication else {}
        _print_json(made.model_dump(mode="json") | published)
    else:
        show_result(screen, made, folder=out, url=url)


@cli.command(context_settings=CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path), metavar="BUILD")
@click.argument("repository", required=False, metavar="[OWNER/NAME]")
@click.option("--private/--public", default=True, help="Who can see it.  [default: private]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--revision", help="Branch to commit to.  [default: main]")
@click.option("--message", help="Commit message.")
@click.option("--force", is_flag=True, help="Also into a repository that holds other content.")
def push(folder: Path, repository: str | None, **options: Any) -> None:
    """Publish a finished BUILD on the Hub, in one commit."""
    from factory.pipeline import publish

    message = options.pop("message") or "Publish a model without some of its layers"
    click.echo(publish(_build_folder(folder), repository, message=message, **options).url)


@cli.command(context_settings=CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path), metavar="BUILD")
def show(folder: Path) -> None:
    """Show the result of a finished BUILD again."""
    from factory.artifacts import Build, DistanceProfile
    from factory.plots import terminal_heatmap
    from factory.screen import console, show_result

    found = Build.read(_build_folder(folder))
    screen = console()
    profile = DistanceProfile.read(folder)
    screen.print(terminal_heatmap(profile, found.plan, width=min(screen.width, 100)), soft_wrap=True)
    show_result(screen, found, folder=folder, url=None)


@cli.command(context_settings=CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path), metavar="BUILD")
@click.option("--port", type=click.IntRange(1, 65535), help="Of the page.  [default: one that is free]")
@click.option(
    "--source", type=click.Path(path_type=Path), help="Folder of the model that BUILD was made from."
)
@click.option("--no-browser", is_flag=True, help="Only print the address.")
def space(folder: Path, port: int | None, source: Path | None, no_browser: bool) -> None:
    """Compare both models of a BUILD side by side, in the browser, without network; Ctrl-C ends it."""
    from factory.space import serve

    def ready(url: str) -> None:
        click.echo(f"{url}  (Ctrl-C ends it)")
        if not no_browser:
            click.launch(url)

    serve(_build_folder(folder), source=source, port=port, ready=ready)


@cli.command("ls", context_settings=CONTEXT)
@home_option
def list_stages(home: Path | None) -> None:
    """List finished stages and the builds that use them."""
    from factory.screen import console, show_stages
    from factory.store import Store, default_home

    store = Store((home or default_home()).absolute())
    show_stages(console(), list(store.stages()), store.builds())


@cli.command("gc", context_settings=CONTEXT)
@home_option
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--all", "recent", is_flag=True, help="Also what was made or used within a day.")
def collect_garbage(home: Path | None, dry_run: bool, recent: bool) -> None:
    """Remove stages that no build uses and what killed runs left behind, once they are a day old."""
    import shutil

    from factory.preview import size
    from factory.store import Store, default_home, folder_bytes

    store = Store((home or default_home()).absolute())
    freed = 0
    for folder in store.garbage(recent=recent):
        freed += folder_bytes(folder)
        click.echo(f"{'would remove' if dry_run else 'removing'} {folder}")
        if not dry_run:
            shutil.rmtree(folder)
    click.echo(f"{size(freed)} {'could be' if dry_run else ''} freed".replace("  ", " "))


# Helpers of `build` -----------------------------------------------------------------------------


def _resolve(model: str, recipe: "Recipe | None") -> "Source":
    from factory import hub

    if recipe is None:
        return hub.resolve(model)
    if recipe.source == "embedded":
        found = hub.resolve(str(Path(__file__).parent / "demo" / "model"))
        return found.model_copy(update={"name": recipe.alias, "license": "apache-2.0"})
    assert recipe.repo_id is not None
    return hub.resolve(recipe.repo_id)


def _settle(
    model: str, drop: float, recipe: "Recipe | None", source: "Source", options: dict[str, Any]
) -> "BuildConfig":
    from factory.config import settle

    length = options["sequence_length"]
    tasks = options["tasks"]
    named = (
        None if tasks is None else () if tasks == "none" else tuple(name.strip() for name in tasks.split(","))
    )
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
            "seed": options["seed"],
            "heal_enabled": options["heal_enabled"],
            "measure": {
                "data": options["calibration_data"],
                "num_samples": options["samples"],
                "sequence_length": length,
            },
            "heal": {
                "data": options["heal_data"],
                "num_steps": options["heal_steps"],
                "learning_rate": options["heal_lr"],
                "rank": options["heal_rank"],
                "sequence_length": length,
            },
            "evaluate": {
                "data": options["eval_data"],
                "num_documents": options["eval_documents"],
                "sequence_length": length,
                "tasks": named,
                "limit": options["limit"],
            },
        },
    )


def _check_options(options: dict[str, Any]) -> None:
    """Refuse what click's types let through."""
    rate, repository, tasks = options["heal_lr"], options["push_to"], options["tasks"]
    if rate is not None and not math.isfinite(rate):
        raise UsageError(f"--heal-lr {rate} is no learning rate", hint="--heal-lr 3e-4")
    if options["public"] and not repository:
        raise UsageError("--public without --push-to", hint="add --push-to owner/name")
    if repository is not None and not re.fullmatch(r"([\w.-]+/|~/)?[\w.-]+", repository):
        raise UsageError(f"--push-to {repository!r} is no repository name", hint="--push-to owner/name")
    if tasks is not None and not all(name.strip() for name in tasks.split(",")):
        raise UsageError(f"--tasks {tasks!r} has an empty name", hint="--tasks mmlu,boolq, or --tasks none")


def _max_length(config: dict[str, Any]) -> int:
    """Tokens the model was made for, by its configuration; 2048 where it does not say."""
    text_config = config.get("text_config")
    for part in (text_config if isinstance(text_config, dict) else {}, config):
        for name in ("max_position_embeddings", "n_positions", "n_ctx"):
            if type(part.get(name)) is int and part[name] > 0:
                return int(part[name])
    return 2048


def _preview_lines(config: "BuildConfig") -> list[tuple[str, str]]:
    heal, measure, evaluate = config.heal, config.measure, config.evaluate
    tokens = heal.num_steps * heal.batch_size * heal.sequence_length
    healing = (
        f"{heal.num_steps:,} steps of {heal.batch_size} × {heal.sequence_length} tokens "
        f"({tokens / 1e6:.2f} M) of {heal.data}, NF4 + LoRA rank {heal.rank}, rate {heal.learning_rate:g}"
        if config.heal_enabled
        else "no"
    )
    tasks = ", ".join(evaluate.tasks) or "no tasks (--tasks mmlu,boolq adds some)"
    return [
        ("measure", f"{measure.num_samples} documents of {measure.data}"),
        ("heal", healing),
        ("evaluate", f"loss on {evaluate.num_documents} documents of {evaluate.data}; {tasks}"),
    ]


def _build_folder(folder: Path) -> Path:
    if not (folder / "build.json").is_file() or not (folder / "model").is_dir():
        raise UsageError(f"{str(folder)!r} is no build folder", hint="give what `factory build` made")
    return folder


def _print_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=2))


def main() -> None:
    """Run the command line; the one place where errors become lines and exit codes."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")  # the libraries' advice to programmers is not for our users
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ≠ or ✓ shows ? and goes on
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), "factory --help", code=2)
    except FactoryError as error:
        _fail(error.message, error.hint, code=error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", "the same command goes on from here", code=130)


def _fail(message: str, hint: str, *, code: int) -> None:
    """One line that says what is wrong, one that says what to do."""
    red, dim, end = ("\033[31m", "\033[2m", "\033[0m") if sys.stderr.isatty() else ("", "", "")
    sys.stderr.write(f"{red}error:{end} {_printable(message)}\n{dim}hint:{end} {_printable(hint)}\n")
    sys.exit(code)


def _printable(text: str) -> str:
    """Without control characters, so that no name or message can paint the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
