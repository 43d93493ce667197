"""Builds that are written down and were never made, and what they consist of: for cards, tables and pages."""

import math
from pathlib import Path
from typing import Any

from factory.artifacts import (
    Adapter,
    Build,
    Comparison,
    DataSource,
    Decision,
    DistanceProfile,
    Evaluation,
    FittedSeam,
    Gguf,
    Lineage,
    LossPoint,
    Origin,
    PartScore,
    PruningPlan,
    SeamFit,
    SizeGoal,
    Source,
    Speed,
    SpeedComparison,
    TaskScore,
    TokenLoss,
)
from factory.config.request import BuildRequest
from factory.config.settings import BuildConfig, load_recipe, settle
from factory.pruning.measure import Sums
from factory.serving.runtimes import verdicts

C4 = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
COMMIT = "27d67f1b5f57dc0953326b2601d68371d40ea8da"


def a_source(**changes: Any) -> Source:
    values: dict[str, Any] = {
        "name": "Mistral-7B-v0.1",
        "repo_id": "mistralai/Mistral-7B-v0.1",
        "commit": COMMIT,
        "model_type": "mistral",
        "architecture": "MistralForCausalLM",
        "config": {"model_type": "mistral", "num_hidden_layers": 32, "max_position_embeddings": 32_768},
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
    nats: float, data: DataSource, *scores: TaskScore, vocab_size: int = 32_000, num_documents: int = 1000
) -> Evaluation:
    return Evaluation(
        loss=TokenLoss(
            nats=nats,
            stderr=0.0131,
            normalized=nats / math.log(vocab_size),
            num_tokens=num_documents * 1961,
            num_documents=num_documents,
            sequence_length=2048,
            data=data,
        ),
        tasks=scores,
        dtype="bfloat16",
        harness="lm-eval 0.4.13",
    )


def a_score(
    task: str, value: float, *, chance: float | None, shots: int = 0, metric: str = "acc", **changes: Any
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
        **changes,
    )


def a_comparison(measure: str, difference: float, *, num_items: int, test: str) -> Comparison:
    stderr = 0.0069
    return Comparison(
        measure=measure,
        difference=difference,
        stderr=stderr,
        low=difference - 1.96 * stderr,
        high=difference + 1.96 * stderr,
        confidence=0.95,
        p_value=math.erfc(abs(difference) / stderr / math.sqrt(2)),
        num_items=num_items,
        test=test,
    )


def loss_comparisons(before: Evaluation, after: Evaluation) -> tuple[Comparison, ...]:
    """On each text, as a build holds them."""
    return tuple(
        a_comparison("loss", new.nats - old.nats, num_items=old.num_documents, test="paired t").model_copy(
            update={"text": old.data.name}
        )
        for old, new in zip(before.losses, after.losses, strict=True)
    )


def comparisons(evaluations: dict[str, Evaluation]) -> dict[str, tuple[Comparison, ...]]:
    """With the source, as a build holds them."""
    source = evaluations["source"]
    return {
        name: (
            *loss_comparisons(source, evaluation),
            *(
                a_comparison(
                    new.task, new.value - old.value, num_items=old.num_samples, test="McNemar, exact"
                )
                for old, new in zip(source.tasks, evaluation.tasks, strict=True)
            ),
        )
        for name, evaluation in evaluations.items()
        if name != "source"
    }


SUBJECTS = {  # the source's score, what is lost, questions
    "high_school_mathematics": (0.411, 0.162, 270),
    "formal_logic": (0.532, 0.121, 126),
    "abstract_algebra": (0.36, 0.11, 100),
    "moral_scenarios": (0.571, 0.094, 895),
    "college_physics": (0.451, 0.088, 102),
    "virology": (0.542, 0.012, 166),
    "sociology": (0.861, -0.005, 201),
}


