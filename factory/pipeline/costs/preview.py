"""Preview what a build will do and need, before any heavy work."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from factory.artifacts import Source
from factory.config.settings import BuildConfig, num_dropped
from factory.hub.pull import cache_demand
from factory.pipeline.costs.pace import START_SECONDS, Machine, is_cpu, stage_seconds, this_machine
from factory.pipeline.costs.requirements import (
    Needs,
    check_four_bit,
    check_healing,
    check_memory,
    check_seam,
    healing_processes,
    needs,
)
from factory.pruning.sizes import left_about
from factory.store.capacity import Demand, check_room, demands
from factory.store.locks import HOME
from factory.text.overlap import Contents


@dataclass(frozen=True)
class Preview:
    """A build in numbers: sizes in bytes, and an estimate in seconds of the stages still to run."""

    num_layers: int
    num_dropped: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    pending: tuple[str, ...]
    download_bytes: int
    disk_needed: int  # on the disk of the stages
    disk_free: int
    other_disks: tuple[Demand, ...]  # disks of the Hub's cache and of the build, if others
    memory_needed: int  # minimum over all GPUs together, or of the host without one
    memory_total: int
    host_needed: int
    host_total: int
    device: str
    stage_seconds: dict[str, float]  # of the stages still to run

    @property
    def seconds(self) -> float:
        """Return the time of the whole build."""
        return START_SECONDS + sum(self.stage_seconds.values()) if self.stage_seconds else 0.0


def preview(
    source: Source,
    config: BuildConfig,
    *,
    pending: Sequence[str],
    home: Path,
    out: Path | None = None,
    processes: int = 1,
    machine: Machine | None = None,
    calibration: Contents | None = None,
    evaluations: Sequence[Contents] = (),
) -> Preview:
    """Compute the preview of a build; imports torch only if there is something to run.

    Assumes layers of mean size, since the layers to drop are known only after measuring.

    Args:
        home: Folder of the stages.
        out: Folder of the build; None assumes the disk of the stages.
        machine: Machine to run on; None is this one.
        calibration: Known facts about the calibration documents; None assumes full sequences.
        evaluations: Known facts about each evaluation text's documents, all of whose windows are read.

    Raises:
        DropError: The fraction does not give a usable number of layers.
        DiskSpaceError: There is too little disk space for the stages still to run.
        MachineError: There is too little memory here, or bitsandbytes or torch lacks a required feature.
        UnsupportedArchitectureError: The model has no modules that healing could adapt.
    """
    n = num_dropped(config.drop, source.num_layers)
    parameters_after, bytes_after = left_about(source, n)
    is_here = machine is None
    seconds_on = partial(
        stage_seconds, source, config, pending, calibration=calibration, evaluations=evaluations
    )
    if machine is None:
        flop = sum(seconds_on(machine=Machine("CPU", 0, 1.0)).values()) if pending else None
        machine = this_machine(source, config, processes=processes, flop=flop, home=home)
    device = machine.device
    needed = needs(
        source,
        config,
        pending=pending,
        parameters_after=parameters_after,
        bytes_after=bytes_after,
        on_gpu=not is_cpu(device),
    )
    download = source.download_bytes if pending else 0
    if is_here:
        wanted = [(home, HOME, needed.disk)]
        if pending:
            wanted += [cache_demand(source), *_copies(bytes_after, home=home, out=out)]
        disk, *others = demands(wanted)
    else:
        disk, others = Demand(str(home), HOME, needed.disk + download, machine.disk_bytes), []
    result = Preview(
        num_layers=source.num_layers,
        num_dropped=n,
        parameters_before=source.num_parameters,
        parameters_after=parameters_after,
        bytes_before=source.size_bytes,
        bytes_after=bytes_after,
        pending=tuple(pending),
        download_bytes=download,
        disk_needed=disk.needed,
        disk_free=disk.free,
        other_disks=tuple(others),
        memory_needed=needed.gpu or needed.host,
        memory_total=machine.memory_bytes,
        host_needed=needed.host,
        host_total=machine.host_bytes,
        device=device,
        stage_seconds=seconds_on(machine=machine),
    )
    check_room([disk, *others])
    if is_here:
        _check_here(config, pending, needed, machine)
    if "heal" in pending and config.fits_seam:
        check_seam(source, config)
    if "heal" in pending and config.heal_enabled:
        sharers = 1
        if is_here:
            sharers = _sharers(source, config, processes=processes, pruned_parameters=parameters_after)
        if not source.remote_code:
            from factory.healing.lora import check_targets

            check_targets(source.config, config.heal.modules)
        if needed.gpu and machine.memory_bytes:
            check_healing(source, config, gpu_total=machine.memory_bytes * sharers)
    return result


def _copies(size_bytes: int, *, home: Path, out: Path | None) -> list[tuple[Path, str, int]]:
    """Return the build's own demand for disk: none on the disk of the stages, whose files it links."""
    if out is None or len(demands([(home, HOME, 1), (out, "`out`", 1)])) == 1:
        return []
    return [(out, "`out`", size_bytes)]


def _check_here(config: BuildConfig, pending: Sequence[str], needed: Needs, machine: Machine) -> None:
    """Refuse a build for which this machine has too little memory, or no working quantisation."""
    gpu_total = machine.memory_bytes if needed.gpu else 0
    check_memory(needed, host_total=machine.host_bytes, gpu_total=gpu_total)
    heals = "heal" in pending and config.has_adapter and config.heal.bits == 4
    if heals or ("measure" in pending and config.measure.four_bit):
        from factory.model.devices import best_device

        check_four_bit(best_device())


def _sharers(source: Source, config: BuildConfig, *, processes: int, pruned_parameters: int) -> int:
    """Return the number of GPUs that share one copy of the model in training: 1 if it fits on one GPU."""
    number, divided = healing_processes(
        source, config, processes=processes, pruned_parameters=pruned_parameters
    )
    return number if divided else 1
