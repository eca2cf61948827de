import json
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml

from fmsam_lib.checking import read
from fmsam_lib.evaluation.evaluate import COLUMNS, CURVES, read_results
from fmsam_lib.flatness.landscape import COLUMNS as LANDSCAPE
from fmsam_lib.flatness.landscape import RUN
from fmsam_lib.flatness.mode_connectivity import COLUMNS as BETWEEN
from fmsam_lib.flatness.sharpness import COLUMNS as FLATNESS
from fmsam_lib.model.network import GradICON
from fmsam_lib.parameters import Train
from fmsam_lib.records import DataError, sources, write_csv
from fmsam_lib.study.file import read_study
from fmsam_lib.study.gather import gather
from fmsam_lib.study.grid import grid, twins
from fmsam_lib.study.notebooks import jobs

STUDY = {
    "description": "made up",
    "train_domains": ["a"],
    "test_domains": ["a", "b"],
    "optimizers": ["adam", "sam"],
    "seeds": [0, 1],
    "shape": [32, 32],
    "train": {"steps": 7, "rho": 0.01},
    "evaluate": {},
    "landscape": {},
}


def result(test, metric, value, *, unit="1", label="", pair="p"):
    return {"test_domain": test, "pair": pair, "label": label, "metric": metric, "value": value, "unit": unit}


def rows_of(tests=("a", "b"), dice=0.5):
    labelled = [result(test, "dice", dice, label="x") for test in tests]
    return [*labelled, *(result(test, "folding_percent", 0.0, unit="%") for test in tests)]


@pytest.fixture
def make(tmp_path):
    """Writes a study, `STUDY` with changes, and all that its notebooks would leave; returns study and folder."""

    def write(**changes):
        path, root = tmp_path / "made_up.yaml", tmp_path / "runs"
        path.write_text(yaml.safe_dump(STUDY | changes))
        study = read_study(path)
        for name in ("none", *(["io"] if "io" in study.baselines else [])):
            save(root / name, rows_of(), train_domain="", optimizer=name, seed=None)
        for job in (job for job in jobs(study, root, "", path) if job.notebook == "10_train"):
            folder, values = root / job.folder, read(Train, job.values).model_dump()
            about = {name: values[name] for name in ("train_domain", "optimizer", "seed")}
            save(folder, rows_of(), **about)
            made = {"commit": "abc", "cpu": "one", "cores": 2, "packages": {"torch": "2"}, "time": "now"}
            config = {"parameters": values, "provenance": made | {"sources": sources()}}
            (folder / "config.json").write_text(json.dumps(config))
            (folder / "weights.pt").touch()
            history = {"step": 7, "total": 0.4, "seconds": 0.1}
            (folder / "history.jsonl").write_text(json.dumps(history) + "\n")
            common = about | {"test_domain": "training", "term": "total", "value": 1.0}
            table(folder / "landscape.csv", LANDSCAPE, common | {"kind": "line", "direction": 0, "alpha": 0.0})
            table(folder / "flatness.csv", RUN + FLATNESS, common | {"measure": "sam_rise", "rho": 0.01})
        for a, b in twins(study):
            about = {"train_domain": a.train_domain, "seed": a.seed, "baseline": a.optimizer, "treatment": b.optimizer}
            line = about | {"test_domain": "b", "kind": "path", "alpha": 0.5, "term": "total", "value": 1.0}
            table(root / f"{a.train_domain}/between/seed{a.seed}/between.csv", BETWEEN, line)
        return study, root

    return write


def table(path, columns, line):
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([line], columns=columns).to_csv(path, index=False)


def save(folder, rows, **about):
    write_csv(pd.DataFrame(rows).assign(**about), folder / "results.csv", COLUMNS)
    costs = [result("a", "seconds", 0.1, unit="s")]
    write_csv(pd.DataFrame(costs).assign(**about), folder / "costs.csv", COLUMNS)
    curve = {"test_domain": "a", "pair": "p", "corruption": "noise", "severity": 0.0, "metric": "dice", "value": 0.5}
    write_csv(pd.DataFrame([curve]).assign(**about), folder / "robustness.csv", CURVES)
    pairs = {(row["test_domain"], row["pair"]) for row in rows}
    subjects = [{"test_domain": test, "pair": pair, "subjects": f"{pair}1|{pair}2"} for test, pair in sorted(pairs)]
    write_csv(pd.DataFrame(subjects), folder / "pairs.csv", ["test_domain", "pair", "subjects"])


