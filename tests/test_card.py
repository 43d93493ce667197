"""The card: golden files for three builds, and what holds for every card."""

import os
from pathlib import Path
from typing import Any

import pytest

from factory.artifacts import (
    Adapter,
    Build,
    DataSource,
    Evaluation,
    LossPoint,
    PruningPlan,
    Source,
    Speed,
    SpeedComparison,
    TaskScore,
    TokenLoss,
)
from factory.card import render
from factory.config import BuildConfig, load_recipe

GOLDEN = Path(__file__).parent / "golden"
C4 = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
COMMIT = "27d67f1b5f57dc0953326b2601d68371d40ea8da"


# Builds -----------------------------------------------------------------------------------------


def a_source(**changes: Any) -> Source:
    values: dict[str, Any] = {
        "name": "Mistral-7B-v0.1",
        "repo_id": "mistralai/Mistral-7B-v0.1",
        "commit": COMMIT,
        "model_type": "mistral",
        "architecture": "MistralForCausalLM",
        "config": {"num_hidden_layers": 32},
        "num_layers": 32,
        "num_parameters": 7_241_732_096,
        "layer_parameters": (218_112_000,) * 32,
        "size_bytes": 14_483_464_192,
        "layer_bytes": (436_224_000,) * 32,
        "vocab_size": 32_000,
        "dtype": "bfloat16",
        "license": "apache-2.0",
        "languages": ("en",),
    }
    return Source.model_validate(values | changes)


def an_evaluation(
    nats: float, data: DataSource, *scores: TaskScore, vocabulary: float = 10.3735, tokens: int = 1_961_243
) -> Evaluation:
    return Evaluation(
        loss=TokenLoss(
            nats=nats,
            stderr=0.0131,
            normalized=nats / vocabulary,
            num_tokens=tokens,
            num_documents=1000,
            sequence_length=2048,
            data=data,
        ),
        tasks=scores,
        dtype="bfloat16",
        harness="lm-eval 0.4.13",
    )


def a_score(
    task: str, value: float, *, chance: float | None, shots: int = 0, metric: str = "acc"
) -> TaskScore:
    return TaskScore(
        task=task,
        label={"mmlu": "MMLU", "boolq": "BoolQ", "gsm8k": "GSM8K", "winogrande": "WinoGrande"}.get(
            task, task
        ),
        metric=metric,
        value=value,
        stderr=0.0081,
        num_fewshot=shots,
        num_samples=1000,
        chance=chance,
        version="1.0",
    )


def a_build(**changes: Any) -> Build:
    values: dict[str, Any] = {
        "factory_version": "0.1.0",
        "seconds": {"measure": 81.2, "prune": 12.9, "heal": 19_204.1, "merge": 44.0, "evaluate": 3_022.5},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        "stages": {"measure": "0123456789abcdef"},
        "files": {"model.safetensors": "00" * 32},
        "device": "NVIDIA H100 80GB HBM3",
    }
    return Build.model_validate(values | changes)


