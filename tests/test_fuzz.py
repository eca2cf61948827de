"""Files and arguments damaged at random: a sentence that says what to do, never a traceback, a hang, or half a result.

Half a minute of it is in `make test`: 500 cases of each kind, fewer of slow ones. FMSAM_EXAMPLES=2000: 12,840 in all.
"""

import contextlib
import copy
import gzip
import io
import json
import os
import signal
import string
import struct
import warnings

import hypothesis
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813, as everywhere
import torch
import yaml
from hypothesis import strategies as st

from fmsam_lib.checking import ConfigError
from fmsam_lib.images import cache, grid
from fmsam_lib.images.domains import open_domain
from fmsam_lib.images.files import read_labels, read_values
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.weights import load
from fmsam_lib.parameters import Register
from fmsam_lib.records import DataError
from fmsam_lib.registration.command import main
from fmsam_lib.study.file import read_study
from tests.images.test_files import dataset, save
from tests.study.test_run import TINY

SECONDS = 60  # that a case may take on a slow machine, before it counts as a hang
SHAPE = (8, 8, 8)


@pytest.fixture
def tried():
    """`tried(case, strategy, ...)`: the case, given values of the strategies, so many times, the same in every run."""
    number = int(os.environ.get("FMSAM_EXAMPLES") or 500)

    def run(case, *strategies, share=1.0):
        def limited(values):
            before = signal.signal(signal.SIGALRM, hangs)
            signal.alarm(SECONDS)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    case(*values)
            finally:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, before)

        settings = hypothesis.settings(
            max_examples=max(1, int(share * number)), deadline=None, derandomize=True, database=None,
            phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        settings(hypothesis.given(st.tuples(*strategies))(limited))()

    return run


def hangs(*_):
    raise AssertionError(f"a case took more than {SECONDS} s")


@contextlib.contextmanager
def a_sentence(*kinds):
    """Only these errors, and no wall of text."""
    try:
        yield
    except kinds as error:
        assert 10 < len(str(error)) < 3000  # noqa: PT017


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 4), st.sampled_from([2**31, 2**63, 2**64, -1e308, 0.5]),
    st.floats(allow_nan=True), st.text(max_size=6), st.sampled_from(["", "..", "/", "a/../b", "\x00", "é" * 300, "2D"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


def places(value, path=()):
    """Every place in nested lists and dictionaries."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(content, choice, value, how):
    """`content` with one place replaced, removed, doubled or renamed."""
    content = copy.deepcopy(content)
    *path, key = sorted(places(content), key=repr)[choice % len([*places(content)])]
    inside = content
    for step in path:
        inside = inside[step]
    if how == "remove":
        del inside[key]
    elif how == "double" and isinstance(inside, list):
        inside.append(inside[key])
    elif how == "rename" and isinstance(inside, dict):
        inside[f"{key}x"] = inside.pop(key)
    else:
        inside[key] = value
    return content


CHOICES = st.integers(0, 10_000)
CHANGES = st.lists(st.tuples(CHOICES, VALUES, st.sampled_from(["replace", "replace", "remove", "double", "rename"])),
                   min_size=1, max_size=3)  # fmt: skip
KINDS = st.sampled_from(["cut", "flip", "insert", "zero"])
DAMAGES = st.lists(st.tuples(KINDS, st.floats(0, 1), st.integers(1, 255), st.integers(1, 64)), min_size=1, max_size=3)


def damaged(content, damages):
    """Bytes cut off, changed, put in or zeroed, as disks and networks do."""
    for kind, where, value, size in damages:
        at = min(int(where * len(content)), max(0, len(content) - 1))
        if kind == "cut":
            content = content[:at]
        elif kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ value]) + content[at + 1 :]
        elif kind == "insert":
            content = content[:at] + bytes([value]) * size + content[at:]
        else:
            content = content[:at] + bytes(min(size, len(content) - at)) + content[at + size :]
    return content


def test_manifests(tried, tmp_path):
    folder = dataset(tmp_path / "Own", shape=SHAPE)
    path = folder / "Own_dataset.json"
    right = path.read_bytes()

    def case(changes, damages, as_text):
        if as_text:
            path.write_bytes(damaged(right, damages))
        else:
            content = json.loads(right)
            for change in changes:
                content = changed(content, *change) if content else content
            path.write_text(json.dumps(content))
        with a_sentence(DataError, ConfigError):
            domain = open_domain("Own", shape=SHAPE, data=tmp_path)
            assert all(isinstance(problem, str) for problem in domain.check())
            for ask in (domain.training_pair, domain.test_pair, domain.validation_pair):
                with a_sentence(DataError, ConfigError):
                    if ask != domain.validation_pair or domain.validation_count:
                        ask(0)

    tried(case, CHANGES, DAMAGES, st.booleans(), share=0.3)


def test_study_files(tried, tmp_path):
    path = tmp_path / "s.yaml"
    right = yaml.safe_dump(TINY)

    def case(changes, damages, as_text):
        if as_text:
            path.write_bytes(damaged(right.encode(), damages))
        else:
            content = copy.deepcopy(TINY)
            for change in changes:
                content = changed(content, *change) if content else content
            path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
        with a_sentence(ConfigError):
            read_study(path)

    tried(case, CHANGES, DAMAGES, st.booleans(), share=0.5)


NUMBERS = st.one_of(
    st.integers(-(2**15), 2**15 - 1).map(lambda n: struct.pack("<h", n)),
    st.floats(width=32).map(lambda x: struct.pack("<f", x)),
    st.sampled_from([struct.pack("<h", n) for n in (0, 1, -1, 2, 3, 4, 7, 8, 16, 64, 128, 256, 512, 32767)]),
    st.binary(min_size=1, max_size=8),
)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_headers(tried, tmp_path, suffix):
    """Any fields of the header say something else."""
    path = tmp_path / f"image{suffix}"
    whole = save(
        tmp_path / "right.nii", np.random.default_rng(0).integers(0, 9, (6, 7, 5)).astype(np.float32)
    ).read_bytes()

    def case(writes):
        content = bytearray(whole)
        for at, value in writes:
            content[at : at + len(value)] = value
        path.write_bytes(gzip.compress(content, 1) if suffix == ".nii.gz" else content)
        reads(path)

    tried(case, st.lists(st.tuples(st.integers(0, 347), NUMBERS), min_size=1, max_size=4), share=0.5)


def reads(path):
    """What is read is finite and on the grid."""
    with a_sentence(DataError):
        values = read_values(path, 3)
        assert values.GetDimension() == 3
        with a_sentence(DataError):
            read_labels(path, 3)
        sample = grid.decode(path, None, modality="MR", shape=SHAPE)
        assert sample.image.shape == (1, *SHAPE)
        assert sample.image.isfinite().all()


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_files_of_images(tried, tmp_path, suffix):
    """Bytes are lost, changed or added; a file that lacks its end is never read."""
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(5, 7, 6)).astype(np.float32))
    sitk.WriteImage(image, str(tmp_path / f"right{suffix}"), useCompression=suffix != ".nii")
    whole, path = (tmp_path / f"right{suffix}").read_bytes(), tmp_path / f"image{suffix}"

    def case(damages, lost):
        path.write_bytes(damaged(whole, damages))
        reads(path)
        path.write_bytes(whole[:-lost])
        with pytest.raises(DataError):
            read_values(path, 3)

    tried(case, DAMAGES, st.integers(1, len(whole)), share=0.5)


def test_weights_files(tried, tmp_path):
    """Damaged, they are refused, or nothing that counts was hit; none is read to other weights."""
    torch.manual_seed(0)
    net = GradICON(2, down=(4, 4), levels=1, last_step=False)
    net.save(tmp_path / "right.pt")
    whole, path, right = (tmp_path / "right.pt").read_bytes(), tmp_path / "weights.pt", net.state_dict()

    def case(damages):
        path.write_bytes(damaged(whole, damages))
        with a_sentence(ValueError):
            found = load(path).state_dict()
            assert all(torch.equal(found[name], value) for name, value in right.items())

    tried(case, DAMAGES)


def test_weights_of_something_else(tried, tmp_path):
    """Whole files that say other things."""
    GradICON(2, down=(4, 4), levels=1, last_step=False).save(tmp_path / "right.pt")
    right, path = torch.load(tmp_path / "right.pt", weights_only=True), tmp_path / "weights.pt"
    right["weights"] = dict(right["weights"])

    def case(changes):
        content = right
        for change in changes:
            content = changed(content, *change) if content else content
        torch.save(content, path)
        with a_sentence(ValueError):
            load(path)

    tried(case, CHANGES, share=0.5)


def test_cache_files(tried, tmp_path, monkeypatch):
    """What is remembered is either whole or made again."""
    values = np.random.default_rng(0).normal(size=(6, 7, 5)).astype(np.float32)
    path, folder = save(tmp_path / "image.nii", values), tmp_path / "remembered"
    options = {"modality": "MR", "shape": SHAPE}
    monkeypatch.setenv("FMSAM_CACHE", str(folder))
    right = cache.load(path, **options).image
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()

    def case(damages):
        entry.write_bytes(damaged(whole, damages))
        assert torch.equal(cache.load(path, **options).image, right)
        assert entry.read_bytes() == whole

    tried(case, DAMAGES)


FLAGS = ["--" + name.replace("_", "-") for name in Register.model_fields if name not in ("weights", "fixed", "moving")]
FLAGS += ["--pairs", "--quiet", "--device", "--nothing", "--i", "-h", "--check"]
WORDS = st.one_of(
    st.integers(-2, 20).map(str), st.sampled_from(["1e-3", "nan", "inf", "-inf", "1e400", "", "..", "mind", "affine"]),
    st.sampled_from(["fixed.nii", "moving.nii", "weights.pt", "text.txt", "nothing.nii", ".", "/dev/null", "out/x"]),
    st.sampled_from(["a.csv", "16", "9" * 30, "9" * 5000]), st.text(string.printable, max_size=4),
)  # fmt: skip

USUAL = """--io 1
--start headers
--start rigid
--start x.h5
--labels moving.nii
--fixed-mask fixed.nii
--shape 16 18 17
--shape 16 16
--seed 3
--quiet
--keep-worse
--moving nothing.nii
--fixed text.txt
--weights text.txt
--out text.txt""".splitlines()


def as_option(line):
    flag, *words = line.split()
    return flag, words


def read_whole(path):
    """A result to its last byte: a half-written one raises an error."""
    if path.suffix == ".png":
        plt.imread(path)
    elif path.suffix == ".gz":
        nib.load(path).get_fdata()
    else:
        assert path.stat().st_size, path


def test_arguments_of_the_command(tried, tmp_path, monkeypatch):
    """It ends with 0 and a summary, or not with 0, a sentence and no results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("fmsam_lib.model.weights.OFFICIAL", {})  # nothing is downloaded
    torch.manual_seed(0)
    GradICON(3, down=(2, 2), levels=1, last_step=False).save("weights.pt")
    for i, name in enumerate(("fixed.nii", "moving.nii")):
        save(tmp_path / name, np.random.default_rng(i).normal(size=(6, 7, 5)).astype(np.float32))
    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "a.csv").write_text("fixed,moving,name\nfixed.nii,moving.nii,a\nfixed.nii,nothing.nii,b\n")
    codes = set()
    complete = [
        "--fixed",
        "fixed.nii",
        "--moving",
        "moving.nii",
        "--weights",
        "weights.pt",
        "--shape",
        "16",
        "16",
        "16",
    ]

    def case(options, first, number):
        argv = [*complete, "--out", f"out{number}"] * first + [
            word for flag, words in options for word in (flag, *words)
        ]
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/summary.json")}
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                code = main(argv)
        except SystemExit as left:
            code = left.code
        assert code in (0, 1, 2)
        assert code == 0 or said.getvalue().strip()
        assert "Traceback" not in said.getvalue()
        after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/summary.json")}
        codes.add((code, after != before))
        if "--pairs" not in argv:
            assert code == 0 or after == before
        for summary in after.keys() - before.keys():
            named = json.loads(summary.read_text())["files"]
            for name in named:
                read_whole(summary.parent / name)
        assert not list(tmp_path.glob("**/.fmsam-*"))

    wild = st.tuples(st.sampled_from(FLAGS), st.lists(WORDS, max_size=3))
    options = st.lists(st.one_of(st.sampled_from(USUAL).map(as_option), wild), max_size=3)
    tried(case, options, st.sampled_from([True, True, True, False]), st.integers(0, 3), share=0.12)
    assert {(0, True), (1, False), (2, False)} <= codes
