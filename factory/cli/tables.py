"""Tables: previews, results, plans, sweeps and lists."""

import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from factory.artifacts import Build, Evaluation, Plans, Sweep, TaskScore, Verdict, layer_ranges
from factory.builds.integrity import Verified
from factory.cli.console import STAGE_WIDTH, as_flags, printable, say
from factory.config.references import EMBEDDED
from factory.config.settings import BuildConfig
from factory.errors import FactoryError
from factory.pipeline.costs.preview import Preview
from factory.pipeline.sweep import kept_stderr, left_out, share_kept
from factory.report.markdown import p_value
from factory.report.notes import gguf_note, goal_note, notes, runtimes_note
from factory.report.tables import headline, loss_findings, quality_table, size_table
from factory.units import count, duration, size

if TYPE_CHECKING:
    from factory.builds.export import Exported


UNCERTAIN = 0.1  # standard error of a share that is kept
LONG_SECONDS = 3600  # from here on the preview names ways to a shorter build


def show_preview(out: Console, shown: Preview, config: BuildConfig, *, title: str) -> None:
    """Show the preview of a build."""
    n, total = shown.num_dropped, shown.num_layers
    rows = [
        (
            "layers",
            f"dropping {n} of {total} ({n / total:.0%}); {total - n} kept"
            + ("" if config.plan.layers else " (the last layer is never dropped)"),
        ),
        *([("size", goal_note(config.size))] if config.size else []),
        ("parameters", f"{count(shown.parameters_before)} → about {count(shown.parameters_after)}"),
        ("weights", f"{size(shown.bytes_before)} → about {size(shown.bytes_after)}"),
        *_stage_rows(config),
        ("disk", f"{size(shown.disk_needed)} needed, {size(shown.disk_free)} free"),
        *(("", f"{size(one.needed)} at {one.place}, {size(one.free)} free") for one in shown.other_disks),
    ]
    if shown.download_bytes:
        rows.append(("download", size(shown.download_bytes)))
    if shown.pending:
        rows.append(
            (
                "memory",
                f"about {size(shown.memory_needed)} of {size(shown.memory_total)}, {shown.device}"
                + _host(shown),
            )
        )
        rows += time_rows(shown)
    else:
        rows.append(("time", "nothing to do: every stage is finished"))
    out.print(Text(printable(title), style="bold"))
    for name, value in rows:
        say(out, value, label=f"  {name:<12}")
    out.print()


def time_rows(shown: Preview) -> list[tuple[str, str]]:
    """Return the time, by stage where one takes a notable part of it, and two ways out of a long one."""
    total, parts = shown.seconds, shown.stage_seconds
    long = {stage: seconds for stage, seconds in parts.items() if seconds >= max(total / 20, 5)}
    named = [f"{stage} {duration(seconds)}" for stage, seconds in long.items()]
    if named and len(long) < len(parts):
        named.append(f"the rest {duration(total - sum(long.values()))}")
    stages = " → ".join(dict.fromkeys((shown.pending[0], shown.pending[-1])))
    rows = [("time", f"about {duration(total)} ({stages})" + (f": {', '.join(named)}" if named else ""))]
    if total > LONG_SECONDS:
        rows.append(("", "less work: --budget 1h; time and price of a rented machine: --on NAME --dry-run"))
    return rows


