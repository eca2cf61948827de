"""Every notebook, run by papermill with small parameters, on results rather than on its having run."""

import json
import os
import re
import shutil

import nbformat
import nibabel
import numpy as np
import pandas as pd
import papermill
import pytest
import SimpleITK
import torch
from nbclient import NotebookClient
from nbconvert.preprocessors.coalescestreams import CoalesceStreamsPreprocessor

from fmsam_lib.checking import ConfigError
from fmsam_lib.evaluation.statistics import mean_interval
from fmsam_lib.images.domains import open_domain
from fmsam_lib.model.network import GradICON
from fmsam_lib.parameters import Evaluate
from tests.conftest import PROJECT, as_module, drawn
from tests.evaluation.test_comparison import made_up
from tests.study.report import run

NOTEBOOKS = PROJECT / "notebooks"
# A kernel's own way out takes one to four seconds; a kernel that is killed tells coverage nothing.
ENDS = "graceful" if "COVERAGE_PROCESS_CONFIG" in os.environ else "immediate"
HOW = {"cwd": NOTEBOOKS, "progress_bar": False, "shutdown_kernel": ENDS}
DOMAIN, SHAPE = "brain-mr", [32, 32]
TRAIN = {"train_domain": DOMAIN, "shape": SHAPE, "down": [8, 16], "levels": 2, "steps": 40, "lr": 0.003, "sigma": 3.0}


def execute(name, into, **parameters):
    """The executed notebook `name`, written into the folder `into`."""
    into.mkdir(parents=True, exist_ok=True)
    out = into / f"{name}.ipynb"
    papermill.execute_notebook(NOTEBOOKS / f"{name}.ipynb", out, parameters, **HOW)
    return nbformat.read(out, 4)


def printed(notebook):
    """Everything the notebook shows as text; a stream that the kernel sent in pieces is whole again."""
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "\n".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)


@pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
def test_a_notebook_that_lost_its_tag_does_not_run_on_its_defaults(name):
    notebook = papermill.iorw.load_notebook_node(str(NOTEBOOKS / f"{name}.ipynb"))
    default = re.search(r"^(\w+): (\w+) = ", next(c.source for c in notebook.cells if c.cell_type == "code"), re.M)
    for cell in notebook.cells:
        cell.metadata.tags = []
    given = papermill.parameterize.parameterize_notebook(notebook, {default[1]: "x"})
    kernel = {"In": [cell.source for cell in given.cells if cell.cell_type == "code"][:3]}
    with pytest.raises(ConfigError, match=f"given {default[1]} came before the cell of defaults"):
        exec("\n".join(kernel["In"]), kernel)


def pictures(notebook):
    return sum("image/png" in o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", []))


def test_00_registers_a_pair_better_than_nothing(tmp_path):
    notebook, solved = with_solutions("00_start_here", tmp_path)  # as a newcomer runs it
    before, after = map(float, re.search(r"a heart: Dice (\S+) before, (\S+) after", solved).groups())
    assert after > before
    assert 0 < float(re.search(r"there and back: (\S+) samples", solved)[1]) < 5
    table = printed(notebook).split("when ")[-1]
    rows = re.findall(r"^(\w[\w ]*?) +(\d\.\d+) +(\d\.\d+) +(\d\.\d+) +(-?\d\.\d+)$", table, re.M)
    assert len(rows) >= 4, table
    before, after, shipped, gain = (sum(float(row[i]) for row in rows) / len(rows) for i in (1, 2, 3, 4))
    assert after > before + 0.1
    assert shipped > before + 0.1
    assert gain == pytest.approx(after - before, abs=2e-3)
    of_brain = tuple(map(float, re.search(r"the brain: (\S+) before, (\S+) after", solved).groups()))
    assert of_brain == pytest.approx((before, after), abs=2e-3)
    assert pictures(notebook) >= 4  # pair, loss, result, explorer


def with_solutions(name, into, solved=(2, 3), guesses=3, further=(), *, tried=None, **parameters):
    """The notebook executed with the folded solutions of its exercises as further cells; what these printed.

    solved, guesses: how many solutions it may have, and questions it must have. further: code to run behind them.
    tried: only so many of the solutions run.
    """
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    solutions = re.findall(r"<details><summary>Solution</summary>\n\n```python\n(.*?)```", text, re.S)
    assert solved[0] <= len(solutions) <= solved[1]
    assert text.count("**Guess first:**") >= guesses
    assert (
        text.index("**You will learn**")
        < text.index("**Needs**")
        < text.index("**Takes**")
        < text.index("## Exercise")
        < text.index("## Read next")
    )
    solutions = [*solutions[:tried], *further]
    notebook.cells += [nbformat.v4.new_code_cell(solution) for solution in solutions]
    into.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, into / "with_solutions.ipynb")
    out = into / f"{name}.ipynb"
    papermill.execute_notebook(into / "with_solutions.ipynb", out, parameters, **HOW)
    executed = nbformat.read(out, 4)
    return executed, printed(nbformat.v4.new_notebook(cells=executed.cells[-len(solutions) :]))


def test_02_folds_without_a_regulariser_and_its_solutions_say_what_the_text_says(tmp_path):
    notebook, solved = with_solutions("02_registration_by_hand", tmp_path)
    rows = re.findall(r"^(before|lambda = [01])" + 4 * r" +(\d+\.\d+)" + "$", printed(notebook), re.M)
    facts = {name: tuple(map(float, values)) for name, *values in rows}  # LNCC, Dice, folded, error of the map
    assert facts["lambda = 1"][3] < facts["before"][3] / 2
    assert facts["before"][3] < facts["lambda = 0"][3]
    assert facts["lambda = 1"][2] == 0
    assert facts["lambda = 0"][2] > 20
    assert facts["before"][0] < facts["lambda = 0"][0] < facts["lambda = 1"][0]
    assert facts["before"][1] + 0.1 < facts["lambda = 0"][1] < facts["lambda = 1"][1]
    assert 0.1 < float(re.search(r"(\d\.\d+) samples on average", solved)[1]) < 3
    bright, dark = map(float, re.search(r"squared difference: Dice (\S+), darker (\S+)", solved).groups())
    assert dark < bright - 0.03
    assert float(re.search(r"LNCC, darker: Dice (\S+)", solved)[1]) == pytest.approx(facts["lambda = 1"][1], abs=0.02)
    folded = [float(x) for x in re.findall(r"^(?:8|16|32|64) .* (\d+\.\d+)$", solved, re.M)]
    assert folded[0] < folded[-1] / 5
    assert folded == sorted(folded)
    coarse = dict(re.findall(r"^(16|32) +\S+ +(\S+)", solved, re.M))
    assert float(coarse["32"]) < float(coarse["16"])  # although LNCC is higher
    shares = re.findall(r"^(before|lambda = [01]): local volume .*, (\S+) % folded$", printed(notebook), re.M)
    assert {name: float(share) for name, share in shares} == {name: fact[2] for name, fact in facts.items()}
    sweep = re.findall(r"^(\d+\.\d\d)" + 4 * r" +(\d+\.\d+)" + "$", printed(notebook), re.M)
    lncc, dice, error = ({weight: float(row[i]) for weight, *row in sweep} for i in (0, 1, 3))
    assert (max(lncc, key=lncc.get), max(dice, key=dice.get)) == ("0.30", "1.00")
    assert min(error, key=error.get) == "1.00"


