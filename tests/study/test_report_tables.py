"""The report's tables and captions, made by notebook 40 from made-up results."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from nbconvert import HTMLExporter
from nbformat import v4

from fmsam_lib.evaluation.evaluate import COLUMNS, read_results
from fmsam_lib.parameters import Compare
from fmsam_lib.study.grid import compared
from tests.conftest import PROJECT
from tests.evaluation.test_comparison import made_up
from tests.study.report import CELLS, STUDY, run


@pytest.fixture
def settings(tmp_path):
    return Compare(study="s", folder=str(tmp_path))


@pytest.fixture
def summary(settings):
    """Makes the summary, as a table and as a reader sees it."""

    def made(results):
        done = run("summary", "summary_text", results=results, settings=settings, about="all", sentence="better")
        return done.tables["summary"], done.readable(done.tables["summary"])

    return made


def test_the_summary_finds_a_constant_gain_exactly(summary):
    line = summary(made_up())[0].iloc[0]
    assert line["sam - adam"] == pytest.approx(0.1)
    assert line["sam - adam low"] == pytest.approx(0.1)
    assert line["sam"] - line["before"] == pytest.approx(0.3)
    assert (line["seen"], line["pairs"], line["seeds"]) == ("yes", 8, 2)


def test_methods_without_training_stand_beside_the_networks(summary):
    rows = made_up()
    others = [
        rows[rows.optimizer == "none"].assign(optimizer=name, value=v) for name, v in (("io", 0.7), ("ants-syn", 0.8))
    ]
    line = summary(pd.concat([rows, *others]))[0].iloc[0]
    assert (line["io"], line["ants-syn"]) == pytest.approx((0.7, 0.8))


def test_without_the_treatment_there_is_no_difference_but_a_summary(summary):
    table, text = summary(made_up().query("optimizer != 'sam'"))
    assert "adam" in table.columns
    assert "sam - adam" not in table.columns
    assert "adam" in text.columns


def test_the_readable_table_says_what_the_numbers_say(summary, tmp_path):
    table, text = summary(made_up())
    line = text.iloc[0]
    assert line["sam - adam [95 %]"] == "0.100 [0.100, 0.100]"
    assert line["before"] == f"{table.before.item():.3f}"
    assert (line["tested on"], line["pairs"]) == ("T", "8")
    assert (tmp_path / "summary.txt").read_text() == f"better\n\nall\n\n{text.to_string(index=False)}\n"


def test_a_domain_without_labels_stays_in_the_summary(summary):
    rows = made_up()
    folding = rows.query("label == 'x' and optimizer != 'none'").assign(
        test_domain="Unlabelled", metric="folding_percent", label="", value=100.0
    )
    table, text = summary(pd.concat([rows, folding]))
    line = table.set_index("test_domain").loc["Unlabelled"]
    assert line["folding sam %"] == 100
    assert np.isnan(line["sam"])
    assert text.set_index("tested on").loc["Unlabelled", "folding sam %"] == "100.000"


def test_robustness_is_compared_at_every_step():
    steps = [made_up(gain).assign(corruption="noise", severity=s) for s, gain in ((0.0, 0.0), (0.5, 0.1))]
    rows, against = pd.concat(steps).query("label == 'x'"), [("adam", "sam"), ("adam-2x", "sam")]
    table = run("robustness_differences", robustness=rows, against=against).tables["robustness_differences"]
    assert table[["corruption", "severity", "baseline"]].values.tolist() == [
        ["noise", 0.0, "adam"],
        ["noise", 0.5, "adam"],
    ]
    assert table["mean"].tolist() == pytest.approx([0.0, 0.1])
    assert table.seeds.tolist() == [2, 2]
    assert run("robustness_differences", robustness=rows.head(0)).tables["robustness_differences"].empty
    apart = rows[(rows.optimizer == "adam") == (rows.seed == 0)]
    assert run("robustness_differences", robustness=apart, against=against).tables["robustness_differences"].empty


def test_methods_have_means_intervals_seconds_and_units():
    rows = made_up(0.02, tests=("T", "U"), spread=0.05)
    distances = rows.assign(metric="hd95", unit=rows.test_domain.map({"T": "mm", "U": "voxel"}))
    costs = rows[rows.label == "x"].assign(label="", metric="seconds", value=0.25, unit="s")
    costs = costs[costs.optimizer != "none"]
    table = run("methods", results=pd.concat([rows, distances]), costs=costs).tables["methods"]
    assert set(table[(table.metric == "hd95") & (table.test_domain == "U")].unit) == {"voxel"}
    dice = table[(table.metric == "dice") & (table.test_domain == "T")].set_index("optimizer")
    assert set(dice.index) == {"none", "adam", "sam"}
    assert dice.seconds[["adam", "sam"]].tolist() == [0.25] * 2
    assert np.isnan(dice.seconds["none"])
    assert (dice.low <= dice["mean"]).all()
    assert dice.loc["sam", "seeds"] == 2


@pytest.mark.parametrize(
    ("optimizers", "there", "expected"),
    [
        (["adam"], [], []),
        (["adam", "sam"], [], [("adam", "sam")]),
        (["adam", "adam-2x"], [], [("adam", "adam-2x")]),
        (["sam", "adam-2x", "adam"], [], [("adam", "sam"), ("adam-2x", "sam")]),
        (["adam", "sam", "asam"], [], [("adam", "sam"), ("adam", "asam")]),
        (["adam", "sam"], ["adam+io"], [("adam", "sam")]),
        (["adam", "sam"], ["adam+io", "sam+io"], [("adam", "sam"), ("adam+io", "sam+io")]),
    ],
)
def test_what_is_compared_with_what(optimizers, there, expected):
    study = STUDY.model_copy(update={"optimizers": optimizers})
    results = pd.DataFrame({"optimizer": [*optimizers, *there]})
    asked = Compare(**dict(zip(("baseline", "treatment"), compared(study), strict=True)))
    assert run(study=study, results=results, settings=asked).compare_what() == expected


def test_a_contrast_that_is_asked_for_is_made_beside_the_others():
    optimizers = ["adam", "adam-2x", "sam", "adam-4x", "sam-2x"]
    study = STUDY.model_copy(update={"optimizers": optimizers})
    asked = Compare(baseline="adam-4x", treatment="sam-2x")
    found = run(study=study, settings=asked, results=pd.DataFrame({"optimizer": optimizers}))
    assert found.compare_what()[-1] == ("adam-4x", "sam-2x")
    assert ("adam-2x", "sam") in found.compare_what()


def test_in_a_sweep_a_variant_of_a_fixed_value_is_compared_with_adam_of_that_value():
    optimizers = ["adam-lr=0.002", "adam-lr=0.01", "sam-lr=0.002", "sam-lr=0.01", "slow"]
    study = STUDY.model_copy(update={"optimizers": optimizers, "variants": {"slow": {"optimizer": "sam", "lr": 0.002}}})
    asked = Compare(baseline="adam-lr=0.002", treatment="sam-lr=0.002")
    pairs = run(study=study, settings=asked, results=pd.DataFrame({"optimizer": optimizers})).compare_what()
    assert pairs == [*zip(optimizers[:2], optimizers[2:4], strict=True), ("adam-lr=0.002", "slow")]


def test_a_variants_own_list_is_the_value_of_a_sweep_of_lists():
    optimizers = ["adam-down=4_8", "adam-down=8_8", "sam-down=4_8", "sam-down=8_8", "small"]
    variants = {"small": {"optimizer": "sam", "down": [4, 8]}}
    study = STUDY.model_copy(update={"optimizers": optimizers, "variants": variants})
    asked = Compare(baseline=optimizers[0], treatment=optimizers[2])
    pairs = run(study=study, settings=asked, results=pd.DataFrame({"optimizer": optimizers})).compare_what()
    assert ("adam-down=4_8", "small") in pairs
    assert ("adam-down=8_8", "small") not in pairs


def test_a_caption_says_data_pairs_and_seeds_and_stands_beside_its_figure(settings, tmp_path):
    rows = made_up(tests=("a", "b"), train="a")
    done = run(results=rows, settings=settings, real=("figure",))
    with done.figure("matrix", "Mean Dice.", rows) as block:
        block.picture = Figure()
    says = "Mean Dice. Trained on a; grid of 32 x 32 samples; test pairs: a 8, b 8; 2 seeds (0, 1).\n"
    assert (tmp_path / "figures/matrix.txt").read_text() == says
    assert (tmp_path / "figures/matrix.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figures/matrix.pdf").read_bytes().startswith(b"%PDF")
    only = pd.DataFrame({"train_domain": ["a"], "seed": [1]})
    assert done.facts(only) == "Trained on a; grid of 32 x 32 samples; 1 seed (1)"
    about = run("about", results=rows).about
    assert "tested on a (8 pairs), b (8 pairs); optimizers adam, sam; 2 seeds (0, 1); grid of 32 x 32 samples." in about


def test_a_figure_that_cannot_be_drawn_is_named_and_the_report_goes_on(settings, tmp_path, capsys):
    done = run(settings=settings, real=("figure",))
    shown = []
    done.figure.__wrapped__.__globals__["display"] = shown.append
    with done.figure("matrix", "Mean Dice.", pd.DataFrame()):
        raise ValueError("expected rows, got none")
    assert [message.data for message in shown] == [
        "**No figure `matrix`**, for this was not measured in this study: expected rows, got none"
    ]
    assert not (tmp_path / "figures").exists()


def test_the_tables_of_all_runs_are_written_together(settings, tmp_path):
    results = made_up()
    flatness = pd.DataFrame({"train_domain": ["a", "a"], "value": [1.0, 2.0]})
    run("tables", results=results.assign(drawn="x"), flatness=flatness, settings=settings, real=("keep_table",))
    back = read_results(tmp_path / "results.csv")
    assert list(back.columns) == COLUMNS  # without what the intervals draw
    assert back.value.tolist() == results.value.tolist()  # to the bit
    assert len(pd.read_csv(tmp_path / "flatness.csv")) == 2
    assert json.loads((tmp_path / "problems.json").read_text()) == []


def config(optimizer="sam", train_domain="d", **parameters):
    made = {"commit": "abc", "cpu": "one", "cores": 2, "packages": {"torch": "2"}, "time": "now"}
    return {
        "parameters": {"train_domain": train_domain, "optimizer": optimizer, "seed": 0, "threads": 1}
        | {"climb": "batch", "late": 0.0}
        | parameters,
        "provenance": made,
    }


def provenance(**given):
    shown = []
    run("provenance", display=lambda markdown: shown.append(markdown.data), **given)
    return [[part.strip() for part in line.split("|")[1:-1]] for line in shown[0].splitlines()[2:]]


def test_a_variant_has_its_own_seconds_and_not_those_of_the_optimizer_that_it_varies():
    history = pd.DataFrame({"train_domain": "d", "seed": 0, "optimizer": ["sam", "sam-0.03"], "seconds": [1.0, 9.0]})
    configs = {"d/sam/seed0": config(), "d/sam-0.03/seed0": config()}
    assert [line[5] for line in provenance(history=history, configs=configs)] == ["1.000", "9.000"]
    only = {"d/sam-0.03/seed0": config()}
    lines = provenance(history=history[history.optimizer != "sam"], configs=only)
    assert lines == [["d/sam-0.03/seed0", "abc", "one (2 cores)", "2", "1", "9.000", "now"]]


def test_the_comparison_says_what_both_spent_alike():
    """By their histories, of averaged weights too; nothing where neither is equal, or where one has no history."""
    study = STUDY.model_copy(update={"optimizers": ["adam", "adam-2x", "sam", "late", "lost"], "variants": {}})
    spent = {"adam": (4, 4), "adam-2x": (8, 8), "sam": (4, 8), "late": (5, 7)}
    history = [{"optimizer": name, "step": n, "gradient_evaluations": g} for name, (n, g) in spent.items()]
    names = [*study.optimizers, "adam-2x+ema", "sam+ema"]
    table = run("comparison", results=made_up(optimizers=names), study=study, history=pd.DataFrame(history))
    table = table.tables["comparison"].drop_duplicates(["baseline", "treatment"]).set_index(["baseline", "treatment"])
    assert list(table.columns).index("equal") == list(table.columns).index("seeds") - 1
    assert table.equal.to_dict() == {
        ("adam", "sam"): "steps", ("adam-2x", "sam"): "compute", ("adam-2x+ema", "sam+ema"): "compute",
        **{(adam, name): "" for adam in ("adam", "adam-2x") for name in ("late", "lost")},
    }  # fmt: skip


def test_every_training_has_a_line_with_its_parameters():
    configs = {f"d/sam-{name}/seed0": config(rho=rho, down=[4, 8]) for name, rho in (("rho=0.1", 0.1), ("late", 0.2))}
    table = run("tables", configs=configs).tables["trainings"].set_index("optimizer")
    assert table.rho.to_dict() == {"sam-rho=0.1": 0.1, "sam-late": 0.2}
    assert table.loc["sam-late", ["train_domain", "seed", "trained_with", "down"]].tolist() == ["d", 0, "sam", [4, 8]]


def test_a_run_whose_history_was_not_read_has_its_line_of_provenance():
    assert [line[5] for line in provenance(configs={"d/sam/seed0": config()})] == ["–"]


def test_radii_have_a_line_for_seen_and_for_unseen_domains():
    rows = [
        {"train_domain": "a+b", "optimizer": name, "seed": 0, "test_domain": test, "metric": "dice", "value": value}
        | {"pair": pair, "label": "x", "unit": "1"}
        for name, shift in (("sam-0.1", 0.0), ("sam-0.2", 0.1))
        for test, value in (("a", 0.5 + shift), ("b", 0.7 + shift), ("c", 0.3 + shift))
        for pair in ("p", "q")
    ]
    history = [
        {"train_domain": "a+b", "optimizer": name, "seed": 0, "step": step, "total": float(step)}
        for name in ("sam-0.1", "sam-0.2")
        for step in range(20)
    ]
    configs = {f"all-but-c/sam-{rho}/seed0": config(train_domain="a+b", rho=rho, lr=1e-3) for rho in (0.1, 0.2)}
    results = pd.DataFrame(rows)[COLUMNS]
    configs["all-but-c/late/seed0"] = config(train_domain="a+b", rho=0.1, lr=1e-3, late=0.75)  # has no place among them
    configs["all-but-c/sam-0.2/seed0"]["parameters"]["lmbda"] = (
        3.0  # has a place, but not in one picture with the other
    )
    table = run("radii", results=results, history=pd.DataFrame(history), configs=configs).radii
    assert table.groupby("rho").rest.unique().map(len).tolist() == [1, 1]
    assert table.rest.nunique() == 2
    assert table.optimizer.tolist() == ["sam"] * 4
    assert table.rho.tolist() == [0.1, 0.1, 0.2, 0.2]
    assert table.domains.tolist() == ["seen", "unseen"] * 2
    assert table.dice.tolist() == pytest.approx([0.6, 0.3, 0.7, 0.4])
    assert table.loss.tolist() == [18.5] * 4  # of steps 18 and 19


def test_without_runs_there_are_no_radii():
    none = pd.DataFrame([{name: "x" for name in COLUMNS} | {"value": 0.5, "metric": "dice"}])
    for configs in ({}, {"a/sam/seed0": config()}):
        assert run("radii", results=none, configs=configs).radii.empty


def test_no_cell_and_no_function_of_the_report_is_long():
    for tag, tree in CELLS:
        functions = [node for node in tree.body if type(node).__name__ == "FunctionDef"]
        assert all(node.end_lineno - node.lineno < 10 for node in functions), tag
        assert tree.body[-1].end_lineno <= 25, tag
    names = [node.name for _, tree in CELLS for node in tree.body if type(node).__name__ == "FunctionDef"]
    assert len(set(names)) == len(names)  # a cell may be run again


def page_of(*cells):
    """The report's page of these cells: (tags, source, text shown) of code, or a text."""
    made = [
        v4.new_code_cell(cell[1], outputs=[v4.new_output("stream", text=cell[2])], metadata={"tags": [cell[0]]})
        if isinstance(cell, tuple)
        else v4.new_markdown_cell(cell)
        for cell in cells
    ]
    template = str(PROJECT / "studies/report.html.j2")
    return HTMLExporter(template_file=template).from_notebook_node(v4.new_notebook(cells=made))[0]