def _stage_rows(config: BuildConfig) -> list[tuple[str, str]]:
    """Return what the long stages read, by stage."""
    heal, measure, evaluate = config.heal, config.measure, config.evaluate
    samples = measure.num_samples or f"until the choice is certain, at most {measure.max_samples:,}"
    tokens = heal.num_steps * heal.batch_size * heal.sequence_length
    healing = (
        f"{heal.num_steps:,} steps of {heal.batch_size} × {heal.sequence_length} tokens "
        f"({count(tokens)}) of {' and '.join(heal.data)}, {heal.objective}, "
        f"LoRA rank {heal.rank} over {heal.bits}-bit weights, learning rate {heal.learning_rate:g}"
        if config.heal_enabled
        else "no training"
        if config.fits_seam
        else "skipped"
    )
    if config.fits_seam:
        healing += ", from a fitted seam"
    tasks = ", ".join(evaluate.tasks) or "no tasks (add some with --tasks mmlu,boolq)"
    texts = " and of ".join(evaluate.data)
    return [
        ("measure", f"{samples} documents of {measure.data}"),
        ("heal", healing),
        ("evaluate", f"loss on {evaluate.num_documents} documents of {texts}; {tasks}"),
    ]


def _host(shown: Preview) -> str:
    """Return the host's memory, if a GPU has memory of its own."""
    if shown.memory_needed == shown.host_needed:
        return ""
    total = f" of {size(shown.host_total)}" if shown.host_total else ""
    return f"; host: about {size(shown.host_needed)}{total}"


def new_table(columns: Sequence[str], *, left: Collection[str]) -> Table:
    """Return an empty table whose columns other than `left` hold numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table


def result_tables(build: Build) -> tuple[Table, Table]:
    """Return quality and size of the models side by side, as on the card."""
    tables = []
    for head, *rows in (quality_table(build), size_table(build)):
        # The card explains the change below its table.
        columns = ["change vs source" if name == "change" else name for name in head]
        table = new_table(columns, left=columns[:1])
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables[0], tables[1]


def _show_notes(out: Console, found: Sequence[str], *, runtimes: Sequence[Verdict]) -> None:
    for note in found:
        say(out, f"Note: {as_flags(note)}.")
    show_runtimes(out, runtimes)


def show_runtimes(out: Console, runtimes: Sequence[Verdict]) -> None:
    """Show in one line where the result runs right."""
    if where := runtimes_note(runtimes):
        say(out, f"{where[0].upper()}{where[1:]}.")


def _score(task: TaskScore, *, like: TaskScore) -> str:
    """Return a score with its standard error, in the unit of the source's score."""
    return like.shown(task.value) + (f" ± {like.shown(task.stderr)}" if task.stderr is not None else "")


def show_result(out: Console, build: Build, *, folder: Path, url: str | None) -> None:
    """Show the figures that matter most, the tables, a verdict on healing, and what to type next."""
    quality, sizes = result_tables(build)
    out.print()
    figures = "; ".join(f"{figure} {what.partition(': ')[0]}" for figure, what in headline(build))
    say(out, Text(printable(figures), style="bold"), label=Text(f"{printable(build.name)}: ", style="bold"))
    out.print()
    out.print(quality)
    if build.comparisons:
        out.print("± is one standard error; * differs from the source by more than chance.", style="dim")
    out.print()
    out.print(sizes)
    out.print()
    say(out, verdict(build))
    dropped_sink = build.sink if build.sink in build.plan.dropped else None
    _show_notes(
        out, notes(build.plan, num_samples=build.profile_samples, sink=dropped_sink), runtimes=build.runtimes
    )
    out.print()
    model = folder / "model"
    rows = [
        ("the model", str(model)),
        ("its card", str(model / "README.md")),
        (
            "try it",
            f'python -c "from transformers import pipeline; '
            f"print(pipeline('text-generation', '{model}')('The', max_new_tokens=30)[0]['generated_text'])\"",
        ),
    ]
    if build.source.lineage is None and (build.source.repo_id or build.reference == EMBEDDED):
        rows.append(("talk to it", f"factory chat {folder}"))
    rows.append(("published", url) if url else ("publish it", f"factory push {folder}"))
    for name, value in rows:
        out.print(Text.assemble((f"  {name:<12}", "dim"), value), soft_wrap=True)


