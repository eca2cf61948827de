"""The workflow: study files, and a whole tiny study by the command that `make study` calls."""

import errno
import fcntl
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import nibabel
import numpy as np
import pandas as pd
import psutil
import pytest
import yaml

from fmsam_lib.checking import ConfigError, read
from fmsam_lib.images.domains import open_domain
from fmsam_lib.images.manifest import read_manifest
from fmsam_lib.parameters import Evaluate, Train
from fmsam_lib.records import DataError
from fmsam_lib.study.file import Once, read_study
from fmsam_lib.study.grid import grid, twins
from fmsam_lib.study.notebooks import NOTEBOOKS, executed, jobs, plan
from fmsam_lib.study.run import computed as computed_here
from fmsam_lib.study.run import distrust, main, preflight, progress, refuse_another, remember, stamp
from fmsam_lib.training.checkpoint import hash_of_images
from tests.conftest import PROJECT, drawn
from tests.test_browser import CHROMIUM, FLAGS

HAS_ANTS = importlib.util.find_spec("ants") is not None
TINY = {
    "description": "tiny",
    "train_domains": ["brain-mr"],
    "test_domains": ["brain-mr", "Real"],
    "optimizers": ["adam", "adam-2x", "sam"],
    "seeds": [0],
    "shape": [32, 32],
    "train": {"down": [4, 8], "levels": 2, "steps": 10, "batch": 1, "snapshots": 2},
    "evaluate": {"pairs": 2, "io": 2, "alone_io": 2, "corruptions": ["noise"], "corrupted_pairs": 2},
    "landscape": {
        **{"pairs": 1, "line_points": 3, "plane_points": 3, "directions": 1, "rhos": [0.01], "draws": 2},
        **{"measured_on": ["training"], "ascent_steps": 1, "eigenvalues": 1, "probes": 2, "lanczos_steps": 3},
    },
    "between": {"pairs": 1, "path_points": 3, "plane_points": 3},
    "baselines": ["ants-syn", "io"] if HAS_ANTS else ["io"],
}


SMALL = TINY | {
    **{"optimizers": ["adam", "sam"], "test_domains": ["brain-mr"], "baselines": [], "description": "Étude → 1"},
    **{"evaluate": {"pairs": 2, "corruptions": [], "corrupted_pairs": 1}},
    "landscape": TINY["landscape"] | {"ascent_steps": 0, "eigenvalues": 0, "probes": 0, "lanczos_steps": 2},
}
VARIED = {"optimizers": ["adam", "v"]}


def study_of(folder, **changes):
    """`TINY` with changes, written and read; None removes a key."""
    values = {key: value for key, value in (TINY | changes).items() if value is not None}
    (folder / "s.yaml").write_text(yaml.safe_dump(values))
    return read_study(folder / "s.yaml")


def names_and_parameters(study, root):
    """Of all notebooks."""
    return {job.name: job.values for job in jobs(study, root, "D", root / "s.yaml")}


