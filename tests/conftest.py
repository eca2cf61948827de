import os
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Tests neither use nor fill the person's own cache, and widgets stay static."""
    monkeypatch.setenv("FMSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FMSAM_HEADLESS", "1")


@pytest.fixture(autouse=True)
def _same_threads():
    """A training sets the number of threads; the next test should not inherit it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images (FMSAM_DATA, else ../shared/data); tests on them skip where it is missing."""
    folder = Path(os.environ.get("FMSAM_DATA") or PROJECT.parent / "shared" / "data")
    if not (folder / "HippocampusMR").is_dir():
        pytest.skip(f"no real images: expected HippocampusMR in {folder}; set FMSAM_DATA to its parent folder")
    return folder