def show_summary(out: Console, rows: Sequence[tuple[Path, Build | FactoryError]]) -> None:
    """Show one line per build of a build file."""
    columns = ("build", "dropped", "parameters", "loss before", "loss after")
    table = new_table(columns, left=columns[:2])
    for folder, made in rows:
        if isinstance(made, FactoryError):
            table.add_row(printable(str(folder)), "failed: " + printable(made.message))
            continue
        losses = [made.evaluations[name].loss for name in ("source", made.shipped)]
        table.add_row(
            printable(str(folder)),
            layer_ranges(made.dropped),
            f"{count(made.source_parameters)} → {count(made.result_parameters)}",
            *(f"{loss.nats:.3f} ± {loss.stderr:.3f}" for loss in losses),
        )
    out.print()
    out.print(table)


def show_plans(out: Console, plans: Plans, *, command: str) -> None:
    """Show what each criterion would drop, what that costs, and the recommendation."""
    columns = ["criterion", "dropped", "angular distance"]
    if plans.losses:
        columns += ["loss, unhealed", "behind the best", "search passes"]
    table = new_table(columns, left=columns[:2])
    for index, plan in enumerate(plans.plans):
        mark = " ←" if plan.criterion == plans.chosen and len(plans.plans) > 1 else ""
        row = [plan.criterion + mark, layer_ranges(plan.dropped)]
        row.append(f"{plan.distance:.3f}" if plan.distance is not None else "")
        if plans.losses:
            cut = plans.losses.cuts[index]
            row.append(f"{cut.nats:.3f} ± {cut.stderr:.3f}")
            row.append(f"{cut.behind:.3f} ± {cut.behind_stderr:.3f}" if cut.behind else "")
            row.append(f"{plan.passes:.0f}" if plan.passes is not None else "")
        table.add_row(*row)
    out.print()
    out.print(table)
    out.print()
    if plans.losses:
        losses = plans.losses
        say(
            out,
            f"Source: {losses.source.nats:.3f} ± {losses.source.stderr:.3f}, on {losses.num_documents} "
            f"documents of {printable(losses.data.name)} that no search has seen, at most "
            f"{losses.sequence_length} tokens each.\nTake {plans.chosen}: {plans.reason}.",
        )
    chosen = next(plan for plan in plans.plans if plan.criterion == plans.chosen)
    found = notes(chosen, num_samples=plans.num_samples, sink=plans.sink, losses=plans.losses)
    if plans.goal:
        found.insert(0, goal_note(plans.goal, parameters=plans.parameters))
    _show_notes(out, found, runtimes=plans.runtimes)
    out.print(Text.assemble(("  build it    ", "dim"), printable(command)), soft_wrap=True)


def show_sweep(out: Console, sweep: Sweep, *, folder: Path) -> None:
    """Show one line per cut, and the largest cut before the cliff."""
    healed = any(point.healed for point in sweep.points)
    loss_names = _loss_names(sweep.source)
    names = ["dropped", "layers", *loss_names, *(f"healed {name}" for name in loss_names if healed)]
    names += [task.name for task in sweep.source.tasks]
    table = new_table([*names, "kept"], left=["layers"])
    blank = [""] * len(loss_names) * healed
    table.add_row("0", "", *_losses(sweep.source), *blank, *_scores(sweep.source, sweep), "100%")
    for point in sweep.points:
        table.add_row(
            f"{len(point.plan.dropped)} ({point.drop:.0%})",
            layer_ranges(point.plan.dropped),
            *_losses(point.pruned),
            *(_losses(point.healed) if point.healed else blank),
            *_scores(point.best, sweep),
            _kept(point.best, sweep.source),
            style="bold" if point.drop == sweep.before_the_cliff else "",
        )
    out.print()
    out.print(table)
    out.print()
    largest = sweep.before_the_cliff
    safe = next((point for point in sweep.points if point.drop == largest), None)
    found = "No cut is safe"
    if safe:
        found = f"Largest safe cut: {safe.drop:.0%}, which keeps {_kept(safe.best, sweep.source)}"
    if math.isnan(share_kept(sweep.source, sweep.source)):
        found = "The source is no better than guessing, so there is no cliff to find"
    say(out, f"{found}.")
    if any(kept_stderr(point.best, sweep.source) > UNCERTAIN for point in sweep.points):
        say(out, "These shares are uncertain: more samples (a higher --limit, or none) make them certain.")
    say(out, f"The largest safe cut is {sweep.rule}.")
    if names := left_out(sweep.source):
        out.print(f"Not counted, without a chance level: {printable(', '.join(names))}.", soft_wrap=True)
    for name, path in (("figure", folder / "sweep.png"), ("numbers", folder / Sweep.file_name)):
        out.print(Text.assemble((f"  {name:<12}", "dim"), str(path)), soft_wrap=True)