def test_03_gets_better_level_by_level_and_the_penalty_keeps_it_from_folding(tmp_path):
    notebook, solved = with_solutions("03_the_network", tmp_path, steps=120)
    text = printed(notebook)
    levels = {name: float(dice) for name, dice in re.findall(r"^(before|after \w+) +\S+ +(0\.\d+)", text, re.M)}
    assert levels["before"] + 0.1 < levels["after middle"]
    assert levels["after fine"] > levels["after coarse"]
    by_hand, theirs, still = map(
        float, re.search(r"by hand (\S+), the library's ([\d.]+); of the identity (\S+)", text).groups()
    )
    assert (by_hand, still) == (pytest.approx(theirs, rel=0.03), 0)
    kinds = re.findall(r"^(?:with the penalty|without) +[\d.]+ +[\d.]+ +([\d.]+) +([\d.]+)$", text, re.M)
    (folded, astray), (folds, misses) = (map(float, kind) for kind in kinds)
    alike = [float(x) for x in re.findall(r"^(?:with the penalty|without) +([\d.]+)", text, re.M)]
    assert alike[1] < alike[0]
    assert folded < 0.1 < folds
    assert astray < misses
    by_hand, in_table = map(float, re.search(r"by hand (\S+) mm, in the table (\S+) mm", solved).groups())
    assert by_hand == pytest.approx(in_table, rel=0.01)  # the table looks up a grid
    shifts = re.findall(r"^(\d+) +(\d\.\d+) +(\d\.\d+) +(\d+\.\d+) +(\d+\.\d+)$", text, re.M)
    lncc, dice, folded, away = ([float(row[i]) for row in shifts] for i in (1, 2, 3, 4))
    assert away[-1] > 2 * away[0]
    assert max(folded) < 0.1  # nothing betrays it
    assert (lncc[-1] < lncc[0] / 2, dice[-1] < dice[0] / 2) == (True, True)
    assert re.search(r"lost from a shift of (?:8|12|16) samples on", text)
    assert len(re.findall(r"^after (?:coarse|middle|fine): Dice fell on \d+ of 20 pairs$", text, re.M)) == 3
    lost, found = map(float, re.search(r"registered from afar (\S+), brought back .* (\S+)", solved).groups())
    assert lost < found - 0.1
    alone, whole = map(float, re.search(r"without the coarse level: Dice (\S+), with it (\S+)", solved).groups())
    assert alone < whole


def test_60_shows_a_registration_that_looks_right_and_is_wrong(tmp_path):
    notebook, solved = with_solutions("60_when_not_to_trust_it", tmp_path, pairs=6)
    text = printed(notebook)
    errors = " ".join(re.findall(r"^inverse error +([\d. ]+)", text, re.M))  # the table may be broken in two
    good, far, negative, _, lesion, limit = map(float, errors.split())
    assert good < lesion < limit < far < negative
    table = next(
        o.data["text/html"] for c in notebook.cells for o in c.get("outputs", []) if "look at it" in str(o.get("data"))
    )
    verdicts = re.findall(r">(fine|look at it)<", table)
    assert verdicts[:3] == ["fine", "look at it", "look at it"]
    assert verdicts[4] == "fine"  # which is what the text warns of
    signs = {
        name: [*map(float, re.search(rf"^{name}\w* +(.*)$", text, re.M)[1].split())] for name in ("dissim", "unlike")
    }
    assert all(values[3] > values[4] > values[0] for values in signs.values())  # abdomen, lesion, brain
    without, within = map(float, re.search(r"mean volume inside: (\S+) without the lesion, (\S+) with", text).groups())
    assert abs(within - without) > 0.15
    caught, bad, back, fine = map(
        int, re.search(r"caught (\d+) of (\d+) bad ones, sent back (\d+) of (\d+)", solved).groups()
    )
    assert 0 < caught <= bad
    assert back < fine
    ranks = dict(re.findall(r"^(inverse error|dissimilarity|all together) +(-\d\.\d+)", solved, re.M))
    assert all(float(tau) < -0.3 for tau in ranks.values())
    assert len(ranks) == 3
    assert float(ranks["dissimilarity"]) < float(ranks["all together"]) + 0.1
    dice = float(re.search(r"^fine, Dice (\S+) - and left and right are exchanged", solved, re.M)[1])
    assert dice > 0.7


@pytest.mark.parametrize("shape", [[32, 32], [24, 24, 24]])
def test_01_shows_a_domain_in_2d_and_3d(tmp_path, shape):
    notebook, solved = with_solutions("01_look_at_the_data", tmp_path, domain="abdomen-ct", shape=shape, pairs=2)
    mean, lowest = map(float, re.search(r"true map: mean Dice (\S+), lowest (\S+)", solved).groups())
    assert 0.5 < lowest < mean < 1
    assert float(re.search(r"CT by hand: at most (\S+) apart", solved)[1]) < 1e-6
    starts = {name: float(dice) for name, dice in re.findall(r"^(\S+): Dice (\S+)$", solved, re.M)}
    assert (min(starts, key=starts.get), max(starts, key=starts.get)) == ("brain-mr", "lung-ct")
    tenth, by_maximum = map(float, re.findall(r"the brightest tenth of the scan begins at (\S+)", printed(notebook)))
    assert by_maximum < tenth / 5
    assert "abdomen-ct: CT, inter-subject" in printed(notebook)
    assert len(re.findall(r"^\w[\w ]*? +2 +0\.\d+", printed(notebook), re.M)) >= 4  # structures in both pairs
    assert pictures(notebook) >= 4


def test_01_shows_real_images(tmp_path, real_data):
    notebook = execute(
        "01_look_at_the_data", tmp_path, domain="HippocampusMR", shape=[24, 32, 24], data=str(real_data), pairs=2
    )
    assert "1 anterior, 2 posterior" in printed(notebook)