@pytest.mark.parametrize("path", sorted((PROJECT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_the_project_are_valid(path):
    assert grid(read_study(path))


def test_the_grid_is_every_combination(tmp_path):
    runs = grid(study_of(tmp_path, seeds=[0, 1], train_domains=["a", "b"]))
    assert len({run.folder for run in runs}) == 2 * 3 * 2


@pytest.mark.parametrize(
    ("left_out", "given", "expected"),
    [
        (["a", "b", "c", "d"], None, ["b+c+d", "a+c+d", "a+b+d", "a+b+c"]),
        (["a", "b"], None, ["b", "a"]),
        (["a", "b", "c"], ["a", "a+b"], ["a", "a+b", "b+c", "a+c"]),  # one of them twice: trained once
    ],
)
def test_each_domain_is_left_out_in_turn(tmp_path, left_out, given, expected):
    study = study_of(tmp_path, leave_one_out=left_out, train_domains=given, optimizers=["adam", "sam"])
    assert study.train_domains == expected
    assert len(grid(study)) == 2 * len(expected)


def test_a_group_of_domains_is_left_out_as_a_whole(tmp_path):
    groups = {"head": ["brain-mr"], "chest": ["lung-ct", "heart-mr"]}
    study = study_of(tmp_path, groups=groups, always=["knee-mr"], leave_one_out=["head", "chest"], train_domains=None)
    assert study.train_domains == ["lung-ct+heart-mr+knee-mr", "brain-mr+knee-mr"]
    study = study_of(tmp_path, groups=groups, leave_one_out=["head", "chest"], only=["chest"], train_domains=None)
    assert study.train_domains == ["brain-mr"]
    assert study.left_out("brain-mr") == "chest"
    told = {"leave_one_out": ["head", "chest"], "only": ["chest"], "train_domains": None}
    for stays in ({"always": ["lung-ct"]}, {"groups": {"head": ["brain-mr", "lung-ct"], "chest": ["lung-ct"]}}):
        with pytest.raises(ConfigError, match="expected each once, got lung-ct"):
            study_of(tmp_path, **{"groups": groups} | told | stays)


def test_a_study_without_landscape_runs_no_notebook_of_it(tmp_path):
    study_of(tmp_path)
    text = (tmp_path / "s.yaml").read_text()
    values = yaml.safe_load(text) | {"landscape": None, "optimizers": ["adam", "sam"]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(values))
    notebooks = {job.notebook for job in jobs(read_study(tmp_path / "s.yaml"), tmp_path, "D", tmp_path / "s.yaml")}
    assert notebooks == {"10_train", "20_evaluate", "40_compare"}


def test_a_variant_is_an_optimizer_with_parameters_of_its_own(tmp_path):
    variants = {"sam-1": {"optimizer": "sam", "rho": 1.0}}
    study = study_of(tmp_path, optimizers=["adam", "sam-1"], variants=variants)
    adam, variant = grid(study)
    assert variant.folder == "brain-mr/sam-1/seed0"
    values = [names_and_parameters(study, tmp_path)[f"{run.folder}/10_train"] for run in (adam, variant)]
    assert [(v["optimizer"], v.get("rho")) for v in values] == [("adam", None), ("sam", 1.0)]


@pytest.mark.parametrize(
    ("optimizers", "treatment"),
    [
        (["adam", "sam"], "sam"),
        (["adam", "adam-2x", "asam"], "asam"),
        (["adam", "adam-2x"], "adam-2x"),
        (["adam"], "adam"),
    ],
)
def test_what_the_baseline_is_compared_with(tmp_path, optimizers, treatment):
    study = study_of(tmp_path, optimizers=optimizers)
    assert names_and_parameters(study, tmp_path)["40_compare"]["treatment"] == treatment


def test_twins_begin_alike_and_differ_in_the_optimizer(tmp_path):
    study = study_of(tmp_path, seeds=[0, 1], train_domains=["a", "b"])
    found = [(a.folder, b.folder) for a, b in twins(study)]
    assert found == [(f"{d}/adam/seed{s}", f"{d}/sam/seed{s}") for d in "ab" for s in (0, 1)]
    assert twins(study_of(tmp_path, optimizers=["adam"])) == []
    for optimizer in ({"optimizer": "sam", "rho": 0.0}, {"optimizer": "sam", "lmbda": 3.0}):  # the same, another loss
        assert twins(study_of(tmp_path, variants={"other": optimizer}, optimizers=["adam", "other"])) == []
    for more in ({"lmbda": 1.5}, {"sigma": 5}):  # the defaults, written out
        written_out = {"optimizer": "sam"} | more
        assert len(twins(study_of(tmp_path, variants={"other": written_out}, optimizers=["adam", "other"]))) == 1


def test_every_notebook_gets_what_it_needs(tmp_path):
    study = study_of(tmp_path, baselines=["ants-syn", "io"], optimizers=["adam", "sam"])
    given, root = names_and_parameters(study, tmp_path), str(tmp_path)
    runs = [
        f"brain-mr/{o}/seed0/{n}" for o in ("adam", "sam") for n in ("10_train", "20_evaluate", "30_loss_landscape")
    ]
    alone = ["none/20_evaluate", "io/20_evaluate", "brain-mr/between/seed0/35_between_minima", "40_compare"]
    assert sorted(given) == sorted([*runs, *alone])
    assert {name: of["methods"] for name, of in given.items() if name.endswith("20_evaluate")} == {
        "none/20_evaluate": ["none", "ants-syn"],
        "io/20_evaluate": ["io"],
        "brain-mr/adam/seed0/20_evaluate": ["network", "network+io"],
        "brain-mr/sam/seed0/20_evaluate": ["network", "network+io"],
    }
    assert given["none/20_evaluate"]["run"] == ""
    assert given["io/20_evaluate"]["run"] == f"{root}/brain-mr/adam/seed0"  # for the network's form
    assert given["io/20_evaluate"]["out"] == f"{root}/io"
    between = given["brain-mr/between/seed0/35_between_minima"]
    assert (between["baseline"], between["treatment"], between["out"], between["path_points"]) == (
        f"{root}/brain-mr/adam/seed0",
        f"{root}/brain-mr/sam/seed0",
        f"{root}/brain-mr/between/seed0",
        3,
    )
    defaults = {"alone_lr": 0.003, "io_lr": 0.001, "fields": False, "threads": 1}
    for name, values in given.items():
        if name.endswith("20_evaluate"):
            assert read(Evaluate, defaults | values).pairs == 2


def test_what_a_study_does_not_ask_for_is_not_computed(tmp_path):
    study = study_of(tmp_path, baselines=None, optimizers=["adam"], evaluate={})
    given = names_and_parameters(study, tmp_path)
    assert given["none/20_evaluate"]["methods"] == ["none"]
    assert given["brain-mr/adam/seed0/20_evaluate"]["methods"] == ["network"]
    assert not [name for name in given if name.startswith("io/") or "between" in name]
    evaluated = ("results.csv", "pairs.csv", "costs.csv", "robustness.csv")
    *work, report = jobs(study, tmp_path, "", tmp_path)
    assert [file for job in [*work, report] for file in job.makes] == [
        *(f"none/{name}" for name in evaluated),
        "brain-mr/adam/seed0/weights.pt",
        *(f"brain-mr/adam/seed0/{name}" for name in (*evaluated, "landscape.csv", "flatness.csv")),
        *report.makes,
    ]
    assert report.makes[-1] == "report.html"


def test_the_report_waits_for_every_notebook(tmp_path):
    *work, report = jobs(study_of(tmp_path, optimizers=["adam", "sam"]), tmp_path, "", tmp_path)
    assert report.name == "40_compare"
    assert set(report.needs) == {file for job in work for file in job.makes}
    assert "brain-mr/between/seed0/between.csv" in report.needs


def test_a_notebook_waits_for_the_trainings_that_it_reads(tmp_path):
    study = study_of(tmp_path, optimizers=["adam", "sam"], baselines=["io"])
    needs = {job.name: job.needs for job in jobs(study, tmp_path, "", tmp_path)[:-1]}
    adam, sam = (f"brain-mr/{name}/seed0" for name in ("adam", "sam"))
    for run in (adam, sam):
        assert needs[f"{run}/10_train"] == ()
        assert needs[f"{run}/20_evaluate"] == needs[f"{run}/30_loss_landscape"] == (f"{run}/weights.pt",)
    assert needs["none/20_evaluate"] == ()
    assert needs["io/20_evaluate"] == (f"{adam}/weights.pt",)
    assert needs["brain-mr/between/seed0/35_between_minima"] == (f"{adam}/weights.pt", f"{sam}/weights.pt")


def test_every_file_is_made_by_one_notebook_alone():
    *in_folders, report = NOTEBOOKS.values()
    files = [file for notebook in in_folders for file in (*notebook.makes, *notebook.keeps)]
    assert len(files) == len(set(files))
    assert len(report.makes) == len(set(report.makes))


def test_a_fetched_training_domain_may_be_one_of_several(tmp_path, monkeypatch):
    fetched, done = [], SimpleNamespace(returncode=0)
    monkeypatch.setattr(
        "fmsam_lib.study.run.subprocess.run", lambda command, **how: fetched.append(command[1:]) or done
    )
    monkeypatch.setattr("fmsam_lib.study.run.open_domain", lambda *given, **how: SimpleNamespace(test_count=1))
    study = study_of(tmp_path, leave_one_out=["HippocampusMR", "knee-mr", "brain-mr"], test_domains=["brain-mr"])
    preflight(study, str(tmp_path))
    assert fetched == [[str(PROJECT / "studies/fetch_hippocampus.py"), str(tmp_path)]] * 2


def test_a_data_set_without_test_pairs_is_left_out_of_the_tests_and_trained_on(tmp_path):
    real_images(tmp_path / "Real")
    manifest = tmp_path / "Real/Real_dataset.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"registration_val": []}))
    study = study_of(tmp_path, train_domains=["Real"], test_domains=["Real", "brain-mr"])
    found, left_out = preflight(study, str(tmp_path))
    assert (found.train_domains, found.test_domains) == (["Real"], ["brain-mr"])
    assert left_out == ["Real is left out of the tests: it has no test pairs"]
    with pytest.raises(DataError, match=r"no test domain is there:\n- Real is left out .* no test pairs"):
        preflight(study_of(tmp_path, train_domains=["Real"], test_domains=["Real"]), str(tmp_path))


@pytest.mark.parametrize(
    ("measured_on", "kept"),
    [
        (["training", "Real"], ["training"]),
        (["Real"], ["training"]),
        (["brain-mr"], ["brain-mr"]),
        ([], []),
        (None, None),
    ],
)
def test_flatness_is_not_measured_on_a_data_set_that_is_left_out(tmp_path, measured_on, kept):
    landscape = {} if measured_on is None else {"measured_on": measured_on}
    found, _ = preflight(study_of(tmp_path, landscape=landscape), str(tmp_path))
    assert found.test_domains == ["brain-mr"]
    assert found.landscape == ({} if kept is None else {"measured_on": kept})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seedz": [0]}, r"seedz: unknown; known are .*did you mean seeds\?"),
        ({"train": {"step": 3}}, r"(?s)section train.*step: unknown; known are .*did you mean steps\?"),
        ({"train": {"steps": 0}}, r"(?s)section train, run brain-mr/adam/seed0 .*steps: expected at least 1, got 0"),
        ({"train": {"seed": 0}}, r"section train: the study itself sets seed: leave that out"),
        (
            {"train": {"batch": 3, "accumulate": 2}},
            r"(?s)section train.*expected batch to be a multiple of .* 2, got 3",
        ),
        ({"train": {"first_stage": 5}}, r"(?s)section train.*expected first_stage to be below steps, and last_step"),
        ({"optimizers": ["samm"]}, r"optimizers: expected some of adam, .*samm is unknown \(did you mean sam\?\)"),
        ({"variants": {"sam-1": {"rho": 1.0}}}, "variants: sam-1: expected an optimizer"),
        ({"variants": {"both": {"optimizer": ["adam", "sam"]}}}, "variants: both: expected an optimizer, one"),
        (
            VARIED | {"variants": {"v": {"optimizer": "sam", "roh": 1.0}}},
            r"(?s)run brain-mr/v/seed0.*did you mean rho\?",
        ),
        (VARIED | {"variants": {"v": {"optimizer": "sam", "seed": 1}}}, "the study itself sets seed"),
        (
            VARIED | {"variants": {"v": {"optimizer": "v"}}},
            r"(?s)run brain-mr/v/seed0.*expected one of adam, .*got 'v'",
        ),
        (
            VARIED | {"variants": {"v": {"optimizer": "looksam", "processes": 2, "sync_climb": False, "batch": 2}}},
            r"(?s)run brain-mr/v/seed0.*expected sync_climb with looksam",
        ),
        ({"variants": {"adam": {"optimizer": "sam"}}}, "'adam': expected a name .* that is no optimizer's"),
        ({"variants": {"a/b": {"optimizer": "sam"}}}, "'a/b': expected a name of letters"),
        ({"variants": {"..": {"optimizer": "sam"}}}, "'..': expected a name of letters"),
        ({"variants": {0.03: {"optimizer": "sam"}}}, "variants: expected text, got 0.03"),
        ({"variants": {"ants-syn": {"optimizer": "sam"}}}, "'ants-syn': expected .* none of adam, .*ants-syn"),
        ({"variants": {"between": {"optimizer": "sam"}}}, "'between': expected a name"),
        (
            {"variants": {"Sam": {"optimizer": "sam"}}},
            "'Sam': expected a name .* that is no optimizer's",
        ),  # on some disks
        (
            {"variants": {"V": {"optimizer": "sam"}, "v": {"optimizer": "sam"}}},
            "v: .* names that differ in more than cap",
        ),
        ({"variants": {"v": {"optimizer": "sam", "roh": 1.0}}}, r"(?s)run brain-mr/v/seed0.*did you mean rho\?"),
        (
            {"test_domains": ["brain-mr", "training", "unseen"]},
            "expected other domains than training, unseen, as tables have rows of that name",
        ),
        ({"landscape": None, "between": {"pear": 1}}, r"(?s)section between .*pear: unknown; .*did you mean pairs"),
        ({"leave_one_out": ["brain-mr"]}, "expected two domains or more in leave_one_out, not brain-mr alone"),
        ({"leave_one_out": ["a", "b"], "only": ["b", "c"]}, "expected in only some of leave_one_out, not c"),
        ({"leave_one_out": ["a", "b", "a"]}, "leave_one_out: expected each once, got a more often"),
        (
            {"groups": {"a": ["b-mr", "c"]}, "leave_one_out": ["a", "d", "e"], "always": ["c"]},
            "train_domains: expected each once, got c more often",
        ),
        ({"always": ["knee-mr"]}, "expected leave_one_out with always, knee-mr, which it never leaves out"),
        (
            {"evaluate": {"methods": ["network", "none"]}},
            r"section evaluate, run brain-mr/adam/seed0: expected methods of networks \(others are base.*got none",
        ),
        ({"evaluate": {"methods": []}}, r"(?s)run brain-mr/adam/seed0.*methods: expected at least 1, got"),
        ({"evaluate": {"methods": ["network+ema"]}}, r"\+ema and \+tail with train: \{averages: true\}, got network"),
        ({"train": TINY["train"] | {"weights": "3d"}}, "adam/seed0: expected weights for 2 dimensions.*shape, got 3d"),
        ({"landscape": {"measured_on": ["tests"]}}, "measured_on to name training or test_domains, got tests"),
        ({"train_domains": []}, "expected train_domains or leave_one_out: name what to train on"),
        ({"baselines": ["syn"]}, "baselines: expected one of ants-syn or io, got 'syn'"),
        ({"evaluate": {"run": "x"}}, r"section evaluate: the study itself sets run"),
        ({"evaluate": {"alone_io": 0}}, r"(?s)section evaluate, run io .*expected alone_io of at least 1 step"),
        (
            {"evaluate": {"corruptions": ["fog"]}},
            r"(?s)section evaluate.*corruptions: expected one of noise, .*got 'fog'",
        ),
        ({"between": {"baseline": "x"}}, r"section between: the study itself sets baseline"),
        ({"between": {"pear": 1}}, r"(?s)section between.*pear: unknown; known are .*did you mean pairs"),
        ({"between": {"plane_points": 4}}, r"(?s)section between.*plane_points: expected an odd number.*, got 4"),
        ({"landscape": {"rhos": []}}, r"(?s)section landscape.*rhos: expected at least 1, got"),
        ({"seeds": [0, 0]}, "seeds: expected each once, got 0 more often"),
        ({"seeds": []}, "seeds: expected at least 1, got"),
    ],
)
def test_a_wrong_study_says_what_is_right(tmp_path, change, message):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(TINY | change))
    with pytest.raises(ConfigError, match=message):
        read_study(tmp_path / "s.yaml")


