"""The preview says the right numbers, and refuses a build that cannot fit the disk."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.needs import measured, rows
from factory.api.progress import Bars
from factory.artifacts import Source
from factory.config.options import read_duration
from factory.config.request import BuildRequest
from factory.config.settings import BuildConfig, EvaluateSettings, HealSettings, MeasureSettings, settle
from factory.errors import DiskSpaceError, DropError, MachineError, UsageError
from factory.hub import pull
from factory.hub.resolve import resolve
from factory.model.devices import training_processes
from factory.pipeline.build import stages_of
from factory.pipeline.costs.budget import scaled, share_within
from factory.pipeline.costs.pace import (
    BYTES_PER_TOKEN,
    HELD_OUT_PASSES,
    STAGE_SECONDS,
    START_SECONDS,
    Machine,
    num_starts,
    stage_seconds,
    this_machine,
    too_short,
)
from factory.pipeline.costs.preview import preview
from factory.pipeline.costs.probe import Pace, pace_of
from factory.pipeline.costs.requirements import (
    Needs,
    check_healing,
    check_memory,
    experts_of,
    healing_bytes,
    needs,
)
from factory.pipeline.prepare import prepare
from factory.store.capacity import demands
from factory.text.overlap import NONE, Contents
from tests.builders.models import save_llama
from tests.builders.texts import rhymes

STAGES = stages_of(BuildConfig(reference="m", drop=0.3))
SOURCE = Source(
    name="m",
    commit="0" * 40,
    folder=Path(),
    model_type="llama",
    architecture="LlamaForCausalLM",
    config={"model_type": "llama", "hidden_size": 64},
    num_layers=10,
    num_parameters=1_200,
    layer_parameters=(100,) * 10,
    size_bytes=2_400,
    layer_bytes=(200,) * 10,
    vocab_size=10,
    dtype="bfloat16",
)


def preview_of(source: Source = SOURCE, *, drop: float = 0.3, **options: Any) -> Any:
    return preview(source, BuildConfig(reference="m", drop=drop), **options)


def test_three_of_ten_equal_layers_take_three_tenths_of_their_share(tmp_path: Path) -> None:
    shown = preview_of(pending=(), home=tmp_path)
    assert (shown.num_dropped, shown.parameters_after, shown.bytes_after) == (3, 900, 1_800)
    assert (shown.disk_needed, shown.seconds, shown.device) == (0, 0.0, "")


def test_work_that_is_left_needs_disk_memory_and_time(tmp_path: Path) -> None:
    everything = preview_of(pending=STAGES, home=tmp_path / "not" / "there")
    nearly_done = preview_of(pending=("speed", "card"), home=tmp_path)
    assert everything.disk_needed > 2 * 1_800
    assert everything.memory_needed == everything.host_needed > (1_200 + 900) * 4
    assert everything.seconds > nearly_done.seconds > 0
    assert everything.device.startswith("CPU")


@pytest.mark.parametrize(
    ("changes", "runs"),
    [
        ({}, "measure plan prune heal merge evaluate speed card"),
        ({"heal_enabled": False}, "measure plan prune evaluate speed card"),
        ({"heal_enabled": False, "heal": {"start": "seam-fit"}}, STAGES),
        ({"plan": {"criterion": "greedy"}}, "measure search prune heal merge evaluate speed card"),
        ({"plan": {"criterion": "loss", "layers": [2, 3]}}, STAGES),
    ],
)
def test_only_stages_that_a_build_runs_are_listed(changes: dict[str, Any], runs: str | tuple[str]) -> None:
    config = BuildConfig.model_validate({"reference": "m", "drop": 0.3, **changes})
    assert stages_of(config) == (tuple(runs.split()) if isinstance(runs, str) else runs)


PACE = Machine("CPU", 0, 1e6)  # FLOP/s that make the usual amounts take days
USUAL = BuildConfig(reference="m", drop=0.3, evaluate=EvaluateSettings(tasks=("boolq",)))


def estimated(config: BuildConfig, home: Path) -> float:
    shown: Any = preview(SOURCE, config, pending=STAGES, home=home, machine=ROOMY)
    return float(shown.seconds)


ROOMY = Machine("CPU", 0, 1e6, disk_bytes=10**12)


@pytest.mark.parametrize("minutes", [70, 300, 2_000])
def test_a_budget_is_met_by_the_estimate_and_used(tmp_path: Path, minutes: int) -> None:
    budget = 60 * minutes
    assert estimated(USUAL, tmp_path) > budget
    share = share_within(SOURCE, USUAL, budget=budget, machine=PACE, pending=STAGES)
    assert 0.9 * budget < estimated(scaled(USUAL, share), tmp_path) <= budget


def test_a_budget_leaves_alone_what_is_within_it_and_what_was_given(tmp_path: Path) -> None:
    assert share_within(SOURCE, USUAL, budget=10**9, machine=PACE, pending=STAGES) == 1
    assert scaled(USUAL, 1) == USUAL
    less = scaled(USUAL, 0.01, kept=["heal_steps", "limit"])
    assert (less.heal.num_steps, less.evaluate.limit) == (USUAL.heal.num_steps, None)
    assert (less.evaluate.num_documents, less.measure.max_samples) == (16, 64)
    assert scaled(USUAL, 0.001).heal.warmup_steps == 2  # of 20


def test_a_budget_below_the_least_work_is_refused_with_one_that_is_enough() -> None:
    with pytest.raises(UsageError, match="even the least work takes about") as refused:
        share_within(SOURCE, USUAL, budget=60, machine=PACE, pending=STAGES)
    enough = read_duration(refused.value.hint.partition("`budget=")[2].partition("`")[0])
    assert share_within(SOURCE, USUAL, budget=enough, machine=PACE, pending=STAGES) < 0.01


@pytest.mark.parametrize("typed", ["30", "half an hour", "-3h", "0min", "1e3s", "nan h"])
def test_a_budget_that_is_no_duration_is_refused(typed: str) -> None:
    with pytest.raises(UsageError, match="is not a duration"):
        BuildRequest.read({"model": "owner/name", "drop": 0.3, "budget": typed})


def test_the_same_command_goes_on_with_the_amounts_that_were_found_first(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": rhyme}) + "\n" for rhyme in rhymes(40)))
    asked = {
        "model": str(save_llama(tmp_path / "tiny")),
        "drop": 0.3,
        "home": str(tmp_path / "home"),
        "budget": "20h",
        "report_to": "none",
        **dict.fromkeys(("heal_data", "calibration_data", "eval_data"), str(text)),
    }
    request = BuildRequest.read(asked)
    prepare([request], Bars(), dry_run=True)
    assert not (tmp_path / "home").exists()
    prepare([request], Bars())
    (kept,) = (tmp_path / "home" / "budgets").iterdir()
    kept.write_text("0.25\n")
    (again,) = prepare([request], Bars())
    usual = settle(request, again.settled.source)
    assert again.settled.config.heal.num_steps == usual.heal.num_steps // 4
    assert again.settled.config.budget == 20 * 3600


def test_a_model_that_is_not_here_yet_has_to_be_downloaded(tmp_path: Path) -> None:
    elsewhere = SOURCE.model_copy(update={"folder": None})
    assert preview_of(elsewhere, pending=("speed",), home=tmp_path).download_bytes == 2_400
    assert preview_of(elsewhere, pending=(), home=tmp_path).download_bytes == 0


def test_what_an_earlier_download_left_whole_needs_no_disk_again(tmp_path: Path) -> None:
    elsewhere = SOURCE.model_copy(update={"folder": None})
    begun = elsewhere.model_copy(update={"cached_bytes": 1_000})
    first, second = (preview_of(source, pending=("speed",), home=tmp_path) for source in (elsewhere, begun))
    assert second.download_bytes == 1_400
    assert first.disk_needed - second.disk_needed == 1_000


def test_a_model_that_no_memory_here_holds_is_refused_before_anything_is_downloaded(tmp_path: Path) -> None:
    sizes = {"num_parameters": 10**15, "layer_parameters": (10**14,) * 10, "folder": None}
    with pytest.raises(MachineError, match=r"needs about 6800\.\d TB of memory, but this machine has"):
        preview_of(SOURCE.model_copy(update=sizes), pending=("speed", "card"), home=tmp_path)


def test_what_does_not_fit_the_gpu_needs_the_hosts_memory_as_well() -> None:
    needed = Needs(disk=0, host=4 * 10**9, gpu=30 * 10**9)
    check_memory(needed, host_total=12 * 10**9, gpu_total=24 * 10**9)
    with pytest.raises(MachineError, match=r"about 10\.0 GB of memory besides 24\.0 GB on the GPU"):
        check_memory(needed, host_total=8 * 10**9, gpu_total=24 * 10**9)


LAYER_70B, OUTSIDE_70B = 855_654_400, 524_296_192
LLAMA_70B = SOURCE.model_copy(
    update={
        "config": {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672},
        "num_layers": 80,
        "num_parameters": 80 * LAYER_70B + OUTSIDE_70B,
        "layer_parameters": (LAYER_70B,) * 80,
        "vocab_size": 32000,
    }
)


def test_a_rented_gpu_that_cannot_hold_the_healing_is_refused_before_it_is_paid_for(tmp_path: Path) -> None:
    rented = Machine("A10G", memory_bytes=24 * 10**9, flops_per_second=1e13, disk_bytes=10**13)
    with pytest.raises(MachineError, match=r"healing by sft needs about .* but there are only 24\.0 GB"):
        preview_of(LLAMA_70B, pending=("heal",), home=tmp_path, machine=rented)


def test_only_gpus_that_share_a_step_evenly_are_counted_on() -> None:
    assert [training_processes(asked, batch_size=16) for asked in (1, 2, 3, 7, 8)] == [1, 2, 2, 4, 8]


def test_a_teacher_takes_time_as_well(tmp_path: Path) -> None:
    seconds = {
        objective: preview(
            LLAMA_70B,
            BuildConfig(reference="m", drop=0.4, heal=HealSettings(objective=objective)),
            pending=("heal",),
            home=tmp_path,
            machine=Machine("H100", memory_bytes=10**12, flops_per_second=1e14, disk_bytes=10**13),
        ).seconds
        for objective in ("sft", "distill")
    }
    # Two operations a weight of the whole source, beside six of what is left of it.
    assert seconds["distill"] / seconds["sft"] == pytest.approx(1 + 2 / (6 * 0.6), abs=0.05)


@pytest.mark.parametrize(("length", "passes"), [(64, 1), (250_000, 250_000 / 64)])
def test_a_long_document_is_read_to_its_end_when_evaluated_and_only_begun_when_measured(
    tmp_path: Path, length: int, passes: float
) -> None:
    held = Contents(NONE, num_documents=20, num_bytes=20 * int(length * BYTES_PER_TOKEN), num_empty=0)
    config = BuildConfig(
        reference="m",
        drop=0.4,
        heal_enabled=False,
        measure=MeasureSettings(num_samples=16, sequence_length=64),
        evaluate=EvaluateSettings(data=("a.txt",), num_documents=16, sequence_length=64, tasks=()),
    )

    def seconds(stage: str, **known: Contents) -> float:
        machine = Machine("H100", memory_bytes=10**12, flops_per_second=1e5, disk_bytes=10**13)
        shown = preview(LLAMA_70B, config, pending=(stage,), home=tmp_path, machine=machine, **known)
        return shown.seconds - START_SECONDS - STAGE_SECONDS

    assert seconds("measure", calibration=held) == pytest.approx(seconds("measure"))
    # Loading the model does not depend on the text.
    assert seconds("evaluate", evaluations=(held,)) == pytest.approx(seconds("evaluate") * passes, rel=1e-3)


def test_a_text_of_fewer_documents_than_asked_for_takes_no_longer_than_it_has(tmp_path: Path) -> None:
    machine = Machine("H100", memory_bytes=10**12, flops_per_second=1e5, disk_bytes=10**13)
    config = BuildConfig(reference="m", drop=0.4, heal_enabled=False, evaluate=EvaluateSettings(tasks=()))
    tokens = config.evaluate.sequence_length * BYTES_PER_TOKEN
    seconds = [
        preview(
            LLAMA_70B, config, pending=("evaluate",), home=tmp_path, machine=machine, evaluations=(held,)
        ).seconds
        for held in (
            Contents(NONE, num_documents=100, num_bytes=int(100 * tokens), num_empty=0),
            Contents(NONE, num_documents=100, num_bytes=int(100 * tokens), num_empty=0, is_whole=False),
        )
    ]
    few, all_asked = (second - START_SECONDS - STAGE_SECONDS for second in seconds)
    assert all_asked == pytest.approx(few * config.evaluate.num_documents / 100, rel=1e-3)


def test_the_pace_of_a_model_is_timed_once_and_decides_the_estimate(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    source = resolve(str(tmp_path / "model"))
    config = BuildConfig(reference="m", drop=0.5, heal=HealSettings(rank=4, num_steps=10))
    assert pace_of(source, config, home=tmp_path / "home") is not None  # where nothing is kept
    (tmp_path / "home").mkdir()
    pace = Pace(layer=1e-3, head=1e-2, trained_layer=2e-3, trained_head=3e-2, update=0.1)
    machine = Machine("CPU", 0, 1.0, disk_bytes=10**12, pace=pace)
    shown = preview(source, config, pending=("heal",), home=tmp_path, machine=machine)
    heal = config.heal
    tokens = heal.num_steps * heal.batch_size * heal.sequence_length
    held_out = HELD_OUT_PASSES * (tokens // 20)
    expected = tokens * (2 * 2e-3 + 3e-2) + 10 * 2 * 0.1 + held_out * (2 * 1e-3 + 1e-2)
    assert shown.stage_seconds["heal"] == pytest.approx(expected, rel=1e-3)


def test_passes_that_others_disturbed_make_no_estimate_longer_than_products_do() -> None:
    config = BuildConfig(reference="m", drop=0.5, heal=HealSettings(rank=4, num_steps=10))

    def seconds(pace: Pace | None) -> dict[str, float]:
        machine = Machine("CPU", 0, 1e3, pace=pace)
        return stage_seconds(SOURCE, config, STAGES, machine=machine, calibration=None, evaluations=())

    slow = Pace(layer=1e3, head=1e3, trained_layer=1e3, trained_head=1e3, update=1e3, settled=False)
    quick = Pace(layer=1e-3, head=0, trained_layer=1e-3, trained_head=0, update=0, settled=False)
    assert seconds(slow) == seconds(None)
    assert seconds(quick) == seconds(replace(quick, settled=True))


def test_nothing_is_timed_for_work_of_a_few_seconds(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    source = resolve(str(tmp_path / "model"))
    config = BuildConfig(reference="m", drop=0.5, heal_enabled=False)
    little, much = (
        this_machine(source, config, processes=1, flop=flop, home=tmp_path) for flop in (1e9, 1e15)
    )
    assert little.pace is None
    assert much.pace is not None


@pytest.mark.parametrize("processes", [2, 8])
def test_work_is_divided_where_that_saves_more_than_starting_processes_takes(processes: int) -> None:
    config = BuildConfig(reference="m", drop=0.5, heal=HealSettings(rank=4, num_steps=1000))
    for speed in (1e-9, 1e-8, 1e-7, 1e-6, 1e-5):
        pace = Pace(layer=speed, head=speed, trained_layer=speed, trained_head=speed, update=0)
        alone, divided = (
            stage_seconds(SOURCE, config, STAGES, machine=machine, calibration=None, evaluations=())
            for machine in (Machine("GPU", 0, 1.0, pace=pace, processes=n) for n in (1, processes))
        )
        short = too_short(config, divided, processes=processes)
        assert all(divided[stage] <= alone[stage] for stage in STAGES)
        assert all((divided[stage] == alone[stage]) == (stage in short) for stage in num_starts(config))
    assert too_short(config, alone, processes=1) == frozenset()
    assert not short


def test_a_model_too_large_to_be_timed_is_estimated_by_its_operations(tmp_path: Path) -> None:
    config = BuildConfig(reference="m", drop=0.4, heal_enabled=False)
    assert pace_of(LLAMA_70B, config, home=tmp_path) is None


def healing_of(**fields: Any) -> BuildConfig:
    heal = {"objective": "sft", "rank": 8, "sequence_length": 4096, **fields}
    return BuildConfig(reference="m", drop=0.4, heal=HealSettings.model_validate(heal))


def test_healing_that_does_not_fit_the_gpu_is_refused_with_the_flags_that_do() -> None:
    check_healing(LLAMA_70B, healing_of(), gpu_total=40 * 10**9)
    default = {"objective": "distill", "modules": "all-linear", "rank": 128}
    with pytest.raises(MachineError, match=r"healing by distill needs about 60\.\d GB of GPU") as caught:
        check_healing(LLAMA_70B, healing_of(**default), gpu_total=42_300_000_000)
    assert caught.value.hint.startswith("`heal_rank=8` `heal_modules=ffn` `heal_layers=seam` takes about 4")
    with pytest.raises(MachineError, match=r"there are only 32\.0 GB") as caught:
        check_healing(LLAMA_70B, healing_of(**default), gpu_total=32 * 10**9)
    assert caught.value.hint.startswith("`heal=sft` `heal_rank=8` `heal_modules=ffn` takes about 2")
    with pytest.raises(MachineError) as caught:
        check_healing(LLAMA_70B, healing_of(**default, bits=16), gpu_total=16 * 10**9)
    assert "`no_heal`" in caught.value.hint


@pytest.mark.parametrize(
    ("fields", "took"),
    [
        ({"sequence_length": 2 * 4096}, 33.4e9),
        ({"objective": "distill", "layers": "seam", "sequence_length": 4096}, 39.9e9),
        ({"objective": "distill", "layers": "seam", "sequence_length": 2048}, 38.5e9),
        ({"objective": "distill", "sequence_length": 1024}, 38.6e9),
    ],
)
def test_the_memory_of_healing_is_estimated_within_a_tenth(fields: dict[str, Any], took: float) -> None:
    """What a 70B shape without 32 layers took on an H100, with so many tokens a pass."""
    assert healing_bytes(LLAMA_70B, healing_of(**fields)) == pytest.approx(took, rel=0.1)


def test_experts_that_are_one_parameter_count_in_sixteen_bits() -> None:
    """Mixtral 8x7B: 45.1 of its 46.7 G parameters; NF4 leaves them as they are."""
    layer = 8 * 3 * 4096 * 14336
    fields = {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "vocab_size": 32000}
    attention = 2 * 4096 * (4096 + 1024)
    mixtral = SOURCE.model_copy(
        update={
            "config": {"model_type": "mixtral", "num_hidden_layers": 32, **fields},
            "num_layers": 32,
            "num_parameters": 32 * (layer + attention) + 2 * 32000 * 4096,
            "layer_parameters": (layer + attention,) * 32,
        }
    )
    experts, of_rank_1 = experts_of(mixtral)
    assert experts == 32 * layer
    assert of_rank_1 == 32 * 8 * (4096 + 2 * 14336 + 14336 + 4096)
    adapter = 16 * 8 * of_rank_1 * 19 / 32  # bytes in training, of rank 8 on the 19 layers that stay
    took = healing_bytes(mixtral, healing_of())
    assert took == pytest.approx(2 * experts * 19 / 32 + adapter + 2 * 2 * layer, rel=0.1)
    assert healing_bytes(mixtral, healing_of(objective="distill")) > took + 2 * experts * 12 / 32


def test_known_builds_are_estimated_within_a_quarter() -> None:
    """Mistral's shape on an H100: 28.5 GB in the speed comparison, 3.7 GB of the host; on random weights."""
    layers, outside = 218_112_000, 262_148_096
    mistral = SOURCE.model_copy(
        update={
            "config": {"hidden_size": 4096, "intermediate_size": 14336},
            "num_layers": 32,
            "num_parameters": 32 * layers + outside,
            "layer_parameters": (layers,) * 32,
            "size_bytes": 2 * (32 * layers + outside),
            "vocab_size": 32000,
        }
    )
    after = 22 * layers + outside
    needed = needs(
        mistral,
        BuildConfig(reference="m", drop=0.3),
        pending=STAGES,
        parameters_after=after,
        bytes_after=2 * after,
        on_gpu=True,
    )
    assert needed.gpu == pytest.approx(28.5e9, rel=0.25)
    assert needed.host == pytest.approx(3.7e9, rel=0.25)