def demo_healed() -> Build:
    """The embedded demo: no Hub repository, a text that is no Hub data set, healed."""
    train = DataSource(name="stdlib:train", version="5b" * 32)
    held_out = DataSource(name="stdlib:held-out", version="c4" * 32)
    recipe = load_recipe("demo")
    config = BuildConfig(
        reference="demo", drop=0.3, measure=recipe.measure, heal=recipe.heal, evaluate=recipe.evaluate
    )
    losses = {"source": 2.2214, "pruned": 4.9071, "healed": 2.6127}
    lines = {"source": 0.781, "pruned": 0.344, "healed": 0.662}
    return a_build(
        name="demo-drop0.3",
        reference="demo",
        config=config.model_dump(mode="json"),
        source=a_source(
            name="demo",
            repo_id=None,
            commit="9d" * 20,
            num_layers=10,
            num_parameters=3_412_224,
            layer_parameters=(295_424,) * 10,
            size_bytes=6_831_104,
            layer_bytes=(590_848,) * 10,
            vocab_size=2048,
        ),
        plan=PruningPlan(
            criterion="angular",
            num_layers=10,
            dropped=(5, 6, 7),
            distance=0.0713,
            runner_up_start=4,
            runner_up_distance=0.0829,
        ),
        profile_samples=64,
        calibration=train,
        adapter=Adapter(
            folder=Path(),
            objective="sft",
            quantization="nf4",
            rank=recipe.heal.rank,
            learning_rate=recipe.heal.learning_rate,
            target_modules=("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"),
            num_steps=recipe.heal.num_steps,
            num_tokens=117_343,
            sequence_length=256,
            num_trainable_parameters=602_112,
            curve=(LossPoint(step=10, loss=3.4), LossPoint(step=60, loss=2.7)),
            guard_loss_before=4.8125,
            guard_loss_after=2.7031,
            data=train,
        ),
        shipped="healed",
        source_parameters=3_412_224,
        result_parameters=2_525_952,
        source_bytes=6_831_104,
        result_bytes=5_057_536,
        evaluations={
            name: an_evaluation(
                losses[name],
                held_out,
                a_score("next_line", lines[name], chance=0.25),
                vocabulary=7.6246,
                tokens=16_320,
            )
            for name in losses
        },
        speed=SpeedComparison(
            device="Intel Xeon, 2 threads",
            rounds=5,
            prompt_tokens=256,
            new_tokens=32,
            batch_size=1,
            source=Speed(
                prefill_tokens_per_second=2210.4,
                prefill_spread=0.021,
                decode_tokens_per_second=71.25,
                decode_spread=0.034,
            ),
            result=Speed(
                prefill_tokens_per_second=3080.9,
                prefill_spread=0.018,
                decode_tokens_per_second=99.75,
                decode_spread=0.029,
            ),
        ),
        seconds={"measure": 9.1, "prune": 0.2, "heal": 141.7, "merge": 0.3, "evaluate": 33.0},
        device="Intel Xeon, 2 threads",
    )


def chat_with_other_licence() -> Build:
    """A chat model under a licence of its own, healed, with other settings and four kinds of scores."""
    c4 = DataSource(name="allenai/c4:en", version=C4, hub_id="allenai/c4", split="validation")
    config = BuildConfig(reference="meta-llama/Llama-3.1-8B-Instruct", drop=0.25, seed=3)
    heal = config.heal.model_copy(update={"rank": 8, "num_steps": 2000})
    config = config.model_copy(update={"heal": heal})
    losses = {"source": 2.6021, "pruned": 4.1188, "healed": 2.9154}
    scores = {  # MMLU, BoolQ, GSM8K, WinoGrande, one that the source cannot do
        "source": (0.6794, 0.8411, 0.7567, 0.7370, 0.2560),
        "pruned": (0.5817, 0.6220, 0.0110, 0.6875, 0.2480),
        "healed": (0.6341, 0.8302, 0.3215, 0.5080, 0.2510),
    }
    return a_build(
        name="Llama-3.1-8B-Instruct-drop0.25",
        reference="meta-llama/Llama-3.1-8B-Instruct",
        config=config.model_dump(mode="json"),
        source=a_source(
            name="Llama-3.1-8B-Instruct",
            repo_id="meta-llama/Llama-3.1-8B-Instruct",
            commit="0e9e39f249a16976918f6564b8830bc894c89659",
            model_type="llama",
            architecture="LlamaForCausalLM",
            num_parameters=8_030_261_248,
            vocab_size=128_256,
            license="other",
            license_name="llama3.1",
            license_link="LICENSE",
            languages=("en", "de", "fr"),
            has_chat_template=True,
        ),
        plan=PruningPlan(
            criterion="angular",
            num_layers=32,
            dropped=tuple(range(20, 28)),
            distance=0.2402,
            runner_up_start=21,
            runner_up_distance=0.2418,
        ),
        profile_samples=512,
        calibration=c4,
        adapter=Adapter(
            folder=Path(),
            objective="sft",
            quantization="nf4",
            rank=8,
            learning_rate=3e-4,
            target_modules=("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"),
            num_steps=2000,
            num_tokens=61_204_992,
            sequence_length=2048,
            num_trainable_parameters=10_616_832,
            curve=(LossPoint(step=10, loss=3.4), LossPoint(step=2000, loss=2.8)),
            guard_loss_before=4.2071,
            guard_loss_after=2.9612,
            data=DataSource(name="allenai/c4:en", version=C4, hub_id="allenai/c4", split="train"),
        ),
        shipped="healed",
        source_parameters=8_030_261_248,
        result_parameters=6_285_365_248,
        source_bytes=16_060_556_376,
        result_bytes=12_570_751_640,
        evaluations={
            name: an_evaluation(
                losses[name],
                c4,
                a_score("mmlu", scores[name][0], chance=0.25, shots=5),
                a_score("boolq", scores[name][1], chance=0.5),
                a_score("gsm8k", scores[name][2], chance=None, shots=5, metric="exact_match"),
                a_score("winogrande", scores[name][3], chance=0.5),
                a_score("arc_fr|hard", scores[name][4], chance=0.25),
                vocabulary=11.7618,
            )
            for name in losses
        },
        speed=SpeedComparison(
            device="NVIDIA H100 80GB HBM3",
            rounds=5,
            prompt_tokens=256,
            new_tokens=32,
            batch_size=1,
            source=Speed(
                prefill_tokens_per_second=14_210.0,
                prefill_spread=0.011,
                decode_tokens_per_second=41.2,
                decode_spread=0.02,
            ),
            result=Speed(
                prefill_tokens_per_second=18_533.0,
                prefill_spread=0.014,
                decode_tokens_per_second=54.1,
                decode_spread=0.02,
            ),
        ),
    )