def test_04_shows_what_the_climb_does(tmp_path):
    along = "h = [worst_loss(torch.stack([x, torch.zeros_like(x)]), rho) for x in line[:61]]"  # to the middle
    dips = "any(a > b < c for a, b, c in zip(h, h[1:], h[2:]))"
    valley = f"for rho in (0.25, 0.28, 0.3):\n    {along}\n    print('valley', rho, {dips})"
    how = {"shape": [32, 32], "steps": 20, "rho": 0.02, "further": [valley]}
    notebook, solved = with_solutions("04_sam_explained", tmp_path, **how)
    text = printed(notebook)
    assert re.findall(r"^valley (\S+) (\w+)", solved, re.M) == [("0.25", "True"), ("0.28", "True"), ("0.3", "False")]
    back = re.search(r"weights that did not come back +(\d+) +(\d+)\npasses that BatchNorm counted +(\d) +(\d)", text)
    by_hand, theirs, passes, once = map(int, back.groups())
    assert by_hand > theirs == 0
    assert (passes, once) == (2, 1)
    assert float(re.search(r"ASAM by hand and the library's are (\S+) apart", solved)[1]) < 1e-3
    high, low = map(
        float, re.search(r"from rho = (\S+) on SAM ends in the flat minimum, at (\S+) in the sharp", solved).groups()
    )
    assert 0.25 < low < high < 0.35
    ends = dict(re.findall(r"^\d +(\d\.\d+) +(sharp|flat|neither)$", text, re.M))
    expected = {"0.000": "sharp", "0.001": "sharp", "0.250": "sharp", "0.350": "flat", "1.000": "sharp"}
    assert expected.items() <= ends.items()
    assert pictures(notebook) == 4  # a climb, the objective twice, the slider's
    flat, steep = re.findall(r"largest eigenvalue (\S+), rise (\S+), relative to the weights (\S+)", solved)
    assert (flat[0], steep[0], flat[2]) == ("4.00", "200.02", steep[2])
    assert float(steep[1]) > 10 * float(flat[1])


def test_05_shows_how_far_the_climb_may_go(tmp_path):
    notebook, solved = with_solutions("05_how_far_to_climb", tmp_path, shape=[32, 32], steps=20, rho=0.02)
    text = printed(notebook)
    along, random = map(
        float, re.search(r"along the gradient (\S+), along random directions at most (\S+)", solved).groups()
    )
    assert along > 3 * random
    reaches = dict(re.findall(r"^(\S+): the first order holds up to rho = (\S+), at a loss", solved, re.M))
    assert reaches.keys() == {"brain-mr", "lung-ct", "knee-mr"}
    assert all(float(reach) > 0 for reach in reaches.values())
    share = next(line for line in text.splitlines() if line.startswith("last, of |eps|^2"))
    assert share.split()[2:4] == ["|eps|^2", "1"]  # at initialisation
    exact, measured = map(float, re.search(r"rho\* (\S+) \(exact\), (\S+) \(measured\)", text).groups())
    factors = map(float, re.search(r"the radius in question, 0\.02: (\S+) and (\S+) times these", text).groups())
    assert list(factors) == pytest.approx([0.02 / exact, 0.02 / measured], rel=0.1)
    radii = {
        rho: (float(a), float(b)) for rho, a, b in re.findall(r"rho = (\S+):.*\n +loss (\S+) at w, (\S+) at", text)
    }
    assert radii.keys() == {"0.02", "0.05"}
    assert all(there > here for here, there in radii.values())
    assert pictures(notebook) == 3  # curves, registrations, the slider's


def test_06_compares_at_equal_steps_and_at_equal_compute(tmp_path):
    notebook, solved = with_solutions("06_does_sam_help", tmp_path, solved=(3, 3), guesses=2)
    text = printed(notebook)
    rows = re.findall(r"^(Adam|Adam, twice the steps|SAM) +(\S+) +(\S+) +(\S+)$", text, re.M)
    arms = {name: [float(x) for x in measured] for name, *measured in rows}
    told = re.findall(r"^(?:equal \w+)? +Dice, (\w+) +(\S+) +(\S+) +(\S+) +(\S.*)$", text, re.M)
    assert [domain for domain, *_ in told] == ["brains", "hearts"] * 2
    opponents = ("Adam", "Adam", "Adam, twice the steps", "Adam, twice the steps")
    for (domain, mean, low, high, word), arm in zip(told, opponents, strict=True):
        column = 1 + (domain == "hearts")
        assert float(mean) == pytest.approx(arms["SAM"][column] - arms[arm][column], abs=0.002)
        assert float(low) <= float(mean) <= float(high)
        assert word.strip() in ("helps", "equivalent", "harms", "no relevant help", "undecided")
    assert arms["SAM"][0] < min(arms["Adam"][0], arms["Adam, twice the steps"][0])  # flatter, as the text says
    assert [word.strip() for domain, *_, word in told][2] == "harms"  # on brains, at equal compute
    assert len(re.findall(r"^seed \d: SAM (?:helps|harms|changes nothing), [+-]0\.\d+$", solved, re.M)) == 3
    assert re.search(r"standard deviation is 0\.\d+: \d+ seeds", solved)
    assert re.search(r"all together [+-]\d\.\d\d, within the arms", solved)
    assert pictures(notebook) == 1


OPTIMIZERS = ("adam", "adam-2x", "sam")


@pytest.fixture(scope="session")
def trained(once):
    return once("tiny", make_tiny_study)


def make_tiny_study(root):
    """Folders of a small study: trained networks, evaluated and measured by the notebooks; adam-2x only evaluated."""
    test, one = {"test_domains": [DOMAIN, "heart-mr"], "threads": 1}, {"solved": (1, 1), "guesses": 1}
    looks = {"shape": SHAPE, "pairs": 3, "corruptions": ["noise"], "corrupted_pairs": 2} | test
    execute("20_evaluate", root / "none", run="", out=str(root / "none"), methods=["none"], **looks)
    for optimizer in OPTIMIZERS:
        out = root / DOMAIN / optimizer / "seed0"
        two = one | {"solved": (2, 2)}
        with_solutions("10_train", out, **two, out=str(out), optimizer=optimizer, snapshots=2, **TRAIN)
        methods = ["network", "network+io"] if optimizer == "sam" else ["network"]
        how = {"methods": methods, "io": 15, "fields": True} | looks
        _, solved = with_solutions("20_evaluate", out, **one | {"solved": (3, 3)}, run=str(out), out=str(out), **how)
        assert "HD95 by hand 3.00, the library's 3.00 samples\nlargest distance 7.00, Dice 0.913" in solved
        if optimizer == "adam-2x":
            continue
        small = {"pairs": 2, "line_points": 5, "plane_points": 3, "directions": 1, "rhos": [0.01, 0.1], "draws": 2}
        small |= {"measured_on": ["training"], "ascent_steps": 1, "eigenvalues": 1, "probes": 2, "lanczos_steps": 5}
        execute("30_loss_landscape", out, run=str(out), out=str(out), **small, **test)
    out = root / DOMAIN / "between" / "seed0"
    both = {name: str(root / DOMAIN / o / "seed0") for name, o in (("baseline", "adam"), ("treatment", "sam"))}
    small = {"pairs": 2, "path_points": 5, "plane_points": 3}
    with_solutions("35_between_minima", out, **two, out=str(out), **small, **both, **test)