@pytest.mark.parametrize(("steps", "took"), [(4, 281e6), (8, 408e6), (12, 505e6)])
def test_the_disk_of_a_short_heal_is_estimated_within_a_quarter(steps: int, took: float) -> None:
    """A Llama of 26 M parameters without 10 of 32 layers, on a CPU (benchmarks/needs.py)."""
    layers, outside = 737_792, 2_097_408
    source = SOURCE.model_copy(
        update={
            "config": {"hidden_size": 256, "intermediate_size": 704},
            "num_layers": 32,
            "num_parameters": 32 * layers + outside,
            "layer_parameters": (layers,) * 32,
            "size_bytes": 2 * (32 * layers + outside),
            "vocab_size": 8192,
        }
    )
    heal = HealSettings(
        objective="distill", modules="all-linear", rank=128, num_steps=steps, sequence_length=128
    )
    after = 22 * layers + outside
    needed = needs(
        source,
        BuildConfig(reference="m", drop=0.3, heal=heal),
        pending=STAGES,
        parameters_after=after,
        bytes_after=2 * after,
        on_gpu=False,
    )
    assert needed.disk == pytest.approx(took, rel=0.25)


def test_a_large_vocabulary_needs_room_for_its_logits_on_a_gpu() -> None:
    layers, outside = 15_730_000, 155_600_000  # Qwen3-0.6B's shape
    qwen = SOURCE.model_copy(
        update={
            "config": {"hidden_size": 1024, "intermediate_size": 3072},
            "num_layers": 28,
            "num_parameters": 28 * layers + outside,
            "layer_parameters": (layers,) * 28,
            "vocab_size": 151_936,
        }
    )
    after = 20 * layers + outside
    settings = BuildConfig(reference="m", drop=0.3)
    options = {"parameters_after": after, "bytes_after": 2 * after, "on_gpu": True}
    whole, merged = (needs(qwen, settings, pending=left, **options) for left in (STAGES, ("speed", "card")))
    logits = settings.evaluate.sequence_length * qwen.vocab_size
    assert whole.gpu > 2 * qwen.num_parameters + 4 * 2 * logits > merged.gpu