def unhealed() -> Build:
    """Healing switched off, no tasks, speed not measured, no licence on the source's card."""
    c4 = DataSource(name="allenai/c4:en", version=C4, hub_id="allenai/c4", split="validation")
    config = BuildConfig(reference="mistral-7b", drop=0.28, heal_enabled=False)
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"tasks": ()})})
    return a_build(
        name="Mistral-7B-v0.1-drop0.28",
        reference="mistral-7b",
        config=config.model_dump(mode="json"),
        source=a_source(license=None, languages=()),
        plan=PruningPlan(
            criterion="angular",
            num_layers=32,
            dropped=tuple(range(20, 29)),
            distance=0.2011,
            runner_up_start=21,
            runner_up_distance=0.2043,
        ),
        profile_samples=512,
        calibration=c4,
        adapter=None,
        shipped="pruned",
        source_parameters=7_241_732_096,
        result_parameters=5_278_724_096,
        source_bytes=14_483_464_192,
        result_bytes=10_557_448_192,
        evaluations={"source": an_evaluation(2.1034, c4), "pruned": an_evaluation(3.6120, c4)},
        speed=None,
        seconds={"measure": 81.2, "prune": 12.9, "evaluate": 310.0},
    )


def healing_discarded() -> Build:
    """Healing was tried and made the model worse."""
    build = chat_with_other_licence()
    assert build.adapter is not None
    adapter = build.adapter.model_copy(update={"guard_loss_before": 2.91, "guard_loss_after": 3.05})
    evaluations = dict(build.evaluations)
    evaluations["pruned"], evaluations["healed"] = evaluations["healed"], evaluations["pruned"]
    return build.model_copy(update={"adapter": adapter, "shipped": "pruned", "evaluations": evaluations})


# Golden files -----------------------------------------------------------------------------------

CARDS = {
    "demo": lambda: render(demo_healed(), has_healing_figure=True),
    "chat": lambda: render(
        chat_with_other_licence(), repo_id="someone/Llama-3.1-8B-Instruct-24-layers", has_healing_figure=True
    ),
    "unhealed": lambda: render(unhealed(), repo_id="someone/mistral-23-layers", has_healing_figure=False),
    "discarded": lambda: render(healing_discarded(), has_healing_figure=False),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_card_is_the_golden_one(name: str) -> None:
    """After a wanted change: UPDATE_GOLDEN=1 pytest tests/test_card.py, then read the difference."""
    path = GOLDEN / f"card_{name}.md"
    card = CARDS[name]()
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(card, encoding="utf-8")
    assert card == path.read_text(encoding="utf-8")