def test_of_a_whole_study_nothing_is_missing(make):
    study, root = make(baselines=["io"])
    found = gather(study, root)
    assert found.problems == []
    assert found.notes == []
    assert set(found.results.optimizer) == {"none", "io", "adam", "sam"}
    assert found.configs.keys() == {run.folder for run in grid(study)}
    for name, lines in {"costs": 6, "landscape": 4, "flatness": 4, "between": 2, "history": 4, "robustness": 6}.items():
        assert len(getattr(found, name)) == lines, name
    assert found.results.value.dtype == float
    assert found.history.optimizer.tolist() == ["adam", "adam", "sam", "sam"]
    assert found.pairs.values.tolist() == [["a", "p", "p1|p2"], ["b", "p", "p1|p2"]]  # of five methods, each once


TABLES = [
    *("none/results.csv", "io/costs.csv", "a/between/seed1/between.csv", "a/sam/seed1/history.jsonl"),
    *(f"a/sam/seed1/{name}.csv" for name in ("results", "costs", "pairs", "robustness", "landscape", "flatness")),
]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, "missing") for name in TABLES),
        *((name, "another table") for name in TABLES[2:5]),
        *((name, damage) for name in TABLES[3:5] for damage in ("empty", "not a table")),
    ],
)
def test_a_table_that_is_missing_or_damaged_is_named_and_the_rest_is_there(make, name, damage):
    study, root = make(baselines=["io"])
    whole = gather(study, root)
    path = root / name
    path.unlink()
    content = {"empty": b"", "another table": b"x,y\n1,2\n", "not a table": b"\x89PNG\xff\xfe\x00 {"}
    if damage != "missing":
        path.write_bytes(content[damage])
    found = gather(study, root)
    assert len(found.problems) == 1, found.problems
    says = "this was not computed" if damage == "missing" else "this cannot be read"
    assert found.problems[0].startswith(f"{name}: {says}")
    assert ("remove it and weights.pt, compute again" in found.problems[0]) == (name == TABLES[3] and says[-2:] == "ad")
    kind = path.stem
    for other in whole._fields[:8]:
        same = len(getattr(found, other)) == len(getattr(whole, other))
        assert same is (other != kind or kind == "pairs"), other  # which are the same in every run


def test_text_where_a_number_should_be_is_damage(make):
    study, root = make()
    path = root / "a/sam/seed0/results.csv"
    path.write_text(path.read_text().replace("0.5", "O.5"))
    (problem,) = gather(study, root).problems
    assert problem.startswith("a/sam/seed0/results.csv: this cannot be read (")


def test_a_run_that_was_not_trained_to_its_end_is_named_whatever_it_left(make):
    study, root = make()
    (root / "a/sam/seed1/weights.pt").unlink()
    found = gather(study, root)
    assert found.problems == ["a/sam/seed1: this run was not trained to its end"]
    assert len(found.results) == len(rows_of()) * 4  # none and three runs
    assert "no result of sam, seed 1, trained on a, tested on b" in found.notes
    assert len(found.between) == 1  # what lies between that run and its twin is not of this study either


def test_a_run_with_other_parameters_than_the_studys_is_left_out_and_named(make):
    study, root = make()
    path = root / "a/adam/seed0/config.json"
    config = json.loads(path.read_text())
    config["parameters"] |= {"steps": 9, "threads": 8, "data": "/elsewhere", "snapshots": 4}  # the others may differ
    path.write_text(json.dumps(config))
    found = gather(study, root)
    assert found.problems == ["a/adam/seed0: a run of another study, left out (steps: 9 there, 7 in the study)"]
    assert "a/adam/seed0" not in found.configs
    assert len(found.results.query("optimizer == 'adam'")) == len(rows_of())


def test_runs_that_differ_in_what_the_study_leaves_open_are_named(make):
    study, root = make()
    path = root / "a/sam/seed1/config.json"
    config = json.loads(path.read_text())
    config["parameters"]["lr"] = 0.1
    path.write_text(json.dumps(config))
    assert gather(study, root).problems == [
        "the runs differ in lr (0.001 in 3, first a/adam/seed0; 0.1 in 1, first a/sam/seed1): are several "
        "studies mixed?"
    ]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_run_whose_record_cannot_be_read_is_left_out_and_named(make, content):
    study, root = make()
    path = root / "a/adam/seed0/config.json"
    path.unlink() if content is None else path.write_text(content)
    found = gather(study, root)
    (problem,) = found.problems
    assert problem.startswith("a/adam/seed0/config.json: this cannot be read, so the run is left out")
    assert len(found.results.query("optimizer == 'adam'")) == len(rows_of())