@pytest.mark.parametrize("twice", ["train: {steps: 20}", "evaluate: {pairs: 2, io: 3, pairs: 4}"])
def test_a_key_that_stands_twice_is_named(tmp_path, twice):
    given = {key: value for key, value in TINY.items() if key != "evaluate"}
    (tmp_path / "s.yaml").write_text(f"{yaml.safe_dump(given)}\n{twice}\n")
    with pytest.raises(ConfigError, match=r"(?s)not valid YAML in UTF-8: (train|pairs) stands twice.*line [2-9]\d,"):
        read_study(tmp_path / "s.yaml")


def test_what_yaml_takes_twice_or_only_looks_alike_is_no_key_given_twice(tmp_path):
    given = yaml.safe_dump(TINY | {"variants": {}}) + "resources: {10_train: {<<: &some {minutes: 5}, <<: {cpus: 2}}}\n"
    (tmp_path / "s.yaml").write_text(given)
    assert read_study(tmp_path / "s.yaml").resources["10_train"] == {"minutes": 5, "cpus": 2}
    assert Once('{1: a, "1": b}').get_single_data() == {1: "a", "1": "b"}


def test_averages_of_a_variant_that_is_not_run_are_not_asked_for(tmp_path):
    of = {"optimizer": "adam", "lr": 0.002}
    change = {"variants": {"a": of | {"averages": True}, "b": of}, "optimizers": ["a"]}
    change["evaluate"] = {"methods": ["network", "network+ema"]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(TINY | change))
    assert read_study(tmp_path / "s.yaml").optimizers == ["a"]
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(TINY | change | {"optimizers": ["a", "b"]}))
    with pytest.raises(ConfigError, match=r"\+ema and \+tail with train: \{averages: true\}"):
        read_study(tmp_path / "s.yaml")