def test_10_writes_a_run_that_learned(trained):
    for optimizer in ("adam", "sam"):
        run = trained / DOMAIN / optimizer / "seed0"
        assert {"config.json", "history.jsonl", "checkpoint.pt", "weights.pt"} <= {p.name for p in run.iterdir()}
        assert [p.name for p in sorted((run / "snapshots").iterdir())] == ["step000020.pt", "step000040.pt"]
        history = pd.read_json(run / "history.jsonl", lines=True)
        assert history.total.iloc[-1] < history.total.iloc[0]
        config = json.loads((run / "config.json").read_text())
        assert config["parameters"]["optimizer"] == optimizer
        assert {"commit", "cpu", "packages"} <= config["provenance"].keys()


def test_10_counts_what_sam_costs(trained):
    for optimizer, said in (("adam", "1.00 gradients a step, 40 in 40"), ("sam", "2.00 gradients a step, 80 in 40")):
        notebook = nbformat.read(trained / DOMAIN / optimizer / "seed0/10_train.ipynb", 4)
        assert f"{optimizer}: {said} steps" in printed(notebook)
        assert "sam-every: 1.20 gradients a step" in printed(notebook)
        assert "gradients evaluated" not in printed(notebook)  # before the exercise asks
        assert ("a plane would rise by" in printed(notebook)) == (optimizer == "sam")
    notebook = nbformat.read(trained / DOMAIN / "adam-2x/seed0/10_train.ipynb", 4)
    assert "adam-2x: 1.00 gradients a step, 80 in 80 steps" in printed(notebook)


def test_20_names_the_worst_pair(trained):
    run = trained / DOMAIN / "adam" / "seed0"
    of_pairs = pd.read_csv(run / "results.csv").query("metric == 'dice'").groupby(["test_domain", "pair"]).value.mean()
    text = printed(nbformat.read(run / "20_evaluate.ipynb", 4))
    for domain in (DOMAIN, "heart-mr"):
        values = of_pairs[domain]
        said = f"mean Dice {values.mean():.3f}, worst {values.min():.3f} ({values.idxmin()})"
        assert f"adam on {domain}: {said}" in text
        low, high = re.search(rf"adam on {domain}: \S+ \[(\S+), (\S+)\] over 3 pairs", text).groups()
        assert values.min() - 5e-4 <= float(low) <= values.mean() <= float(high) + 5e-4


def test_20_writes_all_metrics_of_every_domain(trained):
    results = pd.read_csv(trained / DOMAIN / "sam" / "seed0" / "results.csv")
    assert set(results.test_domain) == {DOMAIN, "heart-mr"}
    both = {"dice", "hd95", "surface_distance", "tre", "map_error"}
    of_maps = {"folding_percent", "jacobian_min", "sdlogj", "sdlogj_learn2reg", "inverse_error"}
    assert both | of_maps <= set(results.metric)
    assert results.groupby("test_domain").pair.nunique().tolist() == [3, 3]
    assert set(results.optimizer) == {"sam", "sam+io"}
    none = pd.read_csv(trained / "none/results.csv")
    assert both <= set(none.metric)
    assert not of_maps & set(none.metric)


def test_20_optimises_a_trained_network_further(trained):
    none, sam = (pd.read_csv(trained / of / "results.csv") for of in ("none", f"{DOMAIN}/sam/seed0"))
    table = pd.concat([none, sam]).query("metric == 'dice' and test_domain == @DOMAIN")
    mean = table.groupby("optimizer").value.mean()
    assert mean["none"] < mean["sam"] < mean["sam+io"]


def test_20_shows_dice_without_registration_to_who_runs_it_by_hand(trained, monkeypatch):
    monkeypatch.setattr("fmsam_lib.widgets.sliders.in_a_notebook", lambda: True)
    none, sam = (pd.read_csv(trained / of / "results.csv") for of in ("none", f"{DOMAIN}/sam/seed0"))
    there = {"pd": pd, "results": sam, "settings": Evaluate(test_domains=[DOMAIN, "heart-mr"], shape=SHAPE, pairs=3)}
    cells = nbformat.read(NOTEBOOKS / "20_evaluate.ipynb", 4).cells
    exec(next(cell.source for cell in cells if cell.id == "20-07-c"), there)
    shown = there["dice"].groupby(["optimizer", "test_domain", "label"]).value.mean()
    expected = none[none.metric == "dice"].groupby(["test_domain", "label"]).value.mean()
    pd.testing.assert_series_equal(shown["none"], expected)
    assert {"sam", "sam+io"} <= set(there["dice"].optimizer)


def test_20_counts_pairs_not_structures(trained):
    text = printed(nbformat.read(trained / DOMAIN / "adam/seed0/20_evaluate.ipynb", 4))
    results = pd.read_csv(trained / DOMAIN / "adam/seed0/results.csv").query("metric == 'dice'")
    of_pairs = results.groupby(["test_domain", "pair"]).value.mean().groupby(level=0)
    for mean, spread in zip(of_pairs.mean(), of_pairs.std(), strict=True):
        assert re.search(rf"dice +1? +{mean:.3f} +{spread:.3f} +3$", text, re.M)


def test_20_keeps_what_it_took_what_bad_images_take_and_the_fields(trained):
    run = trained / DOMAIN / "sam" / "seed0"
    costs = pd.read_csv(run / "costs.csv").query("metric == 'seconds'")
    assert costs.groupby("optimizer").size().to_dict() == {"sam": 6, "sam+io": 6}
    median = costs.groupby("optimizer").value.median()
    assert 0 < median["sam"] < median["sam+io"]
    robustness = pd.read_csv(run / "robustness.csv")
    assert set(robustness.optimizer) == {"sam"}
    clean = robustness.query("severity == 0 and metric == 'dice'").set_index(["test_domain", "pair"]).value
    results = pd.read_csv(run / "results.csv").query("metric == 'dice' and optimizer == 'sam'")
    pd.testing.assert_series_equal(results.groupby(["test_domain", "pair"]).value.mean()[clean.index], clean)
    assert len(list(run.glob(f"fields/*/{DOMAIN}/disp_*.nii.gz"))) == 6
    assert nibabel.load(next(run.glob("fields/sam+io/heart-mr/disp_*.nii.gz"))).shape == (*SHAPE, 2)
    assert json.loads((run / "problems.json").read_text()) == []
    assert pictures(nbformat.read(run / "20_evaluate.ipynb", 4)) == 3  # robustness, a pair of each domain
    assert pictures(nbformat.read(trained / "none" / "20_evaluate.ipynb", 4)) == 2