def subjects(name: str) -> tuple[PartScore, ...]:
    """MMLU's parts: the healed model lost what `SUBJECTS` says, the pruned one twice as much."""
    share = {"source": 0, "pruned": 2, "healed": 1}[name]
    return tuple(
        PartScore(label=label, value=value - share * lost, num_samples=count)
        for label, (value, lost, count) in SUBJECTS.items()
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
    build = Build.model_validate(values | changes)
    return build.model_copy(update={"comparisons": comparisons(build.evaluations)})


def a_gguf(**changes: Any) -> Gguf:
    check = {"largest": 0.913, "apart": 0.04, "same_next": 0.977, "num_positions": 128, "longest": 160}
    values = {
        "name": "demo-drop30-Q8_0.gguf",
        "kind": "Q8_0",
        "sha256": "ab" * 32,
        "size_bytes": 2_700_000,
        "made_by": "gguf 0.19.0",
        "check": {**check, "num_texts": 6, "llama": "0.3.36"},
    }
    return Gguf.model_validate(values | changes)


def demo_healed() -> Build:
    """The embedded demo: no Hub repository, a text that is no Hub data set, healed."""
    train = DataSource(name="stdlib:train", version="5b" * 32)
    held_out = DataSource(name="stdlib:held-out", version="c4" * 32)
    recipe = load_recipe("demo")
    source = a_source(name="demo", repo_id=None, num_parameters=3_412_224)
    config = settle(BuildRequest(model="demo", drop=0.3), source)
    losses = {"source": 2.2214, "pruned": 4.9071, "healed": 2.6127}
    lines = {"source": 0.781, "pruned": 0.344, "healed": 0.662}
    return a_build(
        name="demo-drop30",
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
        runtimes=verdicts({"model_type": "llama", "num_hidden_layers": 10}, (5, 6, 7)),
        calibration=train,
        adapter=Adapter(
            folder=Path(),
            objective="distill",
            quantization="none",
            rank=config.heal.rank,
            learning_rate=config.heal.learning_rate,
            target_modules=("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj"),
            num_steps=recipe.heal.num_steps,
            num_tokens=117_343,
            sequence_length=256,
            num_trainable_parameters=602_112,
            curve=(LossPoint(step=10, loss=1.4), LossPoint(step=60, loss=0.7)),
            guard_curve=(LossPoint(step=40, loss=3.1), LossPoint(step=80, loss=2.7031)),
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
                vocab_size=2048,
                num_documents=64,
            )
            for name in losses
        },
        speed=SpeedComparison(
            device="Intel Xeon, 2 threads",
            rounds=5,
            prompt_tokens=256,
            new_tokens=32,
            batch_size=1,
            dtype="float32",
            memory="weights and cache",
            source=Speed(
                prefill_tokens_per_second=2210.4,
                prefill_spread=0.021,
                decode_tokens_per_second=71.25,
                decode_spread=0.034,
                memory_bytes=14_390_208,
                cache_bytes_per_token=2560.0,
            ),
            result=Speed(
                prefill_tokens_per_second=3080.9,
                prefill_spread=0.018,
                decode_tokens_per_second=99.75,
                decode_spread=0.029,
                memory_bytes=10_619_904,
                cache_bytes_per_token=1792.0,
            ),
        ),
        seconds={"measure": 9.1, "prune": 0.2, "heal": 141.7, "merge": 0.3, "evaluate": 33.0},
        device="Intel Xeon, 2 threads",
    )


def on_two_texts(*, prose: tuple[float, float, float] = (3.9127, 6.1052, 5.6188)) -> Build:
    """The demo evaluated also on a text unlike the healing text, with its losses on it."""
    build = demo_healed()
    text = DataSource(name="stdlib:prose", version="d7" * 32)
    evaluations = {
        name: evaluation.model_copy(
            update={"more_losses": (an_evaluation(nats, text, vocab_size=2048, num_documents=64).loss,)}
        )
        for (name, evaluation), nats in zip(build.evaluations.items(), prose, strict=True)
    }
    return build.model_copy(
        update={
            "evaluations": evaluations,
            "comparisons": comparisons(evaluations),
            "healing": loss_comparisons(evaluations["pruned"], evaluations["healed"]),
        }
    )


