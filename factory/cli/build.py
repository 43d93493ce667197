"""`factory build`: make a smaller model from a reference, and publish it if requested."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from factory.cli.click_options import CONTEXT, Command, request_options
from factory.cli.console import print_json
from factory.config.request import BuildRequest, file_text
from factory.errors import FactoryError, UsageError

if TYPE_CHECKING:
    from factory.api.results import BuildResult
    from factory.artifacts import Build
    from factory.cli.console import StageLines
    from factory.pipeline.prepare import Prepared


@click.command(cls=Command, context_settings=CONTEXT)
@request_options(BuildRequest)
@click.option("--dry-run", is_flag=True, help="Show what would happen and stop.")
@click.option("--print-config", is_flag=True, help="Print a build file for the same build and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def build(model: str, dry_run: bool, print_config: bool, as_json: bool, **values: Any) -> None:
    """Make MODEL smaller and evaluate the result.

    MODEL is an alias, a Hub repository owner/name[@revision], a folder, or a build file; a repository or
    folder may hold a LoRA adapter, which is first merged into its base. DATA is a .jsonl,
    .json, .csv, .parquet, .txt or .md file, a folder or 'pattern*' of files, either with #column, or a Hub
    data set owner/name:config[split]#column@revision, of which only the name is required. The same command
    resumes an interrupted build, and reuses every finished stage.

    A build file (build.yaml) holds these options by name, for one build or several. --print-config writes
    one, and `factory schema` lets an editor check it.

    With --reproduce, MODEL is a build folder or a published build's repository; its build.json says what to
    repeat. If a text was a local file, give it again with its option.
    """
    requests = read_requests(model, values)
    if print_config:
        click.echo(file_text([request.file_values() for request in requests]), nl=False)
    elif any(request.on for request in requests):
        from factory.cli.jobs import submit

        submit(requests, dry_run=dry_run, as_json=as_json)
    else:
        _build(requests, dry_run=dry_run, as_json=as_json)


@click.command(cls=Command, context_settings=CONTEXT)
def schema() -> None:
    """Print the JSON schema of build files.

    With this first line in a build file, an editor completes and checks the rest:

    \b
    # yaml-language-server: $schema=build.schema.json
    """
    from factory.cli.build_file import schema as json_schema

    print_json(json_schema())


def read_requests(model: str, values: dict[str, Any]) -> list[BuildRequest]:
    """Return the requested builds; an option given with a build file applies to all its builds.

    Raises:
        UsageError: The file cannot be read, or options exclude each other.
    """
    context = click.get_current_context()
    given = {name: value for name, value in values.items() if value is not None}
    exported = context.get_parameter_source("home") != ParameterSource.COMMANDLINE
    if not model.endswith((".yaml", ".yml")):
        return [BuildRequest.read(_without_home({"model": model, **given}, exported))]
    from factory.cli.build_file import read, replacing

    if given.get("reproduce"):
        raise UsageError(
            f"--reproduce with {model!r}, a build file", hint="give the build's folder or repository"
        )
    rows = BuildRequest.options()
    typed = {
        name: value
        for name, value in given.items()
        if rows[name][1].of_run or context.get_parameter_source(name) == ParameterSource.COMMANDLINE
    }
    found = []
    for entry, origin in read(Path(model)):
        of_file = replacing(entry, typed)
        found.append(BuildRequest.read(_without_home(of_file | typed, exported), origin=origin))
    return found


def _without_home(values: dict[str, Any], exported: bool) -> dict[str, Any]:
    """Drop `home` if it comes from FACTORY_HOME and the build is a job, which has its own store."""
    if exported and values.get("on") is not None:
        values.pop("home", None)
    return values


def _build(requests: Sequence[BuildRequest], *, dry_run: bool, as_json: bool) -> None:
    from factory.cli.console import StageLines, console

    reporter = StageLines(console(stderr=as_json))
    with reporter.busy("prepare"):
        from factory.cli.tables import show_preview
        from factory.pipeline.prepare import load_questions, prepare

        prepared = prepare(requests, reporter, dry_run=dry_run)
    for one in prepared:
        if not (as_json and dry_run):
            title = f"{one.settled.source.name} → {one.settled.out}"
            show_preview(reporter.out, one.preview, one.settled.config, title=title)
    if dry_run:
        if as_json:
            shown = [asdict(one.preview) for one in prepared]
            print_json(shown[0] if len(shown) == 1 else shown)
        return
    for one in prepared:
        if "evaluate" in one.pending:
            load_questions(one.settled.request, one.settled.config, reporter)
    if len(prepared) == 1:
        _, values = _make(prepared[0], reporter, as_json=as_json)
        if as_json:
            print_json(values)
    else:
        _make_all(prepared, reporter, as_json=as_json)


def _make(prepared: "Prepared", reporter: "StageLines", *, as_json: bool) -> tuple["Build", dict[str, Any]]:
    """Make one build, show it, and return it with its JSON values."""
    from factory.api.functions import make
    from factory.cli.console import printable
    from factory.cli.tables import show_result
    from factory.pipeline.costs.time_left import TimeLeft

    reporter.time_left = TimeLeft(prepared.preview.stage_seconds)
    try:
        result = make(prepared, reporter)
    finally:
        reporter.stop()
    values = _values(result)
    if not as_json:
        url = result.publication.url if result.publication else None
        show_result(reporter.out, result.record, folder=prepared.settled.out, url=url)
        if result.comparison:
            reporter.out.print(f"\n{printable(result.comparison)}", soft_wrap=True)
    return result.record, values


def _values(result: "BuildResult") -> dict[str, Any]:
    """Return a result as JSON values."""
    values = result.record.model_dump(mode="json")
    if result.publication:
        values["publication"] = result.publication.model_dump(mode="json")
    if result.comparison:
        values["reproduced"] = result.comparison
    return values


def _make_all(prepared: Sequence["Prepared"], reporter: "StageLines", *, as_json: bool) -> None:
    """Make one build after another; a failure does not stop those after it.

    Raises:
        FactoryError: At least one build failed; raised once all have run.
    """
    from factory.cli.console import as_flags, printable
    from factory.cli.tables import show_summary

    rows: list[tuple[Path, Build | FactoryError]] = []
    results = []
    for number, one in enumerate(prepared, 1):
        out = one.settled.out
        reporter.out.print(f"\nbuild {number} of {len(prepared)}: {out}", soft_wrap=True)
        try:
            made, result = _make(one, reporter, as_json=as_json)
            rows.append((out, made))
        except FactoryError as error:
            reporter.out.print(f"failed: {printable(as_flags(error.message))}", soft_wrap=True)
            result = {"error": as_flags(error.message), "hint": as_flags(error.hint)}
            rows.append((out, error))
        results.append(result)
    if as_json:
        print_json(results)
    else:
        show_summary(reporter.out, rows)
    failed = [(out, error) for out, error in rows if isinstance(error, FactoryError)]
    if failed:
        out, first = failed[0]
        others = f" ({len(failed)} of {len(prepared)} builds failed)" if len(failed) > 1 else ""
        raise type(first)(f"{out}: {first.message}{others}", hint=first.hint)
