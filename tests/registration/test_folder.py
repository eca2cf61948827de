"""Where results go, checked before the work: names, paths, permission and room as the file system has them."""

import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmsam_lib.records import DataError
from fmsam_lib.registration.folder import check_output, fitting, staged

NAMES = ["warped.nii.gz", "disp_a_b.nii.gz", "summary.json"]


@pytest.fixture
def small(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system to fill: {mounted.stderr.strip() or 'mount failed'}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_will_do_is_left_as_it_was(tmp_path, there):
    folder = tmp_path / "a" / "b"
    if there:
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text("{}")
    check_output(folder, NAMES, 1000)
    assert [path.name for path in folder.glob("*")] == ["summary.json"] * there
    assert (tmp_path / "a").exists() is there


@pytest.mark.parametrize(("letter", "bytes_of_it"), [("x", 1), ("é", 2), ("脳", 3)])
def test_a_name_is_too_long_by_its_bytes(tmp_path, letter, bytes_of_it):
    ending = ".nii.gz"
    most = (255 - len(ending)) // bytes_of_it
    check_output(tmp_path, [letter * most + ending])
    name = letter * (most + 1) + ending
    with pytest.raises(DataError, match=rf"at most 255 bytes in a file's name, found {len(name.encode())}\. .*shorter"):
        check_output(tmp_path, [*NAMES, name])
    assert os.listdir(tmp_path) == []


def test_a_path_may_be_too_long_where_its_names_are_not(tmp_path):
    folder = tmp_path
    while len(str(folder)) < 3900:
        folder = folder / ("d" * 100)
    folder = folder / ("e" * (4095 - len(str(folder)) - 100))
    check_output(folder, ["x" * 40])
    with pytest.raises(DataError, match=r"at most 4095 bytes in a file's whole path, found 41\d\d\. .*shorter path"):
        check_output(folder, ["x" * 120])
    assert os.listdir(tmp_path) == []
    with pytest.raises(DataError, match=r"a folder to write the results into, found File name too long"):
        check_output(tmp_path / ("f" * 300), NAMES)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"a folder to write the results into, found Not a directory\. Choose another"):
        check_output(tmp_path / "file" / "out", NAMES)


def test_too_little_room_is_found_before_the_work(small):
    check_output(small / "out", NAMES, 1_000_000)
    (small / "other").write_bytes(bytes(600_000))
    with pytest.raises(DataError, match=r"room for about 1 MB of results, found 0 MB\. Make room there, or choose"):
        check_output(small / "out", NAMES, 1_000_000)
    assert os.listdir(small) == ["other"]
    check_output(small / "out", NAMES, 400_000)


def test_room_beyond_any_disk_is_missing_everywhere(tmp_path):
    with pytest.raises(DataError, match=r"room for about 1,000,000,000,000 MB of results"):
        check_output(tmp_path, NAMES, 10**18)


text = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=200)
cases = st.one_of(text, st.sampled_from("aé脳").flatmap(lambda letter: st.integers(90, 254).map(letter.__mul__)))


@given(cases, cases)
def test_names_of_a_pair_fit_and_are_cut_between_characters(fixed, moving):
    a, b = fitting(fixed, moving)
    name = f"disp_{a}_{b}.nii.gz"
    assert len(name.encode()) <= 255
    for short, whole in ((a, fixed), (b, moving)):
        assert short == whole or whole.startswith(short.rpartition("~")[0])
    if len(f"disp_{fixed}_{moving}.nii.gz".encode()) <= 255 and "~" not in fixed + moving:
        assert (a, b) == (fixed, moving)  # as Learn2Reg looks for them


def test_two_pairs_never_get_the_same_names():
    longs = [f"sub-{i}_series-1.2.826.0.1.3680043.8.498.{'1234567890' * 8}_acq-thorax_preproc{'_' * 90}" for i in "12"]
    ends = [f"{'x' * 200}{i}" for i in "12"]
    names = [*longs, *ends, "a", *(f"{name[:110]}" for name in ends)]
    names += [fitting(name, name)[0] for name in names]  # results that became inputs
    pairs = {(a, b) for a in names for b in names}
    assert len({fitting(*pair) for pair in pairs}) == len(pairs)


def test_a_name_that_looks_cut_is_cut_with_its_neighbour():
    a, b = fitting("a~0123456789", "m" * 230)
    assert len(f"disp_{a}_{b}.nii.gz") <= 255
    assert a != "a~0123456789"


def test_a_short_name_stays_beside_a_long_one(tmp_path):
    a, b = fitting("fixed", "m" * 250)
    assert (a, b[:109], len(b)) == ("fixed", "m" * 109, 121)
    with staged(tmp_path) as staging:
        (staging / f"disp_{a}_{b}.nii.gz").touch()
    assert os.listdir(tmp_path) == [f"disp_{a}_{b}.nii.gz"]