def test_a_study_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "s.yaml").write_bytes("description: Étude".encode("latin-1"))
    (tmp_path / "folder.yaml").mkdir()
    for name, found in {"s": "'utf-8' codec can't decode byte", "folder": r"\[Errno 21\]"}.items():
        with pytest.raises(ConfigError, match=rf"{name}\.yaml is not valid YAML in UTF-8: {found}"):
            read_study(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize("line", ["seeds: [010]", "seeds: [0, 1:30]", "train: {steps: 1:30}"])
def test_numbers_that_yaml_reads_in_another_base_are_none(tmp_path, line):
    """Octal seeds, and minutes in place of steps."""
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({k: v for k, v in TINY.items() if k != line[:5]}) + line)
    with pytest.raises(ConfigError, match=r"expected a whole number, got '0?1"):
        read_study(tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(TINY | {"seeds": []}).replace("seeds: []", "seeds: [0, 0x10, 1_0]"))
    assert read_study(tmp_path / "s.yaml").seeds == [0, 16, 10]


def test_steps_of_instance_optimisation_that_no_method_takes_are_refused(tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(TINY | {"evaluate": {"methods": ["network"], "io": 20}}))
    with pytest.raises(ConfigError, match=r"section evaluate, run .*network\+io with io, .*got io: 20"):
        read_study(tmp_path / "s.yaml")


def test_a_study_file_that_contains_itself_is_no_study(tmp_path):
    (tmp_path / "s.yaml").write_text("train: &a {down: *a}\n")
    with pytest.raises(ConfigError, match="is not valid YAML in UTF-8: maximum recursion depth"):
        read_study(tmp_path / "s.yaml")


def test_an_unknown_study_lists_the_known_ones(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study", "quikc"])
    assert main() == 2
    known = sorted(path.stem for path in (PROJECT / "studies").glob("*.yaml"))
    assert f"known studies: {', '.join(known)}" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["study", "quick", "--cores", "0"])  # Snakemake would wait for ever
    assert main() == 2
    assert "expected --cores of 1 or more, got 0" in capsys.readouterr().err


def test_parameter_files_are_rewritten_only_when_they_change(tmp_path):
    study = study_of(tmp_path)
    plan(jobs(study, tmp_path, "", tmp_path / "s.yaml"), tmp_path)
    path = tmp_path / "brain-mr/sam/seed0/10_train.yaml"
    assert yaml.safe_load(path.read_text())["optimizer"] == "sam"
    before = path.stat().st_mtime_ns
    plan(jobs(study, tmp_path, "", tmp_path / "s.yaml"), tmp_path)
    assert path.stat().st_mtime_ns == before


def test_what_lacks_a_file_or_was_made_with_other_parameters_is_to_be_run(tmp_path):
    work = jobs(study_of(tmp_path, optimizers=["adam"], baselines=None), tmp_path, "", tmp_path / "s.yaml")
    assert plan(work, tmp_path) == work
    for file in (file for job in work for file in job.makes):
        (tmp_path / file).touch()
    assert plan(work, tmp_path) == []
    changed = study_of(tmp_path, optimizers=["adam"], baselines=None, landscape={"pairs": 2})
    for path in tmp_path.rglob("*.csv"):
        os.utime(path, (1000, 1000))
    for name in ("brain-mr/adam/seed0/20_evaluate", "none/20_evaluate", "40_compare"):
        os.utime(tmp_path / f"{name}.asked.yaml", (900, 900))
    again = jobs(changed, tmp_path, "", tmp_path / "s.yaml")
    assert [job.notebook for job in plan(again, tmp_path)] == ["30_loss_landscape"]
    (tmp_path / "brain-mr/adam/seed0/weights.pt").unlink()
    assert [job.folder for job in plan(again, tmp_path)] == ["brain-mr/adam/seed0"] * 3 + [""]


