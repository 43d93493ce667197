"""Plans side by side and sweeps, through the command line on the demo model; where the cliff is."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from factory.artifacts import (
    DataSource,
    Evaluation,
    Plans,
    PruningPlan,
    Sweep,
    SweepPoint,
    TaskScore,
    TokenLoss,
)
from factory.cli.console import console
from factory.cli.main import main
from factory.cli.tables import show_sweep
from factory.evaluation.speed import compare_speed
from factory.hub.resolve import resolve
from factory.pipeline.sweep import RULE, before_the_cliff, kept_stderr, share_kept
from factory.pruning.profile_files import read_profile
from factory.report.sweep_figure import draw_sweep, sweep_figure
from tests.builders.commands import BRIEF
from tests.builders.models import save_llama
from tests.builders.texts import rhymes

DATA = DataSource(name="x", version="1")


def evaluation(nats: float, *scores: float, chance: float | None = 0.25) -> Evaluation:
    return Evaluation(
        loss=TokenLoss(
            nats=nats,
            stderr=0.1,
            normalized=nats / 10,
            num_tokens=9,
            num_documents=3,
            sequence_length=8,
            data=DATA,
        ),
        tasks=tuple(
            TaskScore(
                task=f"t{index}",
                label=f"T{index}",
                metric="acc",
                value=value,
                stderr=0.01,
                num_fewshot=0,
                num_samples=9,
                chance=chance,
                version="1",
            )
            for index, value in enumerate(scores)
        ),
        dtype="float32",
        harness="lm-eval",
    )


def point(drop: float, pruned: Evaluation, healed: Evaluation | None = None) -> SweepPoint:
    plan = PruningPlan(criterion="angular", num_layers=10, dropped=tuple(range(round(10 * drop))))
    return SweepPoint(drop=drop, plan=plan, pruned=pruned, healed=healed)


def test_what_is_kept_is_the_advantage_over_guessing() -> None:
    source = evaluation(3.0, 0.75, 0.65)
    assert share_kept(evaluation(9.0, 0.75, 0.65), source) == pytest.approx(1.0)
    assert share_kept(evaluation(9.0, 0.50, 0.45), source) == pytest.approx(0.5)
    assert share_kept(evaluation(9.0, 0.25, 0.25), source) == pytest.approx(0.0)


def test_without_a_task_that_the_source_can_do_the_loss_decides() -> None:
    for source in (evaluation(3.0), evaluation(3.0, 0.26), evaluation(3.0, 0.9, chance=None)):
        after = evaluation(6.5).model_copy(update={"tasks": source.tasks})
        assert share_kept(after, source) == pytest.approx(0.5)


def test_the_error_of_what_is_kept_is_that_of_both_scores_over_the_margin() -> None:
    source, after = evaluation(3.0, 0.75), evaluation(9.0, 0.50)
    assert kept_stderr(after, source) == pytest.approx(math.hypot(0.01, 0.5 * 0.01) / 0.5)
    assert kept_stderr(source, source) == pytest.approx(math.sqrt(2) * 0.01 / 0.5)
    of_loss = (
        math.hypot(0.01, 0.5 * 0.01) / 0.7
    )  # of loss / log V, whose error is a tenth of that of the loss
    assert kept_stderr(evaluation(6.5), evaluation(3.0)) == pytest.approx(of_loss)
    two = evaluation(3.0, 0.75, 0.75)
    assert kept_stderr(two, two) == pytest.approx(0.02 / 0.5 / 2)


def test_a_source_that_only_guesses_has_no_cliff() -> None:
    source = evaluation(10.5)
    assert math.isnan(share_kept(evaluation(10.2), source))
    assert math.isnan(kept_stderr(evaluation(10.2), source))
    assert before_the_cliff([point(0.1, evaluation(10.2))], source) is None


def test_the_cliff_is_where_too_little_is_kept_for_the_first_time() -> None:
    source = evaluation(3.0, 0.75)
    points = [
        point(0.1, evaluation(3.1, 0.74)),
        point(0.2, evaluation(3.5, 0.70)),
        point(0.3, evaluation(5.0, 0.40)),
        point(0.4, evaluation(5.1, 0.74)),  # a lucky one behind the cliff does not count
    ]
    assert before_the_cliff(points, source) == 0.2
    assert before_the_cliff(points[2:], source) is None
    healed = [point(0.3, evaluation(5.0, 0.40), healed=evaluation(3.2, 0.72))]
    assert before_the_cliff(healed, source) == 0.3


def a_sweep(*, healed: bool, tasks: bool) -> Sweep:
    scores = [(0.75, 0.6), (0.7, 0.6), (0.4, 0.55), (0.26, 0.5)]
    whole, *rest = [evaluation(3 + i, *(scores[i] if tasks else ())) for i in range(4)]
    points = tuple(point(0.1 * (i + 1), e, whole if healed else None) for i, e in enumerate(rest))
    return Sweep(
        source_name="x",
        source_commit="ab" * 20,
        num_layers=10,
        criterion="angular",
        source=whole,
        points=points,
        before_the_cliff=0.1,
        rule=RULE,
    )


@pytest.mark.parametrize("healed", [False, True])
@pytest.mark.parametrize("tasks", [False, True])
def test_equal_sweeps_give_equal_figures(tmp_path: Path, healed: bool, tasks: bool) -> None:
    made = sweep_figure(a_sweep(healed=healed, tasks=tasks), path_stem=tmp_path / "a")
    again = sweep_figure(a_sweep(healed=healed, tasks=tasks), path_stem=tmp_path / "b")
    assert [path.suffix for path in made] == [".png", ".svg"]
    assert [path.read_bytes() for path in made] == [path.read_bytes() for path in again]


def test_each_scale_has_a_panel_and_what_does_not_count_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_perplexity(evaluation: Evaluation, value: float) -> Evaluation:
        task = evaluation.tasks[0].model_copy(
            update={"label": "wiki", "metric": "word_perplexity", "value": value, "chance": None,
                    "is_share": False, "higher_is_better": False}
        )  # fmt: skip
        return evaluation.model_copy(update={"tasks": (*evaluation.tasks, task)})

    made = a_sweep(healed=False, tasks=True)
    points = [point(p.drop, with_perplexity(p.pruned, v)) for p, v in zip(made.points, (800, 9e4, math.inf))]  # noqa: B905
    both = made.model_copy(update={"source": with_perplexity(made.source, 500.5), "points": tuple(points)})
    assert share_kept(both.points[0].best, both.source) == share_kept(made.points[0].best, made.source)
    show_sweep(console(), both, folder=tmp_path)
    told = capsys.readouterr().out
    assert "wiki word_perplexity ↓" in told
    assert "500.500 ± 0.010" in told
    assert "Not counted, without a chance level: wiki." in told
    assert "Largest safe cut: 10%" in told
    with Image.open(sweep_figure(both, path_stem=tmp_path / "sweep")[0]) as figure:
        assert figure.width == 3075


# The commands -----------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["factory", *arguments])
    main()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def there(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compare_speed, "__kwdefaults__", compare_speed.__kwdefaults__ | BRIEF)
    monkeypatch.setenv("FACTORY_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return tmp_path


QUICK = ("--samples", "8", "--sequence-length", "64", "--plan-documents", "4")


def test_all_criteria_stand_side_by_side(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "plan", "demo", "--drop", "0.1", "--criterion", "all", *QUICK, "--save", "kept")
    shown = capsys.readouterr().out
    plans = Plans.read(there / "kept")
    assert [plan.criterion for plan in plans.plans] == [
        "angular", "deepest", "block-influence", "loss", "greedy",
    ]  # fmt: skip
    assert plans.losses is not None
    assert [cut.dropped for cut in plans.losses.cuts] == [plan.dropped for plan in plans.plans]
    assert all(cut.nats > plans.losses.source.nats for cut in plans.losses.cuts)
    assert min(cut.behind for cut in plans.losses.cuts) == 0
    assert f"Take {plans.chosen}: {plans.reason}." in shown
    assert (there / "kept" / "angular-distance.png").stat().st_size > 10_000
    run(monkeypatch, "plan", "demo", "--drop", "0.1", "--profile", "kept", *QUICK)
    assert "passes" not in capsys.readouterr().out  # the profile alone decides, no weights are read


def test_distances_of_pruneme_serve_the_command(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f"{start},{start + 3},{0.1 + 0.01 * abs(start - 3)}\n" for start in range(6))
    Path("p.csv").write_text(f"block_start,block_end,average_distance\n{rows}", encoding="utf-8")
    Path("t.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in rhymes(6)))
    for seed in (0, 1):
        save_llama(Path(f"m{seed}"), num_layers=8, seed=seed)
    given = ["--drop", "0.375", "--profile", "p.csv", "--save", "kept"]
    monkeypatch.setattr("factory.text.text.find_data_set", None)  # the text is not even opened
    run(monkeypatch, "plan", "m0", *given)
    assert "factory build m0 --layers 3,4,5\n" in capsys.readouterr().out
    assert read_profile(Path("kept"), source=resolve("m0")).block_distances(3)[3] == pytest.approx(0.1)
    monkeypatch.undo()
    monkeypatch.setenv("FACTORY_HOME", str(there / "home"))
    monkeypatch.chdir(there)
    run(monkeypatch, "plan", "m0", *given, "--criterion", "all", "--calibration-data", "t.jsonl")
    plans = {plan.criterion: plan for plan in Plans.read(Path("kept")).plans}
    assert list(plans) == ["angular", "deepest", "loss", "greedy"]
    assert plans["greedy"].distance is None or len(plans["greedy"].dropped) == 3
    capsys.readouterr()
    run(monkeypatch, "plan", "m1", *given, "--criterion", "loss", "--calibration-data", "t.jsonl")
    assert "✓ search" in capsys.readouterr().out  # the same distances, but another model


def test_the_command_that_builds_a_plan_measures_on_the_same(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "plan", "demo", "--drop", "0.1", "--criterion", "deepest", *QUICK, "--save", "kept")
    shown = capsys.readouterr().out
    command = "factory build demo --drop 0.1 --samples 8 --sequence-length 64 --plan-documents 4"
    assert f"  build it    {command} --criterion deepest\n" in shown


def test_the_length_that_is_asked_for_is_that_of_the_search_too(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "plan", "demo", "--drop", "0.1", "--criterion", "all", *QUICK, "--save", "kept")
    losses = Plans.read(there / "kept").losses
    assert losses is not None
    assert losses.sequence_length == 64


def test_a_plan_is_json_for_programs(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "plan", "demo", "--drop", "0.1", *QUICK, "--json")
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert len(found["plans"][0]["dropped"]) == 2
    assert found["chosen"] == "angular"


def test_a_sweep_measures_once_and_a_build_reuses_its_cuts(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [*QUICK, "--eval-documents", "3", "--tasks", "none"]
    run(monkeypatch, "sweep", "demo", "--drop", "0.1,0.3,0.09", *quick)  # 0.1 and 0.09: the same two layers
    shown = capsys.readouterr().out
    assert shown.count("✓ measure") + shown.count("= measure") == 1
    found = Sweep.read(there / "sweeps" / "demo")
    assert [len(point.plan.dropped) for point in found.points] == [2, 7]
    assert found.source.loss.nats < found.points[0].pruned.loss.nats < found.points[1].pruned.loss.nats
    assert (there / "sweeps" / "demo" / "sweep.svg").is_file()
    assert [loss.data.name for loss in found.points[1].pruned.losses] == ["stdlib:held-out", "stdlib:prose"]
    (legend,) = [axes.get_legend() for axes in draw_sweep(found).axes if axes.get_visible()]
    assert [text.get_text() for text in legend.texts] == ["stdlib:held-out, pruned", "stdlib:prose, pruned"]
    assert f"{found.points[1].pruned.losses[1].nats:.3f} ± " in shown
    run(monkeypatch, "build", "demo", "--drop", "0.3", "--no-heal", *quick)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("=")]
    assert {line.split()[1] for line in lines} == {"measure", "plan", "prune", "evaluate"}


def test_one_greedy_search_serves_every_fraction_of_a_sweep(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [
        *QUICK,
        "--eval-documents",
        "3",
        "--tasks",
        "none",
        "--criterion",
        "greedy",
        "--plan-documents",
        "3",
    ]
    run(monkeypatch, "sweep", "demo", "--drop", "0.05,0.1", "--criterion", "greedy", *quick)
    shown = capsys.readouterr().out
    assert shown.count("✓ search") == 1
    small, large = Sweep.read(there / "sweeps" / "demo").points
    assert small.plan.order is not None
    assert large.plan.order is not None
    assert large.plan.order[: len(small.plan.order)] == small.plan.order
    assert set(small.plan.dropped) == set(small.plan.order)


def test_a_build_can_drop_layers_of_ones_own_choice(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [*QUICK, "--eval-documents", "3", "--tasks", "none", "--no-heal"]
    run(monkeypatch, "build", "demo", "--layers", "3,7,21-22", *quick, "--out", "chosen")
    assert "dropping 4 of 24 layers (17%) by choice: 3, 7, 21–22" in capsys.readouterr().out
    card = (there / "chosen" / "model" / "README.md").read_text(encoding="utf-8")
    assert "the author of this model chose the layers" in card
    assert "factory build demo --layers 3,7,21,22 " in card
    config = json.loads((there / "chosen" / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["num_hidden_layers"] == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "demo", "--layers", "3,99"], "--layers 3, 99: the model has layers 0 to 23"),
        (["build", "demo", "--layers", "3", "--drop", "0.1"], "--layers with --drop"),
        (["build", "demo", "--layers", "3", "--criterion", "loss"], "--layers with --criterion"),
        (["sweep", "demo", "--drop", "0.1,1.5"], "--drop 1.5 is not a fraction between 0 and 1"),
        (["sweep", "demo", "--drop", "0.1,,0.2"], "--drop is not a fraction"),
        (["plan", "demo", "--drop", "0.99"], "of 24 layers leaves 0"),
        (
            ["plan", "demo", "--drop", "0.1", "--save", "/dev/null/x"],
            "cannot create the folder '/dev/null/x'",
        ),
        (["sweep", "demo", "--out", "/dev/null/x"], "cannot create the folder '/dev/null/x'"),
        (["plan", "demo", "--drop", "0.1", "--profile", "nowhere"], "no profile at 'nowhere'"),
        (["plan", "demo", "--drop", "0.1", "--criterion", "best"], "'best' is not one of"),
        (["plan", "dmo", "--drop", "0.1"], "dmo"),
    ],
)
def test_bad_input_is_told_in_one_line(
    there: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    assert caught.value.code in (1, 2)
    error, hint = capsys.readouterr().err.strip().splitlines()
    assert message in error
    assert hint.startswith("hint: ")
    assert not list(there.iterdir())