def healing_harmful() -> Build:
    """Healing lowered the loss on its own text by less than it raised that on prose."""
    build = on_two_texts(prose=(3.9, 5.6, 6.1))
    prose = build.evaluations["source"].losses[1].data
    decision = Decision(gain=0.2, harm=0.5, text=prose)
    return build.model_copy(update={"shipped": "pruned", "decision": decision})


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
        name="Llama-3.1-8B-Instruct-drop25",
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
        runtimes=verdicts({"model_type": "gemma3_text", "num_hidden_layers": 26}, (20, 21)),
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
        merge_base="source weights",
        merge_losses={"source weights": 2.9581, "NF4 weights, unpacked": 2.9633},
        guard_losses={"unhealed": 4.1893, "healed": 2.9581},
        shipped="healed",
        source_parameters=8_030_261_248,
        result_parameters=6_285_365_248,
        source_bytes=16_060_556_376,
        result_bytes=12_570_751_640,
        evaluations={
            name: an_evaluation(
                losses[name],
                c4,
                a_score("mmlu", scores[name][0], chance=0.25, shots=5, parts=subjects(name)),
                a_score("boolq", scores[name][1], chance=0.5),
                a_score(
                    "gsm8k",
                    scores[name][2],
                    chance=None,
                    shots=5,
                    metric="exact_match",
                    answers="strict-match",
                ),
                a_score("winogrande", scores[name][3], chance=0.5),
                a_score("arc_fr|hard", scores[name][4], chance=0.25),
                vocab_size=128_256,
            )
            for name in losses
        },
        speed=SpeedComparison(
            device="NVIDIA H100 80GB HBM3",
            rounds=5,
            prompt_tokens=256,
            new_tokens=32,
            batch_size=1,
            dtype="bfloat16",
            memory="peak",
            source=Speed(
                prefill_tokens_per_second=14_210.0,
                prefill_spread=0.011,
                decode_tokens_per_second=41.2,
                decode_spread=0.02,
                memory_bytes=16_390_381_568,
                cache_bytes_per_token=131_072.0,
            ),
            result=Speed(
                prefill_tokens_per_second=18_533.0,
                prefill_spread=0.014,
                decode_tokens_per_second=54.1,
                decode_spread=0.02,
                memory_bytes=12_901_023_744,
                cache_bytes_per_token=98_304.0,
            ),
        ),
    )


