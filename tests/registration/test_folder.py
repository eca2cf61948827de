"""Where results go, checked before the work: names, paths, permission and room as the file system has them."""

import json
import os
import subprocess
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmsam_lib.records import DataError
from fmsam_lib.registration.folder import check_room, fitting, staged


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


def test_too_little_room_is_found_before_the_work(small):
    check_room(small, 1_000_000)
    (small / "other").write_bytes(bytes(600_000))
    with pytest.raises(DataError, match=r"room for up to 1 MB of results, found 0 MB\. Make room there, or choose"):
        check_room(small, 1_000_000)
    assert os.listdir(small) == ["other"]
    check_room(small, 400_000)


def test_room_beyond_any_disk_is_missing_everywhere(tmp_path):
    with pytest.raises(DataError, match=r"room for up to 1,000,000,000,000 MB of results"):
        check_room(tmp_path, 10**18)


def test_a_path_that_leaves_no_room_for_names(tmp_path):
    folder = tmp_path
    while len(str(folder)) < 3850:
        folder = folder / ("d" * 100)
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match="at most 3896 bytes in the path"):
        check_room(folder, 0)


def test_a_system_that_does_not_tell_its_longest_path(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "pathconf")  # as on Windows
    check_room(tmp_path, 0)


text = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=200)
cases = st.one_of(text, st.sampled_from("aé脳").flatmap(lambda letter: st.integers(90, 254).map(letter.__mul__)))


@given(cases, cases)
def test_names_of_a_pair_fit_and_are_cut_between_characters(fixed, moving):
    a, b = fitting(fixed, moving)
    name = f"disp_{a}_{b}.nii.gz"
    assert len(name.encode()) <= 143
    for short, whole in ((a, fixed), (b, moving)):
        assert short == whole or whole.startswith(short.rpartition("~")[0])
        assert short == whole or len(whole.encode()) > 65  # as Learn2Reg looks for them


def test_two_pairs_never_get_the_same_names():
    longs = [f"sub-{i}_series-1.2.826.0.1.3680043.8.498.{'1234567890' * 8}_acq-thorax_preproc{'_' * 90}" for i in "12"]
    ends = [f"{'x' * 200}{i}" for i in "12"]
    names = [*longs, *ends, "a", *(f"{name[:110]}" for name in ends)]
    pairs = {(a, b) for a in names for b in names}
    assert len({fitting(*pair) for pair in pairs}) == len(pairs)


def test_a_short_name_stays_beside_a_long_one(tmp_path):
    a, b = fitting("fixed", "m" * 250)
    assert (a, b[:52], len(b)) == ("fixed", "m" * 52, 65)
    with staged(tmp_path) as staging:
        (staging / f"disp_{a}_{b}.nii.gz").touch()
    assert os.listdir(tmp_path) == [f"disp_{a}_{b}.nii.gz"]


def test_after_a_power_cut_a_summary_stands_beside_whole_results(disk):
    mounted, power_cut, _ = disk
    with staged(mounted) as staging:
        (staging / "warped.nii.gz").write_bytes(bytes(100_000))
        (staging / "summary.json").write_text('{"files": ["warped.nii.gz", "summary.json"]}')
    time.sleep(2)  # names reach the disk after a second, what is in the files much later
    with power_cut():
        pass
    assert (mounted / "warped.nii.gz").read_bytes() == bytes(100_000)
    assert json.loads((mounted / "summary.json").read_text())["files"]