def test_the_reports_page_begins_with_the_answer_and_folds_the_rest_away():
    page = page_of("# Title", ("x", "early = 1", "first"), "## Tables\n\nsaid", ("answer", "late = 2", "it helps"))
    main, *folds = page.partition("<main>")[2].split("<details")
    assert re.sub(r"<[^>]*>", "", main).strip() == "it helps"
    about, about_code, tables, tables_code = (re.sub(r"<[^>]*>", "", fold.partition(">")[2]) for fold in folds)
    assert about.startswith("About this study")
    assert "first" in about
    assert "early" in about_code
    assert about_code.startswith("code")
    assert tables.startswith("Tables")
    assert "said" in tables
    assert "late" in tables_code
    assert page.count("it helps") == 1
    assert page.count("</details>") == len(folds) == 4
    assert "open" not in "".join(re.findall(r"<details[^>]*>", page))


def test_the_reports_page_takes_nothing_from_the_network():
    page = page_of("# Title", ("answer", "x = 1", "it helps"))
    assert "<script" not in page
    assert not re.findall(r"(?:src|href)=.https?:|url\(|@import|<link", page)


def test_landmarks_alone_make_a_report(settings, tmp_path):
    """Sets with keypoints and no labels: TRE in the tables, and the figures are of it."""
    rows = made_up().assign(label="", metric="tre", unit="mm")
    rows = pd.concat([rows, rows.assign(metric="folding_percent", value=0.0, unit="%")], ignore_index=True)
    costs = rows[:0].assign(metric="seconds")
    sections = ("summary", "comparison", "methods", "summary_text")
    done = run(*sections, results=rows, costs=costs, settings=settings, about="all", sentence="better")
    summary, told = done.tables["summary"].iloc[0], (tmp_path / "summary.txt").read_text()
    assert summary["sam"] - summary["adam"] == pytest.approx(0.1)
    assert told.startswith("better\n\nall No labels: these are landmark errors (TRE).\n\n")
    (line,) = done.differences[(done.differences.metric == "tre") & (done.differences.test_domain == "T")].itertuples()
    assert (line.unit, line.mean) == ("mm", pytest.approx(0.1))
    assert set(done.methods.metric) == {"tre", "folding_percent"}
    drawn = run("matrix", results=rows, metric="tre").figures["matrix"]
    assert drawn.axes[-1].get_ylabel() == "target registration error (mm)\nlower is better"