def _kept(evaluation: Evaluation, source: Evaluation) -> str:
    """Return the share that is kept with its standard error; a dash if the source has nothing to keep."""
    kept = share_kept(evaluation, source)
    return "–" if math.isnan(kept) else f"{kept:.0%} ± {kept_stderr(evaluation, source):.0%}"


def _loss_names(source: Evaluation) -> list[str]:
    """Return the columns of the losses: in nats and per log V on the first text, in nats on the others."""
    first, *others = (loss.data.name for loss in source.losses)
    on = f" on {first}" if others else ""
    return [f"loss{on}", "/ log V", *(f"loss on {name}" for name in others)]


def _losses(evaluation: Evaluation) -> list[str]:
    first, *others = (f"{loss.nats:.3f} ± {loss.stderr:.3f}" for loss in evaluation.losses)
    return [first, f"{evaluation.loss.normalized:.3f}", *others]


def _scores(evaluation: Evaluation, sweep: Sweep) -> list[str]:
    pairs = zip(evaluation.tasks, sweep.source.tasks, strict=True)
    return [_score(task, like=source) for task, source in pairs]


def verdict(build: Build) -> str:
    """Return a sentence for each text on what the cut cost and what healing took back."""
    findings = loss_findings(build)
    return " ".join([*(_verdict_on(build, one, of=len(findings)) for one in findings), *_harm(findings)])


def _verdict_on(build: Build, found: dict[str, Any], *, of: int) -> str:
    where = ""
    if of > 1:
        where = f"On {found['data'].name}, " + (
            f"{found['like']} the healing text, " if found["like"] else ""
        )
    if (compared := found["comparison"]) and not compared.significant:
        sentence = (
            f"{where}no measurable loss: {compared.difference:+.3f} nats per token is within chance "
            f"({p_value(compared.p_value)}), but {compared.num_items} documents cannot rule out "
            f"{compared.high:+.3f}."
        )
    else:
        cut = f"dropping layers {layer_ranges(build.dropped)} {_moved(found['added'])}"
        sentence = f"{where}{cut}; {_healed(build, found)}."
    return sentence[0].upper() + sentence[1:]


def _healed(build: Build, found: dict[str, Any]) -> str:
    """Return what healing, or a fitted seam without training, did on one text."""
    if build.adapter is None:
        return "this build was not healed"
    is_fit = build.adapter.objective is None
    if build.shipped == "pruned":
        healing = "the fitted seam" if is_fit else "healing"
        if (made := build.decision) and made.text and made.gain > 0:
            return (
                f"{healing} lowered the loss on held-out healing text by {made.gain:.3f}, but raised it on "
                f"{made.text.name}, which is unlike that text, by {made.harm:.3f}, so the pruned model ships"
            )
        return f"{healing} did not lower the loss on held-out healing text, so the pruned model ships"
    change, gap = found["taken_back"], found["added"]
    share = f" ({change / gap:.0%} of it)" if 0 < change <= gap else ""
    if is_fit:
        return f"the fitted seam, without training, {_moved(-change)}{share}"
    if change > 0 and gap <= 0:
        return f"healing lowered it by a further {change:.3f}"
    if change > 0:
        return f"healing took back {change:.3f}{share}"
    check = " on this text. Check before you publish" if found["harm"] is None else ""
    return f"healing {_moved(-change)}{check}"