def test_a_build_takes_what_was_said_within_a_quarter(tmp_path: Path) -> None:
    quick = "--samples 4 --heal-steps 2 --tasks none --eval-documents 2 --sequence-length 128"
    estimate, peak = measured(["demo", "--drop", "0.3", *quick.split()], tmp_path)
    for name, said, took in rows(estimate, peak):
        assert said == pytest.approx(took, rel=0.25), name


def test_where_bitsandbytes_does_not_work_it_is_said_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)  # as if it were not installed
    with pytest.raises(MachineError, match="bitsandbytes cannot quantise to 4 bits on cpu") as caught:
        preview_of(pending=STAGES, home=tmp_path)
    assert "`no_heal`" in caught.value.hint


OTHER_DISK = Path("/dev/not/there")  # no file system of a test's folder


def test_what_goes_to_one_file_system_is_counted_together(tmp_path: Path) -> None:
    here, there = demands(
        [
            (tmp_path / "stages", "--home", 3),
            (OTHER_DISK / "hub", "HF_HOME", 5),
            (tmp_path / "not" / "there", "--out", 7),
            (OTHER_DISK, "--out", 11),
        ]
    )
    assert (here.place, here.option, here.needed) == (str(tmp_path / "stages"), "--home", 10)
    assert (there.place, there.option, there.needed) == (str(OTHER_DISK / "hub"), "HF_HOME", 16)
    assert here.free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert there.free == shutil.disk_usage("/dev").free