def test_20_measures_real_images(tmp_path, real_data):
    real = {"test_domains": ["HippocampusMR"], "shape": [24, 32, 24], "data": str(real_data), "pairs": 2}
    notebook = execute("20_evaluate", tmp_path, run="", out=str(tmp_path), methods=["none"], corruptions=[], **real)
    results = pd.read_csv(tmp_path / "results.csv")
    dice = results[results.metric == "dice"]
    assert sorted(dice.label) == ["anterior", "anterior", "posterior", "posterior"]
    assert dice.value.between(0.2, 0.9).all()
    assert (results[results.metric == "hd95"].unit == "mm").all()
    assert "every pair could be read" in printed(notebook)


def test_30_measures_the_same_directions_for_both(trained):
    tables = [pd.read_csv(trained / DOMAIN / o / "seed0" / "landscape.csv") for o in ("adam", "sam")]
    for table in tables:
        assert set(table.kind) == {"line", "plane", "cosine", "spectrum"}
        centre = table[(table.kind == "line") & (table.alpha == 0) & (table.term == "total")].value
        ends = table[(table.kind == "line") & (table.alpha.abs() > 0.4) & (table.term == "total")].value
        assert centre.max() < ends.max()
        assert set(table.test_domain) == {"training", DOMAIN, "heart-mr"}
        middle = table.query("kind == 'plane' and alpha == 0 and beta == 0 and term == 'total'").set_index(
            "test_domain"
        )
        line = table.query("kind == 'line' and alpha == 0 and term == 'total'").set_index("test_domain")
        assert middle.value.to_dict() == line.value.to_dict()
        spectrum = table.query("kind == 'spectrum' and term == 'total'")
        assert spectrum.groupby("direction").value.sum().tolist() == pytest.approx([1, 1])  # of each probe
    assert tables[0].query("kind != 'spectrum'").alpha.equals(tables[1].query("kind != 'spectrum'").alpha)


def test_30_by_hand_finds_what_the_library_finds(trained, tmp_path):
    run = {"run": str(trained / DOMAIN / "sam" / "seed0"), "out": str(tmp_path), "test_domains": [DOMAIN], "pairs": 2}
    small = {"line_points": 3, "plane_points": 3, "directions": 1, "draws": 2, "ascent_steps": 0, "lanczos_steps": 5}
    how = {"measured_on": ["training"], "rhos": [0.01, 0.02], "probes": 2}
    further = [
        "print('spans', *(square.max(axis=None) - square.min(axis=None) for square in squares.values()))",
        "print('across', float(first @ second), 'shares', shares.share.sum())",
        "middle = planes[(planes.alpha == 0) & (planes.beta == 0)].set_index('test_domain').value\n"
        "print('means', middle.iloc[-1], middle.iloc[:-1].mean())",
    ]
    notebook, solved = with_solutions("30_loss_landscape", tmp_path, further=further, **run, **how, **small)
    text = printed(notebook)
    assert float(re.search(r"by hand and the library's: at most (\S+) apart", text)[1]) < 1e-6
    mine, theirs = map(float, re.search(r"power iteration (\S+), the library's Lanczos (\S+)", text).groups())
    assert mine == pytest.approx(theirs, rel=0.02)
    plain, sharp = map(float, re.search(r"spans (\S+) (\S+)", solved).groups())
    assert sharp > 20 * plain
    across, shares = map(float, re.search(r"across (\S+) shares (\S+)", solved).groups())
    assert (abs(across) < 1e-3, shares) == (True, pytest.approx(1, abs=1e-4))
    together, mean = map(float, re.search(r"means (\S+) (\S+)", solved).groups())
    assert together == pytest.approx(mean)
    by_filter, by_number = map(float, re.findall(r"the loss rises by (\S+)", solved))
    assert by_number > 2 * by_filter
    kept = re.findall(r"^(adam|sam), seed0 +(\d+\.\d+) +(0\.\d+) +(0\.\d+)$", solved, re.M)
    assert [optimizer for optimizer, *_ in kept] == ["adam", "sam"]
    by_hand, theirs = map(float, re.search(r"trace: (\S+);[^\n]*\nthe library's: (\S+) ", solved).groups())
    assert by_hand == pytest.approx(theirs, rel=0.5)  # both are estimates of a few probes
    assert sum(map(int, re.findall(r"(-?\d+)%", solved))) == pytest.approx(100, abs=3)
    by_eigenvalue, rise = map(float, re.search(r"rho 0.001: by the eigenvalue (\S+), measured (\S+)", solved).groups())
    assert 0.3 < rise / by_eigenvalue < 1.5  # early in training the loss is no parabola; of the network "2d": 0.99


def test_30_measures_flatness_by_every_measure(trained):
    for optimizer in ("adam", "sam"):
        table = pd.read_csv(trained / DOMAIN / optimizer / "seed0" / "flatness.csv")
        about = ["train_domain", "test_domain", "optimizer", "seed"]
        assert list(table.columns) == [*about, "measure", "rho", "term", "value", "low", "high", "n"]
        assert table[about].drop_duplicates().values.tolist() == [[DOMAIN, "training", optimizer, 0]]
        assert set(table.term.dropna()) >= {"total", "similarity", "regulariser"}
        total = table[table.term == "total"]
        values = total.assign(rho=total.rho.fillna(0)).set_index(["measure", "rho"]).value
        at = {
            *("sam_rise", "asam_rise", "ascent_rise", "adaptive_ascent_rise"),
            *("noise_rise", "adaptive_noise_rise", "gradient_curvature"),
        }
        assert {name for name, rho in values.index if rho} == at
        once = {"loss", "gradient_norm", "adaptive_gradient_norm", "eigenvalue_1", "trace"}
        assert {name for name, rho in values.index if not rho} == once
        assert "weight_norm" in set(table.measure)
        assert np.isfinite(values).all()
        for name in ("sam_rise", "asam_rise", "ascent_rise"):
            assert (values[name] > 0).all(), name
            assert values[name, 0.1] > values[name, 0.01], name
        assert values["sam_rise", 0.01] == pytest.approx(0.01 * values["gradient_norm", 0], rel=0.5)
        assert (values["ascent_rise"] >= values["sam_rise"]).all()
        assert values["eigenvalue_1", 0] > 0
        table = pd.read_csv(trained / DOMAIN / optimizer / "seed0" / "landscape.csv")
        centre = table.query("kind == 'line' and alpha == 0 and term == 'total' and test_domain == 'training'")
        assert values["loss", 0] == pytest.approx(centre.value.item(), rel=1e-5)


def test_35_begins_and_ends_at_the_networks(trained):
    table = pd.read_csv(trained / DOMAIN / "between/seed0/between.csv")
    assert set(table.kind) == {"path", "plane", "trajectory"}
    assert (set(table.baseline), set(table.treatment)) == ({"adam"}, {"sam"})
    path = table.query("kind == 'path' and term == 'total' and statistics == 'interpolated'")
    for alpha, optimizer in ((0, "adam"), (1, "sam")):
        own = pd.read_csv(trained / DOMAIN / optimizer / "seed0/landscape.csv")
        own = own.query("kind == 'line' and alpha == 0 and term == 'total'").set_index("test_domain").value
        end = path[path.alpha == alpha].set_index("test_domain").value
        assert end.to_dict() == pytest.approx(own.to_dict(), rel=1e-6)
    assert sorted(path.alpha.unique()) == [-0.25, 0, 0.25, 0.5, 0.75, 1, 1.25]
    again = table.query("kind == 'path' and term == 'total' and statistics == 're-estimated'")
    assert len(again) == len(path)