def test_results_of_a_test_domain_that_the_study_does_not_have_are_left_out_and_named(make):
    study, root = make()
    save(root / "a/sam/seed0", rows_of(("a", "b", "c", "d")), train_domain="a", optimizer="sam", seed=0)
    found = gather(study, root)
    assert found.problems == ["results of c, d, which the study does not test on, are left out"]
    assert set(found.results.test_domain) == {"a", "b"}
    assert set(found.landscape.test_domain) == {"training"}
    assert found.notes == []


def test_a_domain_left_out_of_the_tests_is_told_of_first(make):
    study, root = make()
    (root / "left_out.json").write_text(json.dumps(["b is left out of the tests: no such folder"]))
    (root / "none/problems.json").write_text(json.dumps(["ants is not there", "p is cut short"]))
    (root / "a/sam/seed0/problems.json").write_text(json.dumps(["p is cut short"]))
    expected = ["b is left out of the tests: no such folder", "ants is not there", "p is cut short"]
    assert gather(study, root).problems == expected  # each once
    (root / "a/sam/seed0/problems.json").write_text("[")
    assert "a/sam/seed0/problems.json: this cannot be read" in gather(study, root).problems[-1]


def test_values_that_are_nan_are_named_in_the_notes(make):
    study, root = make()
    rows = [*rows_of(), result("a", "hd95", np.nan, unit="mm", label="x")]
    save(root / "a/sam/seed0", rows, train_domain="a", optimizer="sam", seed=0)
    found = gather(study, root)
    assert found.problems == []
    assert found.notes == ["hd95 of sam: 1 values are NaN; they are left out of means"]