def test_each_disk_is_asked_for_what_it_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = SOURCE.model_copy(update={"folder": None})
    together = preview_of(elsewhere, pending=STAGES, home=tmp_path, out=tmp_path / "out")
    monkeypatch.setattr(pull, "HF_HUB_CACHE", str(OTHER_DISK / "hub"))
    apart = preview_of(elsewhere, pending=STAGES, home=tmp_path, out=OTHER_DISK / "out")
    assert together.other_disks == ()
    assert together.disk_needed == apart.disk_needed + 2_400
    (other,) = apart.other_disks
    assert other.needed == 2_400 + apart.bytes_after  # the build shares no bytes with stages elsewhere
    huge = SOURCE.model_copy(update={"size_bytes": 10**18, "layer_bytes": (10**17,) * 10, "folder": None})
    with pytest.raises(DiskSpaceError, match=rf"is needed at {OTHER_DISK}/hub, .* is free") as caught:
        preview_of(huge, drop=0.8, pending=("speed", "card"), home=tmp_path)
    assert "HF_HOME" in caught.value.hint


def test_too_little_disk_is_refused_with_both_figures(tmp_path: Path) -> None:
    huge = SOURCE.model_copy(update={"size_bytes": 10**18, "folder": None})
    with pytest.raises(
        DiskSpaceError, match=r"4000000\.0 TB of disk space is needed at .*, [\d.]+ [GT]B is free"
    ) as caught:
        preview_of(huge, pending=STAGES, home=tmp_path)
    assert "factory gc" in caught.value.hint


def test_a_model_of_two_layers_is_not_told_to_drop_nothing(tmp_path: Path) -> None:
    small = SOURCE.model_copy(update={"num_layers": 2})
    with pytest.raises(DropError) as caught:
        preview_of(small, drop=0.5, pending=(), home=tmp_path)
    assert "`drop=0" not in caught.value.hint


def test_a_cut_that_leaves_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DropError, match="leaves 1"):
        preview_of(drop=0.9, pending=(), home=tmp_path)