def test_35_by_hand_finds_the_middle_of_the_path(trained):
    text = printed(nbformat.read(trained / DOMAIN / "between/seed0/35_between_minima.ipynb", 4))
    barriers = re.findall(r"by hand (\S+), at alpha = \S+; in the figure (\S+)$", text, re.M)
    assert [max(0.0, float(by_hand)) for by_hand, _ in barriers] == pytest.approx([float(b) for _, b in barriers])
    assert len(barriers) == 3
    halfway = re.findall(r"^(\S+), halfway: by hand (\S+), on the path (\S+)$", text, re.M)
    assert [domain for domain, *_ in halfway] == ["training", DOMAIN, "heart-mr"]
    for _, by_hand, on_the_path in halfway:
        assert float(by_hand) == pytest.approx(float(on_the_path), rel=1e-4)


def test_35_shows_the_ways_on_the_plane(trained):
    run = trained / DOMAIN / "between/seed0"
    table = pd.read_csv(run / "between.csv")
    ways = table[table.kind == "trajectory"].set_index(["optimizer", "step"])
    assert ways.index.tolist() == [(o, s) for o in ("adam", "sam") for s in (0, 20, 40)]
    corners = ways.value[[(o, s) for o in ("adam", "sam") for s in (0, 40)]]
    assert corners.abs().max() < 1e-6  # start and solutions lie in the plane
    assert ways.value.between(0, 1).all()
    assert (ways.loc[("adam", 40)].alpha > 0.1, abs(ways.loc[("adam", 40)].beta) < 1e-6) == (True, True)
    plane = table.query("kind == 'plane' and term == 'total' and test_domain == 'training'")
    assert len(plane) == 9
    for axis in ("alpha", "beta"):
        assert plane[axis].min() < ways[axis].min() < ways[axis].max() < plane[axis].max()
    assert pictures(nbformat.read(run / "35_between_minima.ipynb", 4)) == 2


def test_35_refuses_runs_that_did_not_begin_alike(trained, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained / DOMAIN / "sam" / "seed0", other)
    record = json.loads((other / "config.json").read_text())
    record["parameters"]["seed"] = 1
    (other / "config.json").write_text(json.dumps(record))
    both = {"baseline": str(trained / DOMAIN / "adam/seed0"), "treatment": str(other)}
    said = stopped(codes("35_between_minima", out=str(tmp_path), test_domains=[DOMAIN], **both))
    assert re.search(r"^ConfigError: .*two runs from one start.*\n- seed: 0 and 1", said)
    assert not (tmp_path / "between.csv").exists()


STUDY = f"""
description: tiny
train_domains: [{DOMAIN}]
test_domains: [{DOMAIN}, heart-mr]
optimizers: [adam, adam-2x, sam]
seeds: [0, 1]
shape: {SHAPE}
train: {{}}
evaluate: {{}}
landscape: {{}}
"""


@pytest.fixture(scope="module")
def compared(trained):
    (trained / "tiny.yaml").write_text(STUDY)
    (trained / "figures").mkdir(exist_ok=True)
    for name in ("radii.png", "radii.pdf", "radii.txt", "mine.png"):  # of an earlier report, and of whoever reads it
        (trained / "figures" / name).touch()
    how = {"study": str(trained / "tiny.yaml"), "folder": str(trained)}
    return with_solutions("40_compare", trained, (2, 2), 1, **how)[0]