@pytest.mark.parametrize(("first", "told"), [(2.0, "2"), (2e7, "2e+07")])  # the second before it was first logged
def test_a_training_that_diverged_is_named_in_the_notes(make, first, told):
    study, root = make()
    lines = [{"step": step, "total": total, "seconds": 0.1} for step, total in ((10, first), (20, 2e4))]
    (root / "a/sam/seed0/history.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert gather(study, root).notes == [f"sam, seed 0, trained on a diverged: loss {told}, then 2e+04"]


def test_what_the_weights_to_start_from_have_seen_is_a_note(make):
    net = GradICON(2, down=(4,), levels=1)
    _, root = make()
    net.about = {"seen": {"a": {}, "b": {}, "c": {}}}
    net.save(root / "old.pt")
    for weights, notes in (
        ("gone.pt", []),
        (str(root / "old.pt"), [f"b: tested as never seen, but the weights {root / 'old.pt'} it began with saw it"]),
    ):
        found = gather(*make(train=STUDY["train"] | {"weights": weights}))
        assert found.notes == notes


def test_one_seed_is_a_note_not_a_problem(make):
    found = gather(*make(seeds=[3]))
    assert found.problems == []
    assert [note for note in found.notes if note.startswith("one seed only")] == found.notes != []


def test_a_domain_without_labels_is_told_of(make):
    study, root = make()
    for folder in (root / "none", *(root / run.folder for run in grid(study))):
        path = folder / "results.csv"
        rows = read_results(path)
        write_csv(rows[(rows.test_domain != "b") | (rows.metric != "dice")], path, COLUMNS)
    assert gather(study, root).notes == ["b has no labels: no Dice, no distances"]


def test_a_study_without_any_result_is_an_error(make, tmp_path):
    study, root = make()
    shutil.rmtree(root)
    with pytest.raises(DataError, match=r"no results under .*run the study first"):
        gather(study, root)


def test_runs_that_cannot_be_read_are_named_where_no_other_is_left(make):
    study, root = make()
    for run in grid(study):
        (root / run.folder / "results.csv").write_text("torn")
    assert (root / "none" / "results.csv").exists()
    with pytest.raises(DataError, match=r"no results under .*\n- a/adam/seed0/results\.csv: this cannot be read"):
        gather(study, root)


def test_variants_keep_their_names_with_instance_optimisation_too(make):
    study, root = make(optimizers=["adam", "sam-1"], variants={"sam-1": {"optimizer": "sam", "rho": 1.0}})
    path = root / "a/sam-1/seed0/results.csv"
    rows = read_results(path)
    assert set(rows.optimizer) == {"sam"}  # the run does not know the study's name for it
    write_csv(pd.concat([rows, rows.assign(optimizer="sam+io")]), path, COLUMNS)
    found = gather(study, root)
    assert found.problems == []
    assert set(found.results.optimizer) == {"none", "adam", "sam-1", "sam-1+io"}
    for name in ("costs", "landscape", "flatness", "history"):
        assert set(getattr(found, name).optimizer.dropna()) >= {"adam", "sam-1"}, name
        assert "sam" not in set(getattr(found, name).optimizer), name


def test_a_variant_and_the_optimizer_it_varies_keep_their_own_seconds(make):
    names = ["adam", "sam", "sam-1"]
    study, root = make(optimizers=names, seeds=[0], variants={"sam-1": {"optimizer": "sam", "rho": 1.0}})
    for i, name in enumerate(names):
        line = {"step": 7, "total": 0.4, "seconds": float(i)}
        (root / f"a/{name}/seed0/history.jsonl").write_text(json.dumps(line) + "\n")
    history = gather(study, root).history
    assert history[["train_domain", "optimizer", "seed", "seconds"]].values.tolist() == [
        ["a", "adam", 0, 0.0],
        ["a", "sam", 0, 1.0],
        ["a", "sam-1", 0, 2.0],
    ]


def test_a_table_that_no_run_has_is_empty_and_has_its_columns(make):
    study, root = make()
    for name in ("history.jsonl", "landscape.csv", "flatness.csv", "between.csv"):
        for path in root.rglob(name):
            path.unlink()
    found = gather(study, root)
    assert list(found.history) == ["train_domain", "optimizer", "seed", "step", "total", "seconds"]
    assert list(found.landscape) == LANDSCAPE
    assert set(found.flatness) == {*RUN, *FLATNESS}
    assert list(found.between) == BETWEEN
    assert not any(len(table) for table in (found.history, found.landscape, found.flatness, found.between))
    assert not found.history[found.history.optimizer == "sam"].seconds.median() > 0  # can be asked


def test_runs_that_began_with_other_weights_of_one_name_are_named(make):
    study, root = make()
    for path in root.glob("*/*/seed*/config.json"):
        config = json.loads(path.read_text())
        config["parameters"]["weights"] = "base.pt"
        config["start"] = "of another day" if "sam/seed1" in str(path) else "of one day"
        path.write_text(json.dumps(config))
    study = study.model_copy(update={"train": study.train | {"weights": "base.pt"}})
    (problem,) = gather(study, root).problems
    assert problem.startswith("the runs differ in the content of base.pt, which they began with (of one day in 3")


# --- versions of the library ---


def trained_by(root, folder, there, **more):
    """Another hash of the sources in a run's record."""
    path = root / folder / "config.json"
    config = json.loads(path.read_text())
    config["provenance"]["sources"] = there
    path.write_text(json.dumps(config | more))


def test_runs_of_several_versions_of_the_library_are_named(make):
    study, root = make()
    trained_by(root, "a/sam/seed1", "0123456789ab")
    found = gather(study, root)
    (problem,) = found.problems
    assert problem.startswith("the runs differ in the library (hash of its sources) (")
    assert f"{sources()} in 3, first a/adam/seed0" in problem
    assert "0123456789ab in 1, first a/sam/seed1" in problem
    assert len(found.results) == len(gather(*make()).results)  # named, not left out


def test_a_training_that_went_on_with_another_version_is_named(make):
    study, root = make()
    trained_by(root, "a/sam/seed1", sources(), resumed=[{"step": 5, "sources": sources()}])
    assert gather(study, root).problems == []
    trained_by(root, "a/sam/seed1", sources(), resumed=[{"step": 5, "sources": "0123456789ab"}])
    (problem,) = gather(study, root).problems
    assert "0123456789ab in 1, first a/sam/seed1 from step 5" in problem


def test_tables_of_another_version_than_the_trainings_are_named(make):
    study, root = make()
    made_by = {job.name: sources() for job in jobs(study, root, "", root)[:-1] if job.notebook != "10_train"}
    (root / "sources.json").write_text(json.dumps(made_by))
    assert gather(study, root).problems == []
    (root / "sources.json").write_text(json.dumps(made_by | {"a/sam/seed0/30_loss_landscape": "0123456789ab"}))
    (problem,) = gather(study, root).problems
    assert "0123456789ab in 1, first a/sam/seed0/30_loss_landscape" in problem


def test_another_version_than_the_present_one_is_a_note_not_a_problem(make):
    study, root = make()
    for run in grid(study):
        trained_by(root, run.folder, "0123456789ab")
    found = gather(study, root)
    assert found.problems == []
    assert found.notes == [f"computed by the library's sources 0123456789ab, not by the present ones, {sources()}"]


@pytest.mark.parametrize("name", ["parameters", "provenance"])
def test_a_record_that_lacks_a_field_is_left_out_and_named(make, name):
    study, root = make()
    path = root / "a/adam/seed0/config.json"
    config = json.loads(path.read_text())
    del config[name]["sources" if name == "provenance" else "joint"]
    path.write_text(json.dumps(config))
    (problem,) = gather(study, root).problems
    assert problem.startswith("a/adam/seed0/config.json: this cannot be read, so the run is left out")
