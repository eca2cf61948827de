import hashlib
import importlib.util
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: as many workers as cores, and kernels that they start

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813, as everywhere
import torch
from filelock import FileLock
from matplotlib import image

from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import identity_map
from fmsam_lib.model.transform import Transform

PROJECT = Path(__file__).resolve().parents[1]
LONG = ["test_faults", "test_cluster", "test_notebooks", "test_run", "test_browser_study", "test_browser", "test_loop"]
LONG += ["test_distributed", "test_fuzz", "test_docs", "test_replanning", "test_register", "test_report_answer"]
LONG += ["test_anatomies"]


def pytest_collection_modifyitems(items):
    """Files of few long tests first: workers take whole files, and one that begins last keeps all others waiting."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Tests neither use nor fill the person's own cache, and widgets stay static."""
    monkeypatch.setenv("FMSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FMSAM_HEADLESS", "1")


@pytest.fixture(autouse=True)
def _same_threads():
    """A test may set the number of threads; the next one should not inherit it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def disk(tmp_path):
    """A small ext4, mounted, and two blocks.

    power_cut(): what is not on it when the block begins is gone when it ends. read_only(): nothing can be written in
    the block, as after an error of the disk. Both are ext4's own switches (FS_IOC_SHUTDOWN, without a flush;
    trigger_fs_error). A file that takes another's name is not written out first (noauto_da_alloc), as on harsher file
    systems.
    """
    fcntl = pytest.importorskip("fcntl")
    image, mounted = tmp_path / "image", tmp_path / "disk"
    mounted.mkdir()
    with open(image, "wb") as file:
        file.truncate(256 << 20)
    mount = ["mount", "-o", "loop,noauto_da_alloc,commit=1,errors=remount-ro", str(image), str(mounted)]

    @contextmanager
    def power_cut():
        top = os.open(mounted, os.O_RDONLY)
        fcntl.ioctl(top, 0x8004587D, struct.pack("I", 2))
        os.close(top)
        yield
        mount_again()

    @contextmanager
    def read_only():
        device = os.stat(mounted).st_dev
        name = os.path.basename(os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"))
        Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("1", encoding="utf-8")
        yield
        mount_again()

    def mount_again():
        subprocess.run(["umount", str(mounted)], check=True)
        subprocess.run(mount, check=True)

    made = shutil.which("mkfs.ext4") and subprocess.run(["mkfs.ext4", "-q", str(image)]).returncode == 0
    if not made or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a file system, which mkfs.ext4 makes")
    yield mounted, power_cut, read_only
    subprocess.run(["umount", str(mounted)], check=True)


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`once(name, make)`: a folder that `make` fills once a session, whichever of the workers comes first.

    Tests only read it.
    """
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        there = root / name
        with FileLock(root / f"{name}.lock"):
            if not (there / ".made").exists():
                there.mkdir()  # fails where an earlier attempt did: its reason stands with the first test
                make(there)
                (there / ".made").touch()
        return there

    return folder


def as_module(path: str) -> ModuleType:
    """A script of the project that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, PROJECT / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(figure: Path) -> bool:
    """Whether a PNG shows more than an empty page or bare axes: a hundredth of it is not white, in many colours."""
    pixels = (image.imread(figure)[..., :3] * 255).round().astype(np.int32).reshape(-1, 3)
    colours = np.unique(pixels @ np.array([1 << 16, 1 << 8, 1], np.int32))
    return bool((pixels.min(1) < 250).mean() > 0.01 and len(colours) > 100)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images (FMSAM_DATA, else ../shared/data); tests on them skip where it is missing."""
    folder = Path(os.environ.get("FMSAM_DATA") or PROJECT.parent / "shared" / "data")
    if not (folder / "HippocampusMR").is_dir():
        pytest.skip(f"no real images: expected HippocampusMR in {folder}; set FMSAM_DATA to its parent folder")
    return folder


class Analytic(GradICON):
    """A network whose transform is known: `phi(x) = x + displacement(x)`, whatever it sees."""

    def __init__(self, displacement, dim=3):
        super().__init__(dim, down=(4,), levels=1)
        self.displacement = displacement

    def forward(self, moving, fixed):
        shape = tuple(fixed.shape[2:])
        return Transform(shape, (self.displacement(identity_map(shape)).repeat(len(fixed), *[1] * (self.dim + 1)),))


def xyz(image):
    """A SimpleITK image's values, `(X, Y, Z)`, or `(X, Y, Z, 3)` of vectors."""
    values = sitk.GetArrayFromImage(image)
    dim = image.GetDimension()
    return values.transpose(*range(dim)[::-1], *range(dim, values.ndim))


def fingerprint(net: torch.nn.Module) -> str:
    """SHA-256 over the names and values of all parameters and buffers: is it the same?"""
    digest = hashlib.sha256()
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