def _harm(findings: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for each text unlike the healing text on which healing did harm beyond chance."""
    return [
        f"Healing made it worse on {one['data'].name}, {one['like']} the healing text, "
        f"by {one['harm']:.3f} nats per token: check before you publish."
        for one in findings
        if one["harm"] is not None
    ]


def _moved(change: float) -> str:
    return f"{'raised' if change > 0 else 'lowered'} the loss by {abs(change):.3f}"


def show_contents(out: Console, found: Mapping[str, Any]) -> None:
    """Show a store's builds and stages, and what they take; see `builds.garbage.contents`."""
    builds = found["builds"]
    if builds:
        columns = ("build", "model", "dropped", "made", "size")
        table = new_table(columns, left=columns[:-1])
        for column in table.columns:
            column.no_wrap, column.overflow = column.header not in columns[:2], "fold"
        for build in builds:
            model = build["model"] or "cannot be read"
            dropped = f"{len(build['dropped'])} of {build['num_layers']}" if build["model"] else ""
            table.add_row(
                printable(_near(build["folder"])),
                printable(model),
                dropped,
                _date(build["made"]),
                size(build["size_bytes"]),
            )
        out.print(table)
        out.print()
    names = ("stage", "key", "made", "took", "size", "builds")
    table = new_table(names, left=("stage", "key", "made", "builds"))
    for column in table.columns[:-1]:
        column.no_wrap = True
    table.columns[-1].overflow = "fold"
    for stage in found["stages"]:
        users = ", ".join(map(_near, stage["builds"])) or "none"
        table.add_row(
            stage["stage"],
            stage["key"],
            _date(stage["made"]),
            duration(stage["seconds"]),
            size(stage["size_bytes"]),
            printable(users),
        )
    out.print(table)
    total = f"{len(found['stages'])} stages in {found['home']}: {size(found['size_bytes'])}"
    if found["unused_bytes"]:
        total += f"; {size(found['unused_bytes'])} of it of no build, which `factory gc` removes after a day"
    say(out, f"\n{printable(total)}")


def _near(folder: str) -> str:
    """Return a folder as seen from the current one, where it lies below it."""
    path = Path(folder)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _date(made: str) -> str:
    """Return a time in UTC as the local date and minute."""
    return datetime.fromisoformat(made).astimezone().strftime("%Y-%m-%d %H:%M")


def show_exported(out: Console, exported: "Exported") -> None:
    """Show a GGUF, what its comparison found, and how it is run."""
    record = exported.record
    state = "already exists" if exported.reused else "written"
    out.print(f"{exported.path} {state}: {size(record.size_bytes)}", soft_wrap=True)
    say(out, gguf_note(record))
    if record.check is None:
        say(out, "to verify it: pip install llama-cpp-python, and the same command again")
    if not exported.has_template:
        say(out, "the Modelfile has no template: the chat template cannot be written for Ollama")
    out.print(f"run it: llama-cli -m {shlex.quote(str(exported.path))}", soft_wrap=True)


def show_verified(out: Console, found: Sequence[Verified]) -> None:
    """Show one line per folder: unchanged, changed or gone."""
    for one in found:
        wrong = (("changed", one.changed), ("added", one.added))
        state = "; ".join(f"{how}: {', '.join(names)}" for how, names in wrong if names)
        mark, state = ("✗", state) if state else ("✓", "unchanged")
        if not one.there:
            mark, state = "–", "no longer in the store"
        place = one.folder.name if one.name != "build" else str(one.folder)
        line = f"{mark} {one.name:<{STAGE_WIDTH}} {place:<16}  {state}"
        out.print(printable(line), soft_wrap=True)