def marked(notebook):
    """Everything that the notebook shows as Markdown."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", []) if "data" in o]
    return "\n".join(o.data.get("text/markdown", "") for o in outputs)


def test_30_goes_without_the_hessian(trained, tmp_path):
    run = str(trained / DOMAIN / "sam" / "seed0")
    off = {"measured_on": ["training"], "draws": 2, "ascent_steps": 0, "eigenvalues": 0, "probes": 0, "rhos": [0.01]}
    small = {"test_domains": [DOMAIN], "pairs": 1, "line_points": 3, "plane_points": 3, "directions": 1}
    notebook = execute("30_loss_landscape", tmp_path, run=run, out=str(tmp_path), **off, **small)
    assert "trace" not in set(pd.read_csv(tmp_path / "flatness.csv").measure)
    assert pictures(notebook) == 5  # the walker's two, lines, planes, rises


def test_30_says_which_domains_flatness_can_be_measured_on(trained, tmp_path):
    run = str(trained / DOMAIN / "sam" / "seed0")
    given = {"run": run, "out": str(tmp_path), "test_domains": [DOMAIN], "measured_on": ["lungs"]}
    said = stopped(codes("30_loss_landscape", **given))
    assert re.search(r"^ConfigError: .*measured_on: expected training or .*, got lungs", said, re.S)


def test_40_compares_and_names_what_is_missing(trained, compared):
    results = pd.read_csv(trained / "results.csv")
    assert set(results.optimizer) == {"none", "adam", "adam-2x", "sam", "sam+io"}
    summary = pd.read_csv(trained / "summary.csv")
    assert len(summary) == 2
    assert {"before", "adam", "sam", "sam - adam", "sam - adam low"} <= set(summary.columns)
    problems = json.loads((trained / "problems.json").read_text())
    assert [p for p in problems if "seed1: this run was not trained" in p] == [  # seed 1 was never run
        f"{DOMAIN}/{o}/seed1: this run was not trained to its end" for o in OPTIMIZERS
    ]
    assert f"{DOMAIN}/adam-2x/seed0/landscape.csv: this was not computed" in problems
    shown = marked(compared)
    assert all(f"**Missing:** {problem}" in shown for problem in problems)
    assert "- one seed only: intervals are over test pairs" in shown
    assert f"**[{len(problems)} problems](#missing): {problems[0]}** · [1 note](#missing): one seed only" in shown


def test_40_s_second_exercise_shows_what_pairing_buys(compared):
    paired, strangers = map(float, re.findall(r"interval (\S+) wide", printed(compared)))
    assert strangers > paired


def test_40_begins_with_the_answer(trained, compared):
    lines = pd.read_csv(trained / "answer.csv").query("role == 'primary'")
    assert lines[["anatomy", "baseline", "treatment"]].values.tolist() == [
        [DOMAIN, "adam-2x", "sam"],
        ["heart-mr", "adam-2x", "sam"],
    ]
    first = (trained / "summary.txt").read_text().splitlines()[0]
    assert first in marked(compared)
    numbers = re.findall(r"by ([+−]\d\.\d{3})", first)
    assert [float(n.replace("−", "-")) for n in numbers] == pytest.approx(lines["mean"].tolist(), abs=5e-4)
    assert "against Adam at equal compute" in first.replace("Against", "against")
    assert "One seed decides nothing" in first
    shown = (trained / "figures/answer.png").read_bytes()
    assert shown == (trained / "figures/paired_difference.png").read_bytes()
    assert not [*(trained / "figures").glob("radii.*")]
    assert (trained / "figures/mine.png").exists()


def test_40_compares_at_equal_steps_and_at_equal_compute(trained, compared):
    results = pd.read_csv(trained / "results.csv").query("metric == 'dice'")
    comparison = pd.read_csv(trained / "comparison.csv").query("metric == 'dice'").set_index(["equal", "test_domain"])
    assert comparison.baseline.to_dict() == {
        (equal, domain): of
        for equal, of in (("steps", "adam"), ("compute", "adam-2x"))
        for domain in (DOMAIN, "heart-mr")
    }
    mean = results.groupby(["test_domain", "pair", "optimizer"]).value.mean().unstack()
    for (_, domain), line in comparison.iterrows():
        gain = mean.loc[domain, "sam"] - mean.loc[domain, line.baseline]
        assert (line["mean"], line.pairs, line.seeds) == (pytest.approx(gain.mean()), 3, 1)
        assert line.low <= line["mean"] <= line.high
    methods = pd.read_csv(trained / "methods.csv")
    assert set(methods.optimizer) == {"none", "adam", "adam-2x", "sam", "sam+io"}
    assert (methods[methods.optimizer != "none"].seconds > 0).all()


def test_40_keeps_every_figure_with_its_caption(trained, compared):
    captioned = {
        *("matrix", "paired_difference", "pairs", "robustness", "training", "loss_lines", "loss_planes"),
        *("sharpness", "spectrum", "paths", "solutions_plane", "correlation", "flatness_against_dice"),
        *("example_brain-mr", "example_heart-mr", "answer"),
    }
    assert "No figure" not in marked(compared)
    assert {p.stem for p in (trained / "figures").glob("*.txt")} == captioned
    for name in captioned:
        assert drawn(trained / "figures" / f"{name}.png"), name
        assert (trained / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert pictures(compared) == len(captioned)
    for name in captioned:
        caption = (trained / "figures" / f"{name}.txt").read_text().strip()
        assert f"*{caption}*" in marked(compared)
        assert f"Trained on {DOMAIN}; grid of 32 x 32 samples" in caption
    assert "test pairs: brain-mr 3, heart-mr 3; 1 seed (0)" in (trained / "figures/matrix.txt").read_text()
    table = pd.read_csv(trained / "correlation.csv")
    assert set(table.performance) == {"seen", "unseen"}
    assert set(table.n) == {2}  # adam and sam alone were measured


def test_40_draws_the_librarys_interval_by_hand(trained, compared):
    text = printed(compared)
    assert "SAM minus Adam" in text
    ends = re.search(r"by hand \[(\S+), (\S+)\], the library \[(\S+), (\S+)\]", text).groups()
    low, high, theirs_low, theirs_high = map(float, ends)
    assert [low, high] == pytest.approx([theirs_low, theirs_high], abs=0.1 * (theirs_high - theirs_low) + 1e-4)
    (widths,) = re.findall(r"^twice the pairs: (\S+) wide, not (\S+)$", text, re.M)
    assert float(widths[0]) < float(widths[1])
    told = re.findall(r"(\d) seed\(s\), (\d+) pairs: width (\S+), .* in (\d+)% of", text)
    held = {(int(seeds), int(pairs)): int(share) for seeds, pairs, _, share in told}
    assert held[1, 20] < 60 < held[2, 20] < 82 < held[4, 20] < 88
    assert held[4, 40] <= held[4, 20] + 2 < held[8, 20] + 2
    width = {(int(seeds), int(pairs)): float(wide) for seeds, pairs, wide, _ in told}
    assert width[4, 40] == pytest.approx(width[8, 20], rel=0.1)


def test_40_by_hand_draws_seeds_and_pairs_as_the_library_does():
    cells = nbformat.read(NOTEBOOKS / "40_compare.ipynb", 4).cells
    there = {"np": np}
    exec(next(cell.source for cell in cells if cell.source.startswith("def by_hand")), there)
    random = np.random.default_rng(0)
    gains = 0.02 * (random.normal(size=(4, 1)) + random.normal(size=12) + random.normal(size=(4, 12)))
    rows = pd.DataFrame([(s, f"p{p}", v) for (s, p), v in np.ndenumerate(gains)], columns=["seed", "pair", "value"])
    theirs = mean_interval(rows)
    width = theirs.high - theirs.low
    assert there["by_hand"](gains) == pytest.approx([theirs.low, theirs.high], abs=0.06 * width)


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_40_by_hand_copies_no_single_seed(capsys, seeds):
    rows = made_up()
    run("paired_difference", "by_hand", results=rows[rows.seed.isna() | rows.seed.isin(seeds)])
    assert re.findall(r"^twice the (\w+):", capsys.readouterr().out, re.M) == ["pairs", "seeds"][: len(seeds)]


def test_50_makes_and_registers_a_pair_without_files(tmp_path):
    how = {"weights": "", "shape": [24, 24, 24], "io": 25, "lr": 0.005, "sigma": 3.0}
    notebook, solved = with_solutions("50_register_your_own", tmp_path, (3, 3), 1, tried=1, out=str(tmp_path), **how)
    theirs, mine = map(float, re.search(r"SimpleITK (\S+), the library (\S+)", solved).groups())
    assert mine == pytest.approx(theirs, abs=1e-4)
    assert pictures(notebook) >= 4  # before, loss, overview, explorer
    test_pair = open_domain("brain-mr", shape=(48, 56, 48)).test_pair(1)
    made = nibabel.load(tmp_path / "input/fixed.nii.gz").get_fdata() / 1000
    np.testing.assert_allclose(made, test_pair.fixed[0], atol=1e-5)  # no pair that the network "3d" learned
    stored = nibabel.load(tmp_path / "input/moving.nii.gz")
    assert nibabel.aff2axcodes(stored.affine) != nibabel.aff2axcodes(test_pair.affine)
    np.testing.assert_allclose(nibabel.as_closest_canonical(stored).affine, test_pair.affine, atol=1e-4)  # in its place
    dice = json.loads((tmp_path / "summary.json").read_text())["dice"].values()
    assert sum(d["after"] - d["before"] for d in dice) / len(dice) > 0.1
    fixed, warped, field = (
        SimpleITK.ReadImage(str(tmp_path / name))
        for name in ("input/fixed.nii.gz", "warped.nii.gz", "displacement.nii.gz")
    )
    assert warped.GetSize() == field.GetSize() == fixed.GetSize()
    assert field.GetNumberOfComponentsPerPixel() == 3


def test_50_tells_what_a_patient_who_lies_elsewhere_does(tmp_path):
    """With the network that comes with fmsam, as a newcomer runs it. The verdict misses it, and the text says so."""
    _, solved = with_solutions("50_register_your_own", tmp_path, (3, 3), 1, out=str(tmp_path))
    told = re.findall(r"^(\d+) voxels, from (\w+), mean Dice (\S+): verdict: (look at it|fine)", solved, re.M)
    ends = {(int(n), start): (float(dice), verdict) for n, start, dice, verdict in told}
    assert len(ends) == 5
    assert {verdict for _, verdict in ends.values()} == {"fine"}
    text = " ".join("".join(cell.source) for cell in nbformat.read(NOTEBOOKS / "50_register_your_own.ipynb", 4).cells)
    text = " ".join(text.split())
    rigid, without = ends[20, "rigid"][0], ends[0, "overlay"][0]
    assert f"without the shift, at a Dice of {without:.2f} or a little above" in text
    assert f"from `overlay` at {ends[10, 'overlay'][0]:.1f} and at {ends[20, 'overlay'][0]:.1f}" in text
    assert without - 0.005 < min(rigid, ends[10, "rigid"][0]) <= max(rigid, ends[10, "rigid"][0]) < without + 0.015
    ends = [float(dice) for dice in re.search(r"^with the network +(\S+) +(\S+) +(\S+)", solved, re.M).groups()]
    assert max(ends) - min(ends) < 0.02


def test_50_registers_files_with_weights(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        values = torch.rand(40, 36, generator=generator).numpy()
        nibabel.save(nibabel.Nifti1Image(values, np.diag([0.5, 0.5, 1, 1])), tmp_path / f"{name}.nii.gz")
    net = GradICON(2, down=(4, 8), levels=2)
    net.save(tmp_path / "weights.pt")
    files = {"fixed": str(tmp_path / "a.nii.gz"), "moving": str(tmp_path / "b.nii.gz")}
    options = {"out": str(tmp_path / "out"), "weights": str(tmp_path / "weights.pt"), "shape": [32, 32], "io": 0}
    execute("50_register_your_own", tmp_path, **files, **options)
    assert nibabel.load(tmp_path / "out" / "disp_a_b.nii.gz").shape == (40, 36, 2)
    said = stopped(codes("50_register_your_own", out=str(tmp_path), fixed=files["fixed"]))
    assert "expected fixed and moving, or neither" in said


def test_50_makes_and_registers_a_pair_in_2d_too(tmp_path):
    cells = codes("50_register_your_own", out=str(tmp_path), weights="2d", shape=[48, 48], io=0)
    exec("\n\n".join(cells), {"In": ["", *cells]})
    dice = json.loads((tmp_path / "summary.json").read_text())["dice"].values()
    assert sum(d["after"] - d["before"] for d in dice) / len(dice) > 0.1


@pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
def test_an_unknown_parameter_stops_the_second_cell_and_lists_the_right_ones(name):
    """As papermill runs it: its own parameters come in a cell behind the notebook's."""
    codes = [cell.source for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells if cell.cell_type == "code"]
    given = [codes[0], "# Parameters\nstepz = 3", codes[1]]
    namespace = {"In": ["", *given]}
    exec("\n".join(given[:2]), namespace)
    with pytest.raises(ConfigError, match=r"stepz: unknown; known are \w+, \w+"):
        exec(given[2], namespace)


