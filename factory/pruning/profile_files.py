"""Angular distances from a file: ours, or a CSV of PruneMe."""

import csv
import math
from pathlib import Path

from factory.artifacts import DataSource, DistanceProfile, Source
from factory.errors import DataError, StoreError

PRUNEME = ("block_start", "block_end", "average_distance")  # columns of its CSV


def read_profile(path: Path, *, source: Source) -> DistanceProfile:
    """Read a profile of ours (`profile.json`, or the folder it lies in), or PruneMe's CSV.

    Raises:
        DataError: No such file, another format, or a profile of another model.
    """
    file = path / DistanceProfile.file_name if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"there is no profile at {str(path)!r}", hint="give a profile.json, or a CSV of PruneMe"
        )
    profile = _read_pruneme(file, source=source) if file.suffix == ".csv" else _read_ours(file)
    if profile.num_layers != source.num_layers:
        raise DataError(
            f"{path} is of a model with {profile.num_layers} layers; {source.name} has {source.num_layers}",
            hint="measure this model, without `profile`",
        )
    if profile.source_commit not in (None, source.commit):
        raise DataError(
            f"{path} is of another model or revision: commit {str(profile.source_commit)[:12]}, "
            f"not {source.commit[:12]}",
            hint="measure this one, without `profile`",
        )
    return profile


def _read_ours(file: Path) -> DistanceProfile:
    try:
        profile = DistanceProfile.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, StoreError) as error:
        raise DataError(
            f"cannot read {file} as a profile: {str(error).splitlines()[0]}",
            hint="give a profile.json as `factory plan --save` writes it, or a CSV of PruneMe",
        ) from error
    size = profile.num_layers + 1
    values = [value for rows in (profile.mean, profile.stderr) for row in rows for value in row]
    square = all(len(rows) == size == len(row) for rows in (profile.mean, profile.stderr) for row in rows)
    if not square or len(profile.influence or range(size - 1)) != size - 1:
        raise DataError(f"{file} is not {size} by {size} distances", hint="the file is damaged")
    if not all(math.isnan(value) or 0 <= value <= 1 for value in values):
        raise DataError(f"{file} holds distances outside 0 to 1", hint="the file is damaged")
    if not all(map(math.isfinite, profile.influence or ())):
        raise DataError(f"{file} holds a Block Influence that is no number", hint="the file is damaged")
    return profile


def _read_pruneme(file: Path, *, source: Source) -> DistanceProfile:
    """Its row (s, s + n) is the distance across the 0-based layers s … s + n − 1, for one n a file."""
    size = source.num_layers + 1
    mean = [[0.0 if row == column else math.nan for column in range(size)] for row in range(size)]
    highest, number = 0, 1  # of the layers, of the line
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines)
            if rows.fieldnames is None or not set(PRUNEME) <= set(rows.fieldnames):
                raise DataError(f"{file} has no columns {', '.join(PRUNEME)}", hint="is it a CSV of PruneMe?")
            for row in rows:
                number = rows.line_num
                start, end = int(row["block_start"]), int(row["block_end"])
                distance = float(row["average_distance"])
                if not (0 <= start < end and 0 <= distance <= 1):
                    raise ValueError("out of range")
                highest = max(highest, end)
                if end < size:
                    mean[start][end] = mean[end][start] = distance
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise DataError(
            f"{file}, line {number}: no block and distance: {error}", hint="is it a CSV of PruneMe?"
        ) from error
    if highest != source.num_layers:
        raise DataError(
            f"{file} is of a model with {highest} layers; {source.name} has {source.num_layers}",
            hint="measure this model, without `profile`",
        )
    rows_of_zero = tuple((0.0,) * size for _ in range(size))
    return DistanceProfile(
        num_layers=source.num_layers,
        num_samples=0,  # it does not say
        sequence_length=1,
        num_tokens=0,
        mean=tuple(map(tuple, mean)),
        stderr=rows_of_zero,
        data=DataSource(name=file.name, version="PruneMe"),
    )