@pytest.mark.parametrize(
    "content", [b"", b"steps: [1", b"steps: \xff", b"3", b"steps: 2001-99-99", b"a" * 999, bytes(9)]
)
def test_a_parameter_file_that_cannot_be_read_is_written_anew(tmp_path, content):
    file = tmp_path / "s.yaml"
    work = jobs(study_of(tmp_path, optimizers=["adam"], baselines=None), tmp_path, "", tmp_path / "copy.yaml")
    plan(work, tmp_path)
    (train,) = [job for job in work if job.notebook == "10_train"]
    run, names = (
        tmp_path / train.folder,
        ["plan.json", "40_compare.yaml", f"{train.name}.yaml", f"{train.name}.asked.yaml"],
    )
    (run / "weights.pt").touch()
    (run / "config.json").write_text(json.dumps({"parameters": Train(**train.values).model_dump()}))
    before = {name: (tmp_path / name).read_bytes() for name in names}
    for name in (*names, "copy.yaml"):
        (tmp_path / name).write_bytes(content)
    refuse_another(work, tmp_path, file)
    plan(work, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    changed = study_of(tmp_path, optimizers=["adam"], baselines=None, train=TINY["train"] | {"steps": 30})
    (tmp_path / f"{train.name}.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="steps: 10 there, 30 in the study"):
        refuse_another(jobs(changed, tmp_path, "", tmp_path / "copy.yaml"), tmp_path, file)


@pytest.mark.parametrize("last", [b'{"step": 7, "tot', b"3", b"{}", b"\xff", b'{"step": 7, "total": null}'])
def test_a_damaged_history_is_left_out_of_the_progress(tmp_path, last):
    work = jobs(study_of(tmp_path, optimizers=["adam"], baselines=None), tmp_path, "", tmp_path / "s.yaml")
    (history := tmp_path / "brain-mr/adam/seed0/history.jsonl").parent.mkdir(parents=True)
    assert progress(work, tmp_path) == "0 of 5 notebooks done" == progress(work[-1:] * 5, tmp_path)
    history.write_bytes(b'{"step": 5, "total": 0.5}\n{"st')
    assert progress(work, tmp_path) == "0 of 5 notebooks done | brain-mr/adam/seed0: step 5, loss 0.500"
    assert progress(work * 7, tmp_path).endswith("loss 0.500 | 3 more")
    history.write_bytes(last + b"\n")
    assert progress(work, tmp_path) == "0 of 5 notebooks done"


@pytest.mark.parametrize("content", ["", '{"cells": ['])
def test_an_executed_notebook_that_was_cut_short_tells_nothing(tmp_path, content):
    work = jobs(study_of(tmp_path), tmp_path, "", tmp_path / "s.yaml")
    (tmp_path / "none").mkdir()
    (tmp_path / "none/20_evaluate.ipynb").write_text(content)
    assert list(executed(work, tmp_path)) == []


def real_images(folder):
    """A data set of five 2-D images with two test pairs."""
    rng = np.random.default_rng(0)
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    for i in range(5):
        label = np.zeros((40, 36, 1), np.uint8)
        label[10 + i : 28, 8 : 24 + i] = 1
        image = (label * 100 + rng.integers(0, 30, label.shape)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / f"imagesTr/p{i}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), folder / f"labelsTr/p{i}.nii.gz")
    entry = "./imagesTr/p{}.nii.gz".format
    manifest = {
        "name": folder.name, "dimensions": 2, "modality": {"0": "MR"}, "labels": {"0": "background", "1": "box"},
        "pairing": "inter-subject",
        "training": [{"image": entry(i), "label": f"./labelsTr/p{i}.nii.gz"} for i in (0, 1)],
        "registration_val": [{"fixed": entry(3), "moving": entry(4)}, {"fixed": entry(2), "moving": entry(3)}],
    }  # fmt: skip
    (folder / f"{folder.name}_dataset.json").write_text(json.dumps(manifest))


def test_a_stamp_is_of_what_is_tested_with_wherever_it_lies(tmp_path):
    real_images(tmp_path / "Real")

    def now(folder=tmp_path):
        return stamp(read_manifest(folder / "Real"))

    first = now()
    shutil.copytree(tmp_path / "Real", tmp_path / "moved/Real", copy_function=shutil.copyfile)  # with new dates
    assert now(tmp_path / "moved") == first
    stamps = {first}
    for name in ("imagesTr/p0.nii.gz", "imagesTr/p3.nii.gz", "labelsTr/p4.nii.gz", "Real_dataset.json"):
        path = tmp_path / "Real" / name
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        stamps.add(now())
        path.write_bytes(before)
    assert len(stamps) == 4  # the first is of a training image
    assert now() == first


def test_a_stamp_is_also_of_the_data_behind_a_header_and_of_folders(tmp_path):
    real_images(tmp_path / "Real")
    image, label, manifest = (
        tmp_path / "Real" / f for f in ("imagesTr/p3.nii.gz", "labelsTr/p3.nii.gz", "Real_dataset.json")
    )
    first = stamp(read_manifest(tmp_path / "Real"))
    image.rename(tmp_path / "p"), label.rename(image), (tmp_path / "p").rename(label)
    assert stamp(read_manifest(tmp_path / "Real")) != first
    manifest.write_text(manifest.read_text().replace("p4.nii.gz", "p4.mhd"))
    image.with_name("p4.mhd").write_text("ObjectType = Image\nElementDataFile = p4.raw\n")
    image.with_name("p4.raw").write_bytes(b"damaged")
    first = stamp(read_manifest(tmp_path / "Real"))
    image.with_name("p4.raw").write_bytes(b"mended")
    assert stamp(read_manifest(tmp_path / "Real")) != first


def test_a_training_on_images_that_changed_is_refused(tmp_path):
    real_images(tmp_path / "data/Real")
    study = study_of(tmp_path, train_domains=["Real", "brain-mr"], test_domains=["brain-mr"], baselines=None)
    work = jobs(study, tmp_path / "runs", str(tmp_path / "data"), tmp_path / "s.yaml")
    for job in (job for job in work if job.notebook == "10_train"):
        run, folder = Train(**job.values), tmp_path / "runs" / job.folder
        images = hash_of_images(open_domain(run.train_domain, shape=run.shape, data=run.data))
        folder.mkdir(parents=True)
        (folder / "weights.pt").touch()
        (folder / "config.json").write_text(json.dumps({"parameters": run.model_dump(), "hash_of_images": images}))
    test, image = (tmp_path / f"data/Real/imagesTr/p{n}.nii.gz" for n in (3, 0))
    test.write_bytes(test.read_bytes() + b" ")
    refuse_another(work, tmp_path / "runs", tmp_path / "s.yaml")
    image.write_bytes(image.read_bytes() + b" ")
    with pytest.raises(ConfigError) as told:
        refuse_another(work, tmp_path / "runs", tmp_path / "s.yaml")
    assert "seed0: trained on other images or masks than are there now\n" in str(told.value)
    assert "brain-mr" not in str(told.value).replace(str(tmp_path), "")
    record = tmp_path / "runs" / next(job.folder for job in work if job.notebook == "10_train") / "config.json"
    record.write_text(json.dumps({"parameters": json.loads(record.read_text())["parameters"]}))  # an older one
    with pytest.raises(ConfigError) as again:
        refuse_another(work, tmp_path / "runs", tmp_path / "s.yaml")
    assert str(again.value).count("masks") == str(told.value).count("masks") - 1


def test_dates_of_the_future_are_taken_back_in_their_order(tmp_path):
    then = time.time() + 86400
    for name, date in {"b": then, "a": then + 9, "c": then + 9, "d": 1000, "e": then - 9}.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (date, date))
    distrust(tmp_path)
    dates = {name: (tmp_path / name).stat().st_mtime for name in "abcde"}
    assert dates["d"] == 1000 < dates["e"] < dates["b"] < dates["a"] == dates["c"] <= time.time()


def test_the_report_is_of_the_study_as_it_was_started(tmp_path, monkeypatch):
    """And a copy of the report that a full disk cuts short does not count."""
    file, root = tmp_path / "s.yaml", tmp_path / "runs"
    started = study_of(tmp_path, test_domains=["brain-mr"], baselines=None)

    def edited(*given):
        file.write_text("description: other\n")
        raise KeyboardInterrupt

    monkeypatch.setattr("fmsam_lib.study.run.compute", edited)
    with pytest.raises(KeyboardInterrupt):
        computed_here(file, root, str(tmp_path), 1, None)
    assert read_study(yaml.safe_load((root / "40_compare.yaml").read_text())["study"]) == started

    def cut(source, target):
        target.write_text("half")
        raise OSError(errno.ENOSPC, "full")

    study_of(tmp_path, test_domains=["brain-mr"], baselines=None)
    (root / "report.html").write_text("whole")
    monkeypatch.setattr("fmsam_lib.study.run.shutil.copy", cut)
    with pytest.raises(OSError, match="full"):
        computed_here(file, root, str(tmp_path), 1, None)
    assert not (root / "report_before.html").exists()


def test_tables_with_times_are_not_damaged_where_they_are_made_again(tmp_path, capsys):
    work = jobs(study_of(tmp_path, optimizers=["adam"], baselines=None), tmp_path, "", tmp_path / "s.yaml")
    plan(work, tmp_path)
    for file in (file for job in work for file in job.makes):
        (tmp_path / file).write_text("a")
    remember(work, tmp_path)
    for name in ("none/costs.csv", "none/results.csv", "methods.csv", "summary.csv"):
        (tmp_path / name).write_text("b")
    distrust(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("damaged_*")) == ["damaged_results.csv", "damaged_summary.csv"]


@pytest.mark.parametrize(
    ("number", "cure"), [(errno.ENOSPC, "make room"), (errno.EROFS, "mend the disk"), (errno.ENOENT, None)]
)
def test_room_is_asked_for_where_there_is_none(number, cure, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study", "quick"])
    error = OSError(number, os.strerror(number), "x")
    monkeypatch.setattr("fmsam_lib.study.run.computed", lambda *given: (_ for _ in ()).throw(error))
    assert main() == 1
    said = capsys.readouterr().err
    assert ("nothing more can be written" in said) == (f"): {cure} and run the same" in said) == bool(cure)
    assert os.strerror(number) in said


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with a tiny study, beside a data set."""
    copy = tmp_path_factory.mktemp("study") / "project"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", ".snakemake", "data", "__pycache__")
    shutil.copytree(PROJECT, copy, ignore=ignored)
    (copy / "studies/tiny.yaml").write_text(yaml.safe_dump(TINY))
    real_images(copy / "data/Real")
    return copy


def compute(project, *arguments, study="tiny", run=subprocess.run, env=None, **how):
    """`python -m fmsam_lib.study` of the copy."""
    command = [sys.executable, "-m", "fmsam_lib.study", study, *arguments]
    own = {"PYTHONPATH": str(project), "FMSAM_CACHE": str(project / "cache"), "FMSAM_DATA": ""} | (env or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return run(command, cwd=project, env=os.environ | own, **pipes | how)


@pytest.fixture(scope="module")
def computed(project):
    return compute(project)


METHODS = {"none", *TINY["baselines"], *(o + after for o in TINY["optimizers"] for after in ("", "+io"))}
PICTURES = (
    "matrix paired_difference pairs robustness training loss_lines loss_planes sharpness spectrum paths "
    "solutions_plane correlation flatness_against_dice"
)


def test_a_whole_study_ends_in_its_tables_and_one_seed_is_no_failure(project, computed):
    root = project / "runs/tiny"
    assert computed.returncode == 0, computed.stderr
    assert computed.stderr == ""
    assert json.loads((root / "problems.json").read_text()) == []
    results = pd.read_csv(root / "results.csv")
    assert set(results.optimizer) == METHODS
    assert set(results.groupby("optimizer").pair.nunique()) == {4}
    dice = results[results.metric == "dice"].value
    assert dice.between(0, 1).all()
    comparison = pd.read_csv(root / "comparison.csv").query("metric == 'dice'")
    cells = comparison[["baseline", "treatment", "equal", "test_domain"]].drop_duplicates()
    of = {(b, t, e) for b, t, e, _ in cells.itertuples(index=False)}
    assert of == {
        (f"{b}{io}", f"sam{io}", e) for io in ("", "+io") for b, e in (("adam", "steps"), ("adam-2x", "compute"))
    }
    assert len(cells) == len(of) * 2  # on either test domain
    mean = results[(results.metric == "dice") & (results.test_domain == "brain-mr")].groupby("optimizer").value.mean()
    line = comparison.query("baseline == 'adam-2x' and treatment == 'sam' and test_domain == 'brain-mr'")
    assert line["mean"].item() == pytest.approx(mean["sam"] - mean["adam-2x"], abs=1e-9)
    costs = pd.read_csv(root / "costs.csv")
    assert set(costs.optimizer) == METHODS - {"none"}
    assert set(pd.read_csv(root / "robustness.csv").optimizer) == {"none", *TINY["optimizers"]}
    assert set(pd.read_csv(root / "methods.csv").optimizer) == METHODS
    assert {"sam_rise", "ascent_rise", "eigenvalue_1", "trace"} <= set(pd.read_csv(root / "flatness.csv").measure)
    assert set(pd.read_csv(root / "between.csv").kind) == {"path", "plane", "trajectory"}


def test_the_report_shows_every_picture_with_its_caption(project, computed):
    root = project / "runs/tiny"
    assert "sam - adam" in computed.stdout
    assert f"report: {root / 'report.html'}" in computed.stdout
    last = computed.stdout.split("share\n")[1].split("\n\n")[0]
    number = {line.split()[0]: int(line.split()[1]) for line in last.splitlines()}
    assert number == {
        **{"10_train": 3, "20_evaluate": 5, "30_loss_landscape": 3, "35_between_minima": 1, "40_compare": 1}
    }
    assert sum(int(line.split()[-2]) for line in last.splitlines()) == pytest.approx(100, abs=3)
    page = (root / "report.html").read_text()
    report = re.sub(r'<details class="code">.*?</details>', "", page, flags=re.DOTALL)
    assert "report.gather" not in report
    assert "from fmsam_lib.study.gather import gather" in re.sub(r"<[^>]*>", "", page)
    assert "from fmsam_lib.study.gather import gather" not in re.sub(r"<[^>]*>", "", report)
    answer = re.sub(r"<[^>]*>", "", page.partition("<main>")[2].partition("</main>")[0])
    assert answer.startswith("Against Adam at equal compute, SAM changes Dice by ")
    assert "One seed decides nothing" in answer
    assert (root / "summary.txt").read_text().splitlines()[0] in answer
    assert (root / "summary.txt").read_text() in computed.stdout
    assert "No figure" not in report
    assert "Nothing is missing" in report
    assert "one seed only" in report
    names = PICTURES.split()
    assert report.count('src="data:image/png') == len(names) + 3  # an example of each domain, and the first picture
    for name in names:
        assert drawn(root / f"figures/{name}.png"), name
        assert (root / f"figures/{name}.pdf").read_bytes().startswith(b"%PDF")
        caption = (root / f"figures/{name}.txt").read_text()
        assert "Trained on brain-mr; grid of 32 x 32 samples" in caption
        assert (
            caption.split(" Trained on")[0].replace("'", "&#39;") in report or caption.split(" Trained on")[0] in report
        )


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no browser: expected chromium on the PATH (apt install chromium)")
@pytest.mark.parametrize("width", [1200, 800])
def test_the_reports_page_is_short_narrow_and_quick_and_asks_nobody(project, computed, width):
    from playwright.sync_api import sync_playwright

    asked, size = [], "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda request: asked.append(request.url))
        page.goto((project / "runs/tiny/report.html").as_uri())
        closed = page.evaluate(size)
        seconds = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd / 1000")
        picture = page.locator("main img").bounding_box()
        page.locator("main a", has_text="note").click()  # opens the fold that it leads to
        page.locator("summary", has_text="in tables").click()
        opened = page.evaluate(size)
        tables = page.evaluate("[...document.querySelectorAll('table')].map(table => table.scrollWidth)")
        opens = page.evaluate("[...document.querySelectorAll('details[open] > summary')].map(s => s.innerText.trim())")
        browser.close()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert closed[0] == opened[0] == width
    assert closed[1] < 2500
    assert seconds < 1
    assert picture["y"] + picture["height"] < 900  # in the first screen
    assert opens == ["About this study", "Dice of every domain, in tables"]
    assert width == 800 or max(tables) <= 1200
    assert (project / "runs/tiny/report.html").stat().st_size < 4e6


def allow_one_processor():
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux allows a process some processors")
def test_as_many_notebooks_run_as_processors_are_allowed(project, computed):
    process = compute(project, preexec_fn=allow_one_processor)
    assert process.returncode == 0
    assert "study tiny on 1 cores" in process.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["01", "2025.10"])
def test_names_locale_and_kernels_as_strangers_have_them(project, tmp_path, name):
    """Runs in a folder of special characters, without UTF-8, with another kernel `python3` in the person's folders."""
    spec = tmp_path / "jupyter/kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["false", "{connection_file}"], "display_name": "x", "language": "python"}))
    (project / f"studies/{name}.yaml").write_text(yaml.safe_dump(SMALL, allow_unicode=True), encoding="utf-8")
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"}
    env |= {"JUPYTER_PATH": str(tmp_path / "jupyter"), "JUPYTER_DATA_DIR": str(tmp_path / "jupyter")}
    runs = tmp_path / "a #1: {x} é"
    process = compute(project, "--runs", str(runs), study=name, env=env)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert (runs / name / "results.csv").exists()
    assert "Étude → 1" in (runs / name / "report.html").read_text(encoding="utf-8")


def test_results_that_cannot_be_written_end_in_a_sentence(project):
    process = compute(project, "--runs", "README.md")
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"error: the results cannot go to {project}/README.md/tiny (")
    assert "--runs" in line


@pytest.mark.slow
def test_a_checkout_and_a_home_that_are_read_only_do_for_a_study(project, tmp_path):
    (project / "studies/tiny6.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    fixed = f"mount --bind '{project}' '{project}' && mount -o remount,ro,bind '{project}'"
    if subprocess.run(["unshare", "-m", "sh", "-c", fixed], capture_output=True).returncode:
        pytest.skip("only root may mount a folder read-only")
    before = everything(project)
    quick = {"FMSAM_CACHE": "", "HOME": str(project / "home"), "PYTHONDONTWRITEBYTECODE": ""}

    def run(command, **how):
        return subprocess.run(["unshare", "-m", "sh", "-c", f'{fixed} && exec "$@"', "sh", *command], **how)

    process = compute(project, study="tiny6", run=run, env=quick)
    assert process.returncode == 2
    assert f"the results cannot go to {project}/runs/tiny6 (Read-only file system)" in process.stderr
    process = compute(project, "--runs", str(tmp_path), study="tiny6", run=run, env=quick)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "tiny6/report.html").exists()
    assert everything(project) == before


@pytest.mark.slow
def test_the_log_is_shown_where_no_notebook_ran(project, tmp_path):
    spec = project / "profiles/jupyter/kernels/python3/kernel.json"
    right = spec.read_text(encoding="utf-8")
    (project / "studies/tiny3.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    spec.write_text(right.replace("ipykernel_launcher", "no_such_kernel"), encoding="utf-8")
    process = compute(project, "--runs", str(tmp_path), study="tiny3")
    spec.write_text(right, encoding="utf-8")
    assert process.returncode == 1
    assert "failed outside a notebook; the log ends:" in process.stderr
    assert "Error in rule" in process.stderr
    assert "RuntimeError: Kernel died" in process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("end", ["terminate", "interrupt"])
def test_a_study_that_is_ended_takes_its_children_along(project, tmp_path, end):
    (project / "studies/tiny4.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    ignored = {"preexec_fn": partial(signal.signal, signal.SIGINT, signal.SIG_IGN)} if end == "terminate" else {}
    process = compute(project, "--runs", str(tmp_path), "--cores", "1", study="tiny4", run=subprocess.Popen, **ignored)
    deadline, children = time.monotonic() + 90, []
    while not any("ipykernel_launcher" in " ".join(child.cmdline()) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.5)
        children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM if end == "terminate" else signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from here" in said
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    with open(tmp_path / "tiny4/.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_same_study_again_computes_nothing(project, computed):
    trained = project / "runs/tiny/brain-mr/sam/seed0/weights.pt"
    report = project / "runs/tiny/report.html"
    before = trained.stat().st_mtime_ns, report.stat().st_mtime_ns
    assert compute(project).returncode == 0
    assert (trained.stat().st_mtime_ns, report.stat().st_mtime_ns) == before
    assert not (project / "runs/tiny/report_before.html").exists()


@pytest.mark.parametrize("dates", ["kept", "new"])
def test_a_study_that_was_moved_computes_nothing_but_what_is_removed(project, computed, tmp_path, dates):
    """`mv` keeps the dates of files, an unpacked copy may not: here what is read is newer than what is made of it."""
    moved, root, data = tmp_path / "checkout {x} #1", tmp_path / "my runs/tiny", tmp_path / "my data"
    shutil.copytree(project, moved, ignore=shutil.ignore_patterns("runs", "data", "cache"))
    shutil.copytree(project / "runs/tiny", root)
    shutil.copytree(project / "data", data)
    if dates == "new":
        for path in (path for kind in ("*.yaml", "*.pt", "*.csv") for path in root.rglob(kind)):
            path.touch()
    before = everything(root)
    where = ("--runs", str(root.parent), "--data", str(data))
    process = compute(moved, *where)
    assert (process.returncode, process.stderr) == (0, "")
    assert "Nothing to be done" in (root / "snakemake.log").read_text()
    of_its_place = {path for name in NOTEBOOKS for path in root.rglob(f"{name}*.yaml") if "asked" not in path.name}
    same = before.keys() - of_its_place - {root / "snakemake.log"}
    assert {path: of for path, of in everything(root).items() if path in same} == {p: before[p] for p in same}
    if dates == "kept":
        return
    for folder in ("none", "brain-mr/sam"):
        shutil.rmtree(root / folder)
    (project / "data").rename(project / "no data")  # what is missing is made again, of the data's new place
    try:
        process = compute(moved, *where)
    finally:
        (project / "no data").rename(project / "data")
    assert (process.returncode, process.stderr) == (0, "")
    after = everything(root)
    for name in ("results", "robustness", "landscape", "flatness", "between", "comparison", "summary"):
        assert after[root / f"{name}.csv"][0] == before[root / f"{name}.csv"][0]
    for name in ("weights.pt", "results.csv"):  # that were there
        path = root / "brain-mr/adam/seed0" / name
        assert after[path] == before[path]


def everything(folder):
    """The bytes and date of every file."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": TINY["train"] | {"steps": 30}}, "steps: 10 there, 30 in the study"),
        ({"shape": [48, 32]}, "shape: [32, 32] there, [48, 32] in the study"),
        ({"train": {k: v for k, v in TINY["train"].items() if k != "batch"}}, "batch: 1 there, 2 in the study"),
    ],
)
def test_a_study_edited_after_it_ran_is_refused_and_loses_nothing(project, computed, change, said):
    root = project / "runs/tiny"
    before = everything(root)
    (project / "studies/tiny.yaml").write_text(yaml.safe_dump(TINY | change))
    try:
        process = compute(project)
    finally:
        (project / "studies/tiny.yaml").write_text(yaml.safe_dump(TINY))
    assert process.returncode == 2
    assert everything(root) == before
    assert f"{root}/brain-mr/adam/seed0: {said}" in process.stderr
    assert "give the changed study another name" in process.stderr
    assert "delete these folders" in process.stderr


@pytest.mark.slow
def test_a_training_that_refuses_to_run_again_keeps_its_weights(project, tmp_path):
    """Whatever the reason, here a seed of the data set that the study cannot know; the report stays beside."""
    study, run, report = project / "studies/tiny5.yaml", tmp_path / "tiny5/brain-mr/adam/seed0", "tiny5/report.html"
    study.write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    assert compute(project, "--runs", str(tmp_path), study="tiny5").returncode == 0
    weights, page = (run / "weights.pt").read_bytes(), (tmp_path / report).read_bytes()
    content = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (run / "config.json").write_text(json.dumps(content | {"domain_seed": 7}), encoding="utf-8")
    study.write_text(yaml.safe_dump(SMALL | {"train": SMALL["train"] | {"save_memory": True}}), encoding="utf-8")
    process = compute(project, "--runs", str(tmp_path), study="tiny5")
    assert process.returncode == 1
    assert "domain_seed: 7 there, 0 now" in process.stderr
    assert (run / "weights.pt").read_bytes() == weights
    assert (tmp_path / "tiny5/report_before.html").read_bytes() == page


def test_two_processes_do_not_compute_the_same_study(project, computed):
    with open(project / "runs/tiny/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = compute(project)
    assert process.returncode == 2
    assert "another process is computing this study" in process.stderr


@pytest.fixture(scope="module")
def damaged(project, computed):
    """Again, when a file is cut short, a run's folder holds another training and the library has changed."""
    with open(project / "fmsam_lib/pair.py", "a") as module:
        module.write("# changed\n")
    root, path = project / "runs/tiny", project / "data/Real/imagesTr/p4.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    config = root / "brain-mr/sam/seed0/config.json"
    content = json.loads(config.read_text())
    content["parameters"]["lr"] = 0.5
    config.write_text(json.dumps(content))
    for name in ("none/results.csv", "brain-mr/adam/seed0/landscape.csv", "brain-mr/sam/seed0/weights.pt"):
        (root / name).unlink()
    return compute(project)


def test_a_damaged_file_is_named_and_the_rest_computed(project, damaged):
    root = project / "runs/tiny"
    assert damaged.returncode == 1
    assert "problem: " in damaged.stderr
    assert "p4.nii.gz" in damaged.stderr
    results = pd.read_csv(root / "results.csv")
    counts = results[results.optimizer == "none"].groupby("test_domain").pair.nunique()
    assert counts.to_dict() == {"Real": 1, "brain-mr": 2}
    assert "Real" in set(pd.read_csv(root / "brain-mr/adam/seed0/landscape.csv").test_domain)  # of the other pair
    assert "p4.nii.gz" in (root / "report.html").read_text()


def test_a_failed_training_keeps_what_the_others_did(project, damaged):
    """It is refused, named, and the rest is compared."""
    assert "lr: 0.5 there, 0.001 now" in damaged.stderr
    assert "brain-mr/sam/seed0: this run was not trained to its end" in damaged.stderr
    assert set(pd.read_csv(project / "runs/tiny/results.csv").optimizer) == METHODS - {"sam", "sam+io"}


def test_a_study_that_goes_on_with_another_version_of_the_library_says_so(project, damaged):
    (line,) = [line for line in damaged.stderr.splitlines() if "the runs differ in the library (hash" in line]
    made_by = json.loads((project / "runs/tiny/sources.json").read_text())
    second = made_by["none/20_evaluate"]  # as whatever else tests on the file that was cut
    first = json.loads((project / "runs/tiny/brain-mr/adam/seed0/config.json").read_text())["provenance"]["sources"]
    assert first != second
    assert f"{first} in " in line
    assert f"{second} in " in line
    assert line.split(f"{second} in ")[1].startswith("6, first none/20_evaluate")  # io, and two of each Adam
    assert f"computed by the library's sources {first}, not by the present ones" in (
        (project / "runs/tiny/report.html").read_text().replace("&#39;", "'")
    )


@pytest.mark.slow
def test_a_file_that_was_mended_is_measured_again(project, damaged):
    root, path = project / "runs/tiny", project / "data/Real/imagesTr/p4.nii.gz"
    shutil.copy(path.with_name("p3.nii.gz"), path)
    process = compute(project)
    assert "p4.nii.gz" not in process.stderr
    results = pd.read_csv(root / "results.csv")
    assert results[results.optimizer == "none"].groupby("test_domain").pair.nunique().to_dict() == {
        "Real": 2,
        "brain-mr": 2,
    }


def test_a_missing_training_domain_is_an_error_before_anything_is_computed(project):
    study = TINY | {"train_domains": ["NoSuchSet"]}
    (project / "studies/tiny2.yaml").write_text(yaml.safe_dump(study))
    process = compute(project, study="tiny2")
    assert process.returncode == 2
    assert "NoSuchSet" in process.stderr
    assert "brain-mr" in process.stderr  # what there is
    assert not (project / "runs/tiny2").exists()
