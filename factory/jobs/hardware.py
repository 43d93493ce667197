"""Hardware of Hugging Face Jobs: machines, prices, and what fits on them."""

import re
import sys
from dataclasses import dataclass

from huggingface_hub import JobHardwareInfo

from factory.config.options import SECONDS
from factory.errors import ModelError, UsageError
from factory.gpus import peak_flops
from factory.hub.client import hub_api, patiently
from factory.hub.errors import hub_errors, no_hub
from factory.pipeline.costs.pace import Machine
from factory.units import size

CPU_FLOPS = 2e11  # per core, at most: two AVX-512 units at 3 GHz
OF_PEAK = 1 / 3  # share of the peak that whole models reach
UNITS = {"second": 1, "minute": 60, "hour": 3600}


@dataclass(frozen=True)
class Flavor:
    """A machine for rent."""

    name: str  # "a100-large"
    title: str  # "Nvidia A100 - large"
    machine: Machine
    peak_flops: float | None  # per second, all GPUs together; None if unknown
    dollars_per_second: float | None  # None if the Hub gives no readable price
    has_gpu: bool = True

    def price(self, seconds: float) -> str:
        """Return the price of so many seconds, as text."""
        if self.dollars_per_second is None:
            return "not known"
        dollars = seconds * self.dollars_per_second
        return f"${dollars:.2f}" if dollars >= 0.01 else "less than $0.01"


def flavor(name: str) -> Flavor:
    """Return the machine of that name.

    Raises:
        UsageError: The name is unknown; the hint lists the machines.
    """
    with hub_errors("the hardware of Jobs"):
        offered = {h.name: h for h in patiently(lambda: hub_api().list_jobs_hardware())}
    if not offered:
        raise no_hub()
    if name not in offered:
        listed = ", ".join(f"{h.name} (${h.unit_cost_usd * 60:.2f}/h)" if h.unit_label == "minute" else h.name
                           for h in offered.values())  # fmt: skip
        raise UsageError(f"`on={name!r}` is not hardware of Hugging Face Jobs", hint=f"choose from: {listed}")
    return _flavor(offered[name])


def _flavor(hardware: JobHardwareInfo) -> Flavor:
    gpu, unit = hardware.accelerator, UNITS.get(hardware.unit_label)
    number = int(gpu.quantity) if gpu else 1
    cores = re.match(r"\d+", hardware.cpu)
    peak = peak_flops(gpu.model) if gpu else CPU_FLOPS * int(cores[0] if cores else 1)
    whole = number * peak if peak else None
    device = hardware.pretty_name if gpu else f"CPU, {hardware.cpu}"
    memory = _bytes(gpu.vram if gpu else hardware.ram)
    rate = (whole or CPU_FLOPS) * OF_PEAK
    disk = _bytes(hardware.ephemeral_storage) or sys.maxsize
    machine = Machine(device, memory, rate, disk, _bytes(hardware.ram))
    price = hardware.unit_cost_usd / unit if unit else None
    return Flavor(hardware.name, hardware.pretty_name, machine, whole, price, has_gpu=gpu is not None)


def _bytes(text: str) -> int:
    """Parse a size: "80 GB" → 80e9; 0 for any other format."""
    match = re.fullmatch(r"([\d.]+)\s*([MGT])i?B", text.strip())
    return int(float(match[1]) * {"M": 1e6, "G": 1e9, "T": 1e12}[match[2]]) if match else 0


def parse_timeout(text: str) -> int:
    """Parse "90m", "6h", "1d" or a number of seconds into seconds.

    Raises:
        UsageError: The text has another form, or is less than a second.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", text.strip())
    seconds = int(float(match[1]) * SECONDS[match[2] or "s"]) if match else 0
    if seconds < 1:
        raise UsageError(f"`timeout={text}` is not a duration", hint="`timeout=90m`, 6h or 1d")
    return seconds


def check_fits(found: Flavor, memory_needed: int) -> None:
    """Refuse a machine that is too small.

    Raises:
        ModelError: The build needs more memory than the machine has.
    """
    available = found.machine.memory_bytes
    if available and memory_needed > available:
        raise ModelError(
            f"the build needs about {size(memory_needed)} of memory, and {found.name} has {size(available)}",
            hint="choose larger hardware, or `load_in_4bit` for the measurement",
        )
