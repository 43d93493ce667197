"""Numbers and verdicts read as people write them."""

import io
import re
from dataclasses import fields as fields_of

import pytest
from rich.console import Console

from factory.artifacts import DataSource
from factory.cli.console import StageLines, console, printable, say
from factory.cli.tables import result_tables, show_contents, time_rows, verdict
from factory.pipeline.costs.preview import Preview
from factory.report.card import render
from factory.report.tables import quality_table, size_table
from factory.units import count, count_in_words, duration, rough_duration, size
from tests.builders.builds import (
    a_comparison,
    chat_with_other_licence,
    healing_discarded,
    healing_harmful,
    on_two_texts,
    perplexities,
)


def test_text_from_outside_cannot_move_the_cursor() -> None:
    assert printable("a\x1b[2J\rb") == "a[2Jb"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1_234, "1.23 k"), (2_118_240, "2.12 M"), (7_241_732_096, "7.24 B")],
)
def test_counts(number: int, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(12, "12 bytes"), (4_300_000, "4.3 MB"), (14_483_464_192, "14.5 GB"), (2 * 10**12, "2.0 TB")],
)
def test_sizes(number: int, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (59.96, "1 min"),
        (200, "3 min 20 s"),
        (1800, "30 min"),
        (3599.7, "1 h"),
        (18_725, "5 h 12 min"),
        (72_000, "20 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_card_has_words_for_counts_and_rough_durations() -> None:
    assert [count_in_words(number) for number in (999, 999_600, 7_241_732_096)] == [
        "999",
        "1 million",
        "7.24 billion",
    ]
    assert [rough_duration(seconds) for seconds in (4.12, 119, 200, 18_000, 18_725)] == [
        "4.1 s",
        "119 s",
        "3 min",
        "5 h",
        "5.2 h",
    ]


def test_the_tables_have_the_rows_of_the_card() -> None:
    build, out = chat_with_other_licence(), console()
    with out.capture() as captured:
        for table in result_tables(build):
            out.print(table)
    lines = [re.split(r" {2,}", line.strip()) for line in captured.get().splitlines()]
    quality, sizes = quality_table(build), size_table(build)
    assert lines[0] == [cell.replace("change", "change vs source") for cell in quality[0][1:]]
    rows = [[cell for cell in row if cell] for row in (*quality[1:], *sizes)]
    assert lines[1:] == rows


def test_a_perplexity_is_shown_as_a_number_with_the_way_it_should_go(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console().print(result_tables(perplexities(False))[0])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "wiki" in line]
    assert line.split()[:6] == ["wiki,", "0-shot,", "word_perplexity", "↓", "410.500", "±"]


def test_the_time_is_told_by_stage_and_a_long_one_with_ways_out() -> None:
    def told(**seconds: float) -> list[str]:
        fields = dict.fromkeys(field.name for field in fields_of(Preview))
        shown = Preview(**fields | {"pending": tuple(seconds), "stage_seconds": seconds})  # type: ignore[arg-type]
        return [value for _, value in time_rows(shown)]

    assert told(measure=1, card=1) == ["about 14.0 s (measure → card)"]
    (short,) = told(measure=100, heal=900, card=1)
    assert short == ("about 16 min 53 s (measure → card): measure 1 min 40 s, heal 15 min, the rest 13.0 s")
    _, ways = told(heal=4000)
    assert "--budget" in ways


def test_a_folder_whose_name_has_two_lines_is_listed_in_one(capsys: pytest.CaptureFixture[str]) -> None:
    made = {"folder": "/not/mine\n/there\x1b[2J", "made": "2026-11-29T12:03:00+00:00", "size_bytes": 5}
    build = made | {"model": "acme/tiny", "dropped": [5, 6], "num_layers": 10}
    unread = made | {"model": None, "dropped": None, "num_layers": None}
    stage = made | {"stage": "prune", "key": "f00d", "seconds": 2.0, "size_bytes": 9, "builds": []}
    found = {"home": "/store", "size_bytes": 9, "unused_bytes": 9}
    screen = Console(width=120, color_system=None)
    show_contents(screen, found | {"builds": [build, unread], "stages": [stage]})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:5] == ["/not/mine/there[2J", "acme/tiny", "2", "of", "10"]
    assert "cannot be read" in lines[2]
    assert lines[-1].startswith("1 stages in /store: 9 bytes; 9 bytes of it of no build")


def test_a_heal_that_left_no_model_is_told_as_one_that_did_not_help() -> None:
    build = healing_discarded()
    del build.evaluations["healed"]
    assert verdict(build).endswith(
        "; healing did not lower the loss on held-out healing text, so the pruned model ships."
    )


def test_a_heal_that_did_more_harm_than_good_names_the_text() -> None:
    build = healing_harmful()
    told = (
        "lowered the loss on held-out healing text by 0.200, but raised it on stdlib:prose, which is unlike "
        "that text, by 0.500, so the pruned model ships"
    )
    assert f"healing {told}" in verdict(build)
    card = render(build, has_healing_figure=False)
    assert "(`stdlib:prose`), which is unlike the healing text, by 0.500 nats per token" in card


def test_the_verdict_tells_recovery_on_the_like_text_from_that_on_the_unlike_one() -> None:
    like, unlike = verdict(on_two_texts()).split(". ")
    assert like == (
        "On stdlib:held-out, like the healing text, dropping layers 5–7 raised the loss by 2.686; "
        "healing took back 2.294 (85% of it)"
    )
    assert unlike.startswith("On stdlib:prose, unlike the healing text, ")
    assert unlike.endswith("raised the loss by 2.192; healing took back 0.486 (22% of it).")


def test_healing_takes_nothing_back_where_the_cut_cost_nothing() -> None:
    told = verdict(on_two_texts(prose=(3.9, 3.75, 3.5)))
    assert told.endswith("lowered the loss by 0.150; healing lowered it by a further 0.250.")


def test_of_two_files_nobody_is_told_that_they_are_of_one_corpus_or_of_two() -> None:
    build = on_two_texts()
    (path, other) = (DataSource(name=f"{name}.jsonl", version=name * 32) for name in ("a", "b"))
    assert build.adapter
    healed_on = build.adapter.model_copy(update={"data": path})
    evaluations = {
        name: evaluation.model_copy(
            update={"more_losses": (evaluation.losses[1].model_copy(update={"data": other}),)}
        )
        for name, evaluation in build.evaluations.items()
    }
    build = build.model_copy(update={"adapter": healed_on, "evaluations": evaluations})
    assert "On stdlib:held-out, unlike the healing text, " in verdict(build)
    assert "On b.jsonl, other than the healing text, " in verdict(build)
    assert any("Loss on b.jsonl (other), nats per token" in row[0] for row in quality_table(build))


def test_harm_to_an_unlike_text_is_told_if_it_is_beyond_chance() -> None:
    harmed = on_two_texts(prose=(3.9, 6.1, 6.2))
    line = "Healing made it worse on stdlib:prose, unlike the healing text, by 0.100 nats per token: check"
    assert line in verdict(harmed)
    assert "**Healing made it worse on other text**" in render(harmed, has_healing_figure=False)
    by_chance = tuple(one.model_copy(update={"p_value": 0.5}) for one in harmed.healing)
    assert "made it worse" not in verdict(harmed.model_copy(update={"healing": by_chance}))
    assert "made it worse" not in verdict(on_two_texts())


def test_no_loss_is_called_measurable_only_where_it_is_and_with_what_could_be_hidden() -> None:
    build = chat_with_other_licence()
    assert "No measurable loss" not in verdict(build)
    same = a_comparison("loss", 0.004, num_items=1000, test="paired t")
    told = verdict(build.model_copy(update={"comparisons": {"healed": (same,)}}))
    assert told == (
        "No measurable loss: +0.004 nats per token is within chance (p = 0.562), "
        "but 1000 documents cannot rule out +0.018."
    )


@pytest.mark.parametrize(
    ("terminal", "lines"),
    [
        (True, ["  heal  two steps of a", "        text"]),
        (False, ["  heal  two steps of a text"]),
    ],
)
def test_a_sentence_is_broken_between_words_on_a_terminal_alone(terminal: bool, lines: list[str]) -> None:
    screen = Console(file=io.StringIO(), width=22, force_terminal=terminal, color_system=None)
    say(screen, "two steps of a text", label="  heal  ")
    assert isinstance(screen.file, io.StringIO)
    assert [line.rstrip() for line in screen.file.getvalue().splitlines()] == lines


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, ["prepare", "measure", "0:00:00"]), (False, [])])
def test_what_is_no_stage_is_shown_on_a_terminal_until_a_stage_takes_its_place(
    is_terminal: bool, shown: list[str]
) -> None:
    screen = io.StringIO()
    reporter = StageLines(Console(file=screen, force_terminal=is_terminal, width=80))
    with reporter.busy("prepare"):
        reporter.started("measure")
        reporter.progressed("measure", 1, 2, "")
        assert len(reporter.bars.tasks) == is_terminal
    assert not reporter.bars.tasks
    assert all(word in screen.getvalue() for word in shown)
    assert bool(screen.getvalue()) == is_terminal
