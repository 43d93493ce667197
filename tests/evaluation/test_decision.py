"""What ships is decided by what healing gained and what it cost on text unlike its own."""

from math import inf

import pytest

from factory.artifacts import DataSource
from factory.evaluation.decision import decide
from tests.builders.builds import an_evaluation, demo_healed

PROSE = DataSource(name="stdlib:prose", version="d7" * 32)
CODE = DataSource(name="stdlib:held-out", version="d8" * 32)


@pytest.mark.parametrize(
    ("held_out", "prose", "ships"),
    [
        ((4.0, 3.0), (5.0, 4.0), True),  # better on both
        ((4.0, 3.0), (5.0, 5.9), True),  # the gain outweighs the harm
        ((4.0, 3.0), (5.0, 6.1), False),
        ((4.0, 4.0), (5.0, 4.0), False),  # nothing gained where it was trained
        ((4.0, inf), (5.0, 4.0), False),
        ((4.0, 3.0), (5.0, inf), False),
    ],
)
def test_healing_ships_if_its_gain_outweighs_its_harm_on_unlike_text(
    held_out: tuple[float, float], prose: tuple[float, float], ships: bool
) -> None:
    adapter = demo_healed().adapter
    assert adapter is not None
    pruned, healed = (
        an_evaluation(nats, CODE).model_copy(update={"more_losses": (an_evaluation(other, PROSE).loss,)})
        for nats, other in zip(
            (9.0, 19.0), prose, strict=True
        )  # a like text counts in the held-out loss alone
    )
    guard = dict(zip(("unhealed", "healed"), held_out, strict=True))
    made = decide(adapter, guard, {"pruned": pruned, "healed": healed})
    assert made.ships is ships
    assert made.text == (PROSE if prose[1] > prose[0] else None)


def test_a_healed_model_that_could_not_be_evaluated_does_not_ship() -> None:
    build = demo_healed()
    assert build.adapter is not None
    assert not decide(build.adapter, {"unhealed": 3.0, "healed": inf}, {}).ships
