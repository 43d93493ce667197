"""Stages kept in a bucket: another machine gets whole ones as they were made, and nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from factory.builds.garbage import collect_garbage
from factory.errors import ModelError
from factory.jobs.hardware import Flavor, check_fits, peak_flops
from factory.pipeline.costs.pace import Machine
from tests.loopback_hub import Hub
from tests.waiting import HUNG_SECONDS

BUCKET = "alice/stages"
# A machine: its store has a home of its own. It does what the steps say, and prints what came of each.
MACHINE = """
import json, sys
from pathlib import Path
from factory.errors import HubError
from factory.hub.bucket import open_bucket
from factory.store.stage import StageSpec
from factory.store.store import Store

remarks = []
home = Path(sys.argv[1])
store = Store(home, open_bucket("alice/stages", remark=remarks.append))
spec = StageSpec("heal", 1, {"rank": 2}, {})

def make(folder):
    (folder / "weights").write_bytes(b"w" * 9)
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "log").write_text("two")
    return {}

def cut_short(folder):
    (folder / "checkpoint").write_text("step 4")
    (folder / "draft.partial").write_text("half")
    (folder / "tokens").mkdir()  # a cache of this machine
    (folder / "tokens" / "paths").write_text(str(folder))
    store.elsewhere.keep_partial("heal", spec.key, folder)
    store.elsewhere.keep_partial("heal", spec.key, folder)  # unchanged: does not go up again
    raise KeyboardInterrupt

def resumed(folder):
    print(json.dumps(sorted(path.name for path in folder.iterdir())))
    return make(folder)

for step in sys.argv[2:]:
    if step == "find":
        found = store.find(spec)
        names = found and sorted(p.relative_to(found.folder).as_posix() for p in found.folder.rglob("*"))
        print(json.dumps(names))
    else:
        try:
            store.make(spec, globals()[step], resumable=True)
        except KeyboardInterrupt:
            pass
        except HubError as error:
            print(json.dumps(error.message))
print(json.dumps(remarks))
"""


def machine(hub: Hub, home: Path, *steps: str) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-c", MACHINE, str(home), *steps],
        env={**os.environ, **hub.environment(home / "hf")},
        capture_output=True,
        text=True,
        timeout=HUNG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_stage_made_on_one_machine_is_found_on_another_until_it_is_not_whole(
    hub: Hub, tmp_path: Path
) -> None:
    assert machine(hub, tmp_path / "a", "make") == [[]]
    bucket = hub.storage.buckets[BUCKET]
    assert bucket.private
    assert bucket.batches[-1][0].endswith("/stage.json")  # what says that it is whole goes up last, alone
    found, _ = machine(hub, tmp_path / "b", "find")
    assert found == ["stage.json", "sub", "sub/log", "weights"]
    (weights,) = [path for path in bucket.files if path.endswith("/weights")]
    (manifest,) = [path for path in bucket.files if path.endswith("/stage.json")]
    kept = bucket.files[weights]
    bucket.files[weights] = (_put(hub, b"x" * 9), 9, kept[2])  # as many bytes, others
    assert machine(hub, tmp_path / "c", "find")[0] is None
    bucket.files[weights] = kept
    del bucket.files[manifest]
    assert machine(hub, tmp_path / "d", "find")[0] is None


def _put(hub: Hub, content: bytes) -> str:
    """Bytes that the Hub holds from now on; their xet hash."""
    from tests.loopback_hub import xet

    store = hub.storage.xet_folder.with_name("put")
    store.mkdir()
    xet.write(store, [content])
    hub.storage.xet_contents |= xet.read_all(store)
    return next(iter(xet.file_sizes(store)))


def test_a_stage_cut_short_goes_on_elsewhere_from_its_last_whole_copy(hub: Hub, tmp_path: Path) -> None:
    assert machine(hub, tmp_path / "a", "cut_short") == [[]]
    bucket = hub.storage.buckets[BUCKET]
    assert sum("addFile" in batch[0] for batch in bucket.batches) == 2  # the copy, and its name
    assert machine(hub, tmp_path / "b", "resumed")[0] == ["checkpoint"]
    assert not any(path.startswith("partial/") for path in bucket.files)


def test_a_copy_during_which_a_file_changed_is_not_used(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "a"

    def write_on() -> None:
        (checkpoint,) = home.glob("stages/heal/*.partial/checkpoint")
        checkpoint.write_text("step 4, and half of step 5")

    hub.fail("POST", f"/{BUCKET}/batch", meanwhile=write_on, times=1)
    machine(hub, home, "cut_short")
    assert [batch[0].split()[0] for batch in hub.storage.buckets[BUCKET].batches[:2]] == [
        "addFile",
        "deleteFile",
    ]


def test_what_cannot_be_kept_is_told_and_the_build_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.fail("POST", f"/{BUCKET}/batch", status=403)
    found, remarks = machine(hub, tmp_path / "a", "make", "find")
    assert "weights" in found
    assert len(remarks) == 1
    assert "was not kept in alice/stages: your token may not write to alice/stages" in remarks[0]


def test_hardware_that_is_too_small_is_refused() -> None:
    small = Flavor("t4-small", "Nvidia T4", Machine("T4", 16 * 10**9, 2e13, 10**11), 6.5e13, 0.0001)
    check_fits(small, 15 * 10**9)
    with pytest.raises(ModelError, match=r"needs about 28\.5 GB of memory, and t4-small has 16\.0 GB"):
        check_fits(small, 28_500_000_000)


def test_a_failed_download_leaves_nothing_to_resume_from(hub: Hub, tmp_path: Path) -> None:
    machine(hub, tmp_path / "a", "cut_short")
    home = tmp_path / "b"
    refused = hub.fail("GET", f"/{BUCKET}/xet-read-token", status=403, skip=1)  # where it lies still comes
    for _ in range(2):  # what the first attempt left is not in the way of the second
        (told, _) = machine(hub, home, "resumed")
        assert BUCKET in told
        (left,) = [path for path in (home / "stages" / "heal").iterdir() if path.is_dir()]
        assert left.name.endswith(".coming.partial")
    assert [found for found, _ in collect_garbage(home, recent=True)] == [left]
    refused.times = 0
    assert machine(hub, home, "resumed")[0] == ["checkpoint"]


def test_a_gpu_is_known_by_its_whole_name() -> None:
    assert peak_flops("NVIDIA L40") is None
    assert peak_flops("NVIDIA A100-SXM4-80GB") == peak_flops("A100")
    assert peak_flops("NVIDIA GeForce RTX 4090") == peak_flops("4090")
    assert peak_flops("1x Nvidia L4") == 121e12
