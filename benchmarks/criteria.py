"""Compare criteria: the layers that each drops for several sizes, and the unhealed loss of each cut.

One measurement serves all sizes. Searches read one half of the documents; the losses are of the other half.
"""

import argparse
import tempfile
from pathlib import Path

from factory.artifacts import Plans, layer_ranges
from factory.cli.console import StageLines, console
from factory.config.criteria import CRITERIA
from factory.config.settings import BuildConfig, MeasureSettings, PlanSettings
from factory.hub.pull import pull
from factory.hub.resolve import resolve
from factory.pipeline.plans import make_plans
from factory.pipeline.run import Run
from factory.pipeline.texts import open_texts
from factory.store.store import Store


def plans_for(run: Run, model: str, sizes: list[int]) -> list[Plans]:
    """Return the plans of every criterion for each number of layers."""
    source = pull(resolve(model))
    found = []
    for size in sizes:
        run.config = run.config.model_copy(update={"drop": size / source.num_layers})
        found.append(make_plans(run, source, tuple(CRITERIA))[1])
    return found


def table(plans: Plans) -> str:
    """Return one size as Markdown."""
    assert plans.losses is not None
    source = plans.losses.source
    n, num_layers = len(plans.plans[0].dropped), plans.plans[0].num_layers
    lines = [
        f"n = {n} of {num_layers}; source {source.nats:.3f} ± {source.stderr:.3f}; take {plans.chosen}",
        "",
        "| criterion | dropped | loss, unhealed | behind the best | search passes |",
        "|---|---|--:|--:|--:|",
    ]
    for plan, cut in zip(plans.plans, plans.losses.cuts, strict=True):
        behind = f"{cut.behind:.3f} ± {cut.behind_stderr:.3f}" if cut.behind else "–"
        passes = f"{plan.passes:.0f}" if plan.passes is not None else ""
        layers = layer_ranges(plan.dropped)
        lines.append(
            f"| {plan.criterion} | {layers} | {cut.nats:.3f} ± {cut.stderr:.3f} | {behind} | {passes} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print one table per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="text that the model was not trained on")
    parser.add_argument("--sizes", default="3,6,10,16", help="numbers of layers to drop")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    arguments = parser.parse_args()
    config = BuildConfig(
        reference=arguments.model,
        drop=0.5,
        measure=MeasureSettings(
            data=arguments.data,
            num_samples=arguments.samples,
            sequence_length=arguments.sequence_length,
        ),
        plan=PlanSettings(num_documents=arguments.documents, sequence_length=arguments.sequence_length),
    )
    with tempfile.TemporaryDirectory() as home:
        texts = open_texts(config, heals=False, evaluates=False)
        run = Run(config, Store(Path(home)), StageLines(console(stderr=True)), texts)
        for plans in plans_for(run, arguments.model, [int(size) for size in arguments.sizes.split(",")]):
            print(table(plans))


if __name__ == "__main__":
    main()
