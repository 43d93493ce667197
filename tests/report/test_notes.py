"""What a reader should know of a choice is said in one line, and nothing where there is nothing to say."""

import pytest

from factory.artifacts import CutLoss, CutLosses, DataSource, PruningPlan
from factory.report.card import render
from factory.report.notes import notes
from tests.builders.builds import demo_healed

PLAN = PruningPlan(criterion="angular", num_layers=30, dropped=tuple(range(2, 11)))


def losses_without(layer: int) -> CutLosses:
    whole, alone = (
        CutLoss(dropped=dropped, nats=3.0, stderr=0.1, behind=behind, behind_stderr=0.02)
        for dropped, behind in (((), 0.0), ((layer,), 1.5))
    )
    data = DataSource(name="x", version="1")
    return CutLosses(source=whole, cuts=(whole,), sink=alone, num_documents=8, sequence_length=64, data=data)


def test_a_clear_choice_of_a_model_without_a_sink_needs_no_note() -> None:
    assert notes(PLAN, num_samples=128, sink=None) == []


@pytest.mark.parametrize(
    ("ties", "named"),
    [
        ((10,), "layers 2–10 and 10–18 tie"),
        ((3, 10), "layers 2–10, 3–11 and 10–18 tie"),
        ((3, 4, 5, 6, 7, 8), "layers 2–10, 3–11, 4–12, 5–13, 6–14 and 2 more blocks tie"),
    ],
)
def test_blocks_that_tie_are_named_with_what_decides(ties: tuple[int, ...], named: str) -> None:
    (note,) = notes(PLAN.model_copy(update={"ties": ties}), num_samples=1280, sink=None)
    assert note == f"{named} within the error of 1,280 samples; `criterion=loss` or more `samples` decide"


def test_the_sink_is_named_with_its_loss_and_whether_it_is_dropped() -> None:
    (kept,) = notes(PLAN, num_samples=2, sink=11)
    assert kept == "layer 11 makes the attention sink, the large state of the first token"
    (dropped,) = notes(PLAN, num_samples=2, sink=4, losses=losses_without(4))
    assert dropped.endswith("and it is dropped; dropping it alone changes the loss by +1.500 ± 0.020")


def test_the_card_names_ties_and_a_dropped_sink() -> None:
    build = demo_healed()
    start, size = build.plan.dropped[0], len(build.plan.dropped)
    plan = build.plan.model_copy(update={"ties": (start - 1,)})
    for sink, count in ((start, 1), (start + size, 0), (None, 0)):
        card = render(build.model_copy(update={"plan": plan, "sink": sink}), has_healing_figure=False)
        assert card.count("makes the attention sink") == count
        assert f"{start - 1}–{start + size - 2} tie within the error of 64 samples" in card
    assert "tie within" not in render(build, has_healing_figure=False)
