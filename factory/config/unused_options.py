"""Name the given options that a run does not read, so that none is ignored silently."""

from collections.abc import Mapping

from factory.config.criteria import CRITERIA
from factory.config.options import HEALING
from factory.config.request import BuildRequest, Request
from factory.config.settings import BuildConfig

READ_BY_A_FIT = ("heal_data", "heal_bits")  # of the seam, without training
READ_BY_TASKS = ("limit", "eval_backend", "apply_chat_template", "run_task_code")


def unread(request: Request, config: BuildConfig) -> list[str]:
    """Return one line for each reason why given options have no effect with these settings."""
    lines = []
    for reason, names in _unread(request, config).items():
        if found := [f"`{name}`" for name in request.given if name in names]:
            verb = "has" if len(found) == 1 else "have"
            lines.append(f"{' and '.join(found)} {verb} no effect: {reason}")
    return lines


def _unread(request: Request, config: BuildConfig) -> Mapping[str, tuple[str, ...]]:
    """Return the names of the options that are not read, by reason."""
    found: dict[str, tuple[str, ...]] = {}
    if isinstance(request, BuildRequest) and not config.heal_enabled:
        read = ("no_heal", "heal_start", *(READ_BY_A_FIT if config.fits_seam else ()))
        healing = [name for name, (_, option) in request.options().items() if option.group == HEALING]
        skipped = "`no_heal` skips training" if config.fits_seam else "`no_heal` skips healing"
        found[skipped] = tuple(name for name in healing if name not in read)
    if not config.evaluate.tasks:
        found["no tasks are run"] = READ_BY_TASKS
    criterion = getattr(request, "criterion", None) or config.plan.criterion
    if config.plan.layers:
        found["`layers` chooses without a text"] = ("plan_documents",)
    elif criterion in CRITERIA and not CRITERIA[criterion].searches:
        found[f"`criterion={criterion}` measures no loss"] = ("plan_documents",)
    return found