def unhealed() -> Build:
    """Healing switched off, no tasks, speed not measured, no licence on the source's card."""
    c4 = DataSource(name="allenai/c4:en", version=C4, hub_id="allenai/c4", split="validation")
    config = BuildConfig(reference="mistral-7b", drop=0.28, heal_enabled=False)
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"tasks": ()})})
    return a_build(
        name="Mistral-7B-v0.1-drop28",
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
    guard = {"guard_loss_before": 2.91, "guard_loss_after": 3.05, "objective": "distill"}
    adapter = build.adapter.model_copy(update=guard)
    limited = build.config | {
        "evaluate": build.config["evaluate"] | {"limit": 1000},
        "heal": build.config["heal"] | {"dropout": 0.1},
    }
    evaluations = dict(build.evaluations)
    evaluations["pruned"], evaluations["healed"] = evaluations["healed"], evaluations["pruned"]
    changes = {
        "adapter": adapter,
        "guard_losses": {"unhealed": 2.88, "healed": 3.04},
        "config": limited,
        "shipped": "pruned",
        "evaluations": evaluations,
        "comparisons": comparisons(evaluations),
    }
    return build.model_copy(update=changes)


def a_seam(**fields: Any) -> SeamFit:
    """What a fit of the layer before one cut says of itself, with some of its facts chosen."""
    seam = FittedSeam(
        layer=9,
        module="mlp.down_proj",
        rank=128,
        ridge=0.1,
        explained=0.553,
        num_tokens=20_147,
        num_left_out=94,
    )
    values: dict[str, Any] = {
        "quantization": "none",
        "seams": (seam,),
        "loss_before": 5.322,
        "loss_after": 4.257,
    }
    return SeamFit(**values | fields)


def fitted_seam(*, shipped: str) -> Build:
    """A build whose layer before the cut was fitted, without training."""
    build = chat_with_other_licence() if shipped == "healed" else healing_discarded()
    assert build.adapter is not None
    untrained = {"objective": None, "num_steps": 0, "seam": a_seam()}
    return build.model_copy(update={"adapter": build.adapter.model_copy(update=untrained)})


def perplexities(rises: bool | None, *values: float, **changes: Any) -> Build:
    """The demo with a word perplexity as its task."""
    build = demo_healed()
    numbers = dict(zip(build.evaluations, values or (410.5, 9_000.25, 502.25), strict=True))
    evaluations = {
        name: evaluation.model_copy(
            update={
                "tasks": (
                    a_score("wiki", numbers[name], chance=None, metric="word_perplexity").model_copy(
                        update={"higher_is_better": rises, "is_share": False, **changes}
                    ),
                )
            }
        )
        for name, evaluation in build.evaluations.items()
    }
    return build.model_copy(update={"evaluations": evaluations, "comparisons": comparisons(evaluations)})


def chosen_by(criterion: str) -> Build:
    """The demo with layers chosen otherwise, measured over all tokens in NF4."""
    build = demo_healed()
    changes: dict[str, Any] = {"criterion": criterion}
    if criterion in ("block-influence", "greedy"):
        changes["dropped"] = (2, 5, 6)
    if criterion in ("loss", "greedy"):
        changes |= {"num_documents": 32, "passes": 9.5}
    if criterion == "greedy":
        changes["order"] = (6, 2, 5)
    nothing = {"distance": None, "runner_up_start": None, "runner_up_distance": None}
    config = build.config | {
        "measure": build.config["measure"] | {"tokens": "all", "four_bit": True},
        "plan": build.config["plan"]
        | ({"layers": build.plan.dropped} if criterion == "chosen" else {"criterion": criterion}),
    }
    return build.model_copy(
        update={"plan": build.plan.model_copy(update=nothing | changes), "config": config}
    )


def of_an_adapter() -> Build:
    """A build of an adapter on the Hub, whose base was a folder."""
    build = unhealed()
    lineage = Lineage(
        adapter=Origin(name="tuned", repo_id="me/tuned", commit="ad" * 20),
        base=Origin(name="base", commit="ba" * 20),
    )
    changes = {"name": "tuned", "repo_id": None, "lineage": lineage, "base_models": ("me/tuned",)}
    source = build.source.model_copy(update=changes)
    return build.model_copy(update={"reference": "me/tuned", "source": source})


def sized(**goal: Any) -> Build:
    """A build whose number of layers follows from a size."""
    build = unhealed()
    found = SizeGoal(num_dropped=9, parameters=5_278_724_096, weight_bytes=10_557_448_192, **goal)
    return build.model_copy(update={"config": build.config | {"size": found.model_dump()}})


def within_budget(seconds: int) -> Build:
    """A build whose amounts of work follow from a time."""
    build = unhealed()
    return build.model_copy(update={"config": build.config | {"budget": seconds}})


def with_a_full_card() -> Build:
    build = demo_healed()
    fields = {
        "license": ("cc-by-nd-4.0", "other"),
        "license_name": "own-1",
        "license_link": "https://a.b/c",
        "base_models": ("org/base", "org/other"),
    }
    return build.model_copy(
        update={
            "source": build.source.model_copy(update=fields),
            "plan": build.plan.model_copy(update={"ties": (4,)}),
            "sink": build.plan.dropped[0],
        }
    )


def without_measurable_loss() -> Build:
    """A healed model whose loss is that of its source, as far as the documents can tell."""
    build = chat_with_other_licence()
    same = a_comparison("loss", -0.001, num_items=1000, test="paired t")
    others = build.comparisons["healed"][1:]
    return build.model_copy(update={"comparisons": {"healed": (same, *others)}})


def an_adapter(**fields: Any) -> Adapter:
    """What a healing says of itself, with some of its facts chosen."""
    values: dict[str, Any] = {
        "objective": "sft",
        "quantization": "nf4",
        "rank": 4,
        "learning_rate": 1e-2,
        "target_modules": ("mlp.up_proj",),
        "num_steps": 12,
        "num_tokens": 1536,
        "sequence_length": 64,
        "num_trainable_parameters": 1,
        "curve": (),
        "guard_loss_before": 3.0,
        "guard_loss_after": 2.5,
        "data": DataSource(name="rhymes", version="1"),
    }
    return Adapter(**values | fields)


def profile_from(sums: Sums) -> DistanceProfile:
    """Unrounded, unlike that of `Sums.profile`."""
    return DistanceProfile(
        num_layers=sums.num_layers,
        num_samples=sums.count,
        sequence_length=12,
        num_tokens=50,
        mean=tuple(map(tuple, sums.distance.mean.tolist())),
        stderr=tuple(map(tuple, sums.distance.stderr.tolist())),
        influence=tuple(sums.influence.mean.tolist()),
        ties=sums.ties(),
        first_norm=tuple(sums.norms.mean[:, 0].tolist()),
        other_norm=tuple(sums.norms.mean[:, 1].tolist()),
        data=DataSource(name="x", version="1"),
    )


def served_elsewhere() -> Build:
    """A build of a family with a window, healed with a share of the next-token loss."""
    build = demo_healed()
    heal = {**build.config["heal"], "next_token_weight": 0.3}
    config = {"model_type": "mistral", "num_hidden_layers": 10, "sliding_window": 4096}
    doubted, *known = verdicts(config, (5, 6, 7))
    doubted = doubted.model_copy(update={"runs": None, "reason": "its tokenizer was not tried there"})
    return build.model_copy(update={"config": {**build.config, "heal": heal}, "runtimes": (doubted, *known)})
