"""Read angular distances from a file: a profile.json, or a CSV from PruneMe."""

import csv
import math
from pathlib import Path

from factory.artifacts import DataSource, DistanceProfile, Source
from factory.errors import DataError, StoreError

PRUNEME = ("block_start", "block_end", "average_distance")  # CSV columns


def read_profile(path: Path, *, source: Source) -> DistanceProfile:
    """Read a profile.json, the folder that contains one, or a CSV from PruneMe.

    Raises:
        DataError: The file does not exist, has another format, or belongs to another model.
    """
    file = path / DistanceProfile.file_name if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"no profile at {str(path)!r}", hint="pass a profile.json, or a CSV from PruneMe")
    profile = _read_pruneme(file, source=source) if file.suffix == ".csv" else _read_ours(file)
    if profile.num_layers != source.num_layers:
        raise DataError(
            f"{path} is for a model with {profile.num_layers} layers; {source.name} has {source.num_layers}",
            hint="measure this model: omit `profile`",
        )
    if profile.source_commit not in (None, source.commit):
        raise DataError(
            f"{path} is for another model or revision: commit {str(profile.source_commit)[:12]}, "
            f"not {source.commit[:12]}",
            hint="measure this model: omit `profile`",
        )
    return profile


def _read_ours(file: Path) -> DistanceProfile:
    try:
        profile = DistanceProfile.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, StoreError) as error:
        raise DataError(
            f"cannot read {file} as a profile: {str(error).splitlines()[0]}",
            hint="pass a profile.json written by `factory plan --save`, or a CSV from PruneMe",
        ) from error
    size = profile.num_layers + 1
    values = [value for rows in (profile.mean, profile.stderr) for row in rows for value in row]
    square = all(len(rows) == size == len(row) for rows in (profile.mean, profile.stderr) for row in rows)
    if not square or len(profile.influence or range(size - 1)) != size - 1:
        raise DataError(f"{file} does not contain {size} by {size} distances", hint="the file is damaged")
    if not all(math.isnan(value) or 0 <= value <= 1 for value in values):
        raise DataError(f"{file} contains distances outside 0 to 1", hint="the file is damaged")
    norms = (profile.first_norm, profile.other_norm)
    if any(found is not None and len(found) != size for found in norms):
        raise DataError(f"{file} does not contain {size} norms", hint="the file is damaged")
    if not all(map(math.isfinite, profile.influence or ())):
        raise DataError(f"{file} contains a Block Influence that is not finite", hint="the file is damaged")
    return profile


def _read_pruneme(file: Path, *, source: Source) -> DistanceProfile:
    """Read PruneMe's CSV: row (s, s + n) is the distance across 0-based layers s … s + n − 1."""
    size = source.num_layers + 1
    mean = [[0.0 if row == column else math.nan for column in range(size)] for row in range(size)]
    highest, number = 0, 1  # last layer boundary, line number
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines)
            if rows.fieldnames is None or not set(PRUNEME) <= set(rows.fieldnames):
                raise DataError(f"{file} lacks {', '.join(PRUNEME)}", hint="is it a CSV from PruneMe?")
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
            f"{file}, line {number}: not a block and a distance: {error}", hint="is it a CSV from PruneMe?"
        ) from error
    if highest != source.num_layers:
        raise DataError(
            f"{file} is for a model with {highest} layers; {source.name} has {source.num_layers}",
            hint="measure this model: omit `profile`",
        )
    rows_of_zero = tuple((0.0,) * size for _ in range(size))
    return DistanceProfile(
        num_layers=source.num_layers,
        num_samples=0,  # not recorded in the CSV
        sequence_length=1,
        num_tokens=0,
        mean=tuple(map(tuple, mean)),
        stderr=rows_of_zero,
        data=DataSource(name=file.name, version="PruneMe"),
    )