def test_a_wrong_value_stops_papermill_and_is_named(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match=r"optimizer: expected one of adam, .*, got 'sgd'"):
        execute("10_train", tmp_path, optimizer="sgd")
    codes = [cell for cell in nbformat.read(tmp_path / "10_train.ipynb", 4).cells if cell.cell_type == "code"]
    failed = [i for i, cell in enumerate(codes) if any(o.output_type == "error" for o in cell.outputs)]
    assert failed[-1] == 2  # parameters, papermill's, check


def codes(name, **given):
    """The code cells of a notebook, with these values in place of the first one's defaults."""
    cells = [cell.source for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells if cell.cell_type == "code"]
    for key, value in given.items():
        put = rf"^({key}: \w+ = ).*?(?=  #)"
        cells[0], found = re.subn(put, lambda m, value=value: m[1] + repr(value), cells[0], flags=re.M)
        assert found == 1, key
    return cells


def stopped(codes):
    """What a person sees who runs these cells and is stopped."""
    with pytest.raises(Exception) as told:  # noqa: PT011, whichever it is
        exec("\n\n".join(codes), {"In": ["", *codes]})
    return f"{told.type.__name__}: {told.value}"


@pytest.mark.parametrize(
    ("name", "parameter", "said"),
    [
        ("20_evaluate", "run", "expected a run of notebook 10_train in {}, got none: run 10_train"),
        ("30_loss_landscape", "run", "expected a run of notebook 10_train in {}, got none: run 10_train"),
        ("40_compare", "folder", "no results under {} of a run: run the study first (make study STUDY=...)"),
    ],
)
def test_a_folder_without_a_run_says_what_to_run_first(tmp_path, name, parameter, said):
    there = tmp_path / "nothing"
    given = {parameter: str(there)} | ({"out": str(tmp_path)} if parameter == "run" else {})
    assert said.format(there) in stopped(codes(name, **given)[:4])


@pytest.mark.parametrize(
    ("name", "checked"), [("10_train", "run"), ("20_evaluate", "settings"), ("30_loss_landscape", "settings")]
)
def test_cells_out_of_order_from_another_folder(tmp_path, name, checked):
    first, second, third, *_ = codes(name)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in (first, second, second)])
    about = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, resources=about, shutdown_kernel=ENDS).execute()  # the second once more
    assert 'run the first code cell (it begins with "# Parameters")' in stopped([second])
    assert stopped([third]) == f"NameError: name '{checked}' is not defined"  # docs/faq.md says what to do


def test_the_questions_name_the_messages_that_newcomers_see():
    rows = (PROJECT / "docs/faq.md").read_text().partition("## A notebook stops at once")[2].partition("\n## ")[0]
    for message in (
        "ModuleNotFoundError: No module named 'fmsam_lib'",
        "NameError: name 'settings' is not defined",
        "no parameter cell was run",
        "expected a run of notebook 10_train",
        "no results under",
    ):
        assert message in rows, message


def test_30_starts_where_the_trainings_of_the_networks_that_ship_did():
    code = "".join(cell.source for cell in nbformat.read(NOTEBOOKS / "30_loss_landscape.ipynb", 4).cells)
    seed = as_module("studies/ship.py").COARSE["seed"]
    assert re.findall(r"torch\.manual_seed\((\d+)\)  # of both trainings", code) == [str(seed)]
