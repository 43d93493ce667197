"""Which device is used, and which one is there but is not."""

from pathlib import Path

import pytest
import torch

from factory.model.devices import unused_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is used here")
def test_an_nvidia_gpu_that_torch_cannot_use_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    before = unused_gpu()
    assert before is None or "Mac" in before
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\n")
    driver.chmod(0o755)
    assert f"torch {torch.__version__} cannot use it" in (unused_gpu() or "")
