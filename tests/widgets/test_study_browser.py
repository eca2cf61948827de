"""The study browser: its numbers are the results', its registrations those that were measured."""

import re
from functools import partial

import numpy as np
import pytest

from fmsam_lib.evaluation.evaluate import read_results
from fmsam_lib.evaluation.statistics import per_pair
from fmsam_lib.images.domains import open_domain
from fmsam_lib.model.weights import load
from fmsam_lib.parameters import Compare
from fmsam_lib.plotting import slices
from fmsam_lib.study.file import read_study
from fmsam_lib.study.gather import gather
from fmsam_lib.widgets import study_browser
from fmsam_lib.widgets.study_browser import Browser, Choice, Pairs, three_of
from tests.study.report import run
from tests.widgets.small_study import compute

CHOICE = Choice("brain-mr", "heart-mr", 1, "adam", "sam")
OPENED = partial(open_domain, shape=(32, 32))


@pytest.fixture(scope="module")
def root(once):
    return once("browsed", compute)


def pairs_of(root, folder=None, opened=OPENED, results=None, **how):
    study = read_study(root / "study.yaml")
    found = gather(study, root).results if results is None else results
    return Pairs(found, lambda *run: (folder or root) / study.run(*run).folder, opened, **how)


def browser_of(root, first=CHOICE, drawn=None, **how):
    def draw(ax, table, choice):
        ax.plot(table.value1, table.gain, ".")
        if drawn is not None:
            drawn.append(choice)

    return Browser(pairs_of(root, **how), first, draw)


def recorded(root, optimizer, metric, test="heart-mr", seed=1):
    rows = read_results(root / f"brain-mr/{optimizer}/seed{seed}/results.csv")
    return per_pair(rows[rows.test_domain == test], metric).set_index("pair").value


def numbers(text):
    return list(map(float, re.findall(r"[-+]?\d+(?:\.\d+)?", text)))


def title(name):
    """What people call a synthetic test pair: heart-mr-0-1000002 is the third one."""
    return f"heart-mr, test pair {int(name[-2:]) + 1}"


def test_the_numbers_shown_are_those_of_the_results(root):
    browser = browser_of(root)
    dice = {optimizer: recorded(root, optimizer, "dice") for optimizer in ("adam", "sam")}
    folding = {optimizer: recorded(root, optimizer, "folding_percent") for optimizer in ("adam", "sam")}
    names = {title(name): name for name in dice["sam"].index}
    assert len(names) == 6
    shown = set()
    for point in browser.plot.surface["points"]:
        browser.plot.point = point
        facts = browser.plot.facts
        name = names[facts["pair"]]
        both = [dice["adam"][name], dice["sam"][name]]
        assert numbers(facts["Dice"]) == pytest.approx(both, abs=5e-4)
        assert numbers(facts["difference"])[0] == pytest.approx(both[1] - both[0], abs=5.1e-4)
        assert numbers(facts["folded"]) == pytest.approx([folding[o][name] for o in folding], rel=0.06, abs=1e-6)
        assert point[:2] == pytest.approx([both[1], both[1] - both[0]])
        assert facts["Dice"].startswith("Adam ")
        assert facts["difference"].endswith("SAM minus Adam")
        assert "now" not in facts
        shown.add(name)
    assert shown == set(names.values())


def test_a_registration_is_what_was_measured_and_computed_once(root, monkeypatch):
    calls = []
    monkeypatch.setattr("fmsam_lib.widgets.study_browser.load", lambda file: calls.append(file) or load(file))
    pairs = pairs_of(root)
    for name in recorded(root, "sam", "dice").index:
        called, cuts, dice = pairs.registered(CHOICE, name)
        assert called == title(name)
        measured = [recorded(root, optimizer, "dice")[name] for optimizer in ("adam", "sam")]
        assert dice == pytest.approx(measured, abs=1e-6)
        pair = OPENED("heart-mr").test_pair(int(name[-2:]))
        for optimizer, cut in zip(("adam", "sam"), cuts, strict=True):
            phi = load(root / f"brain-mr/{optimizer}/seed1/weights.pt")(pair.moving[None], pair.fixed[None]).map
            assert np.allclose(cut.warped, slices.cut(pair, phi.detach()).warped, atol=1e-5)
    assert len(calls) == 2  # a network is read once
    assert pairs.registered(CHOICE, name) is pairs.registered(CHOICE, name)


def test_worst_median_and_best_are_the_treatments(root):
    browser = browser_of(root)
    sam = recorded(root, "sam", "dice").sort_values(kind="stable")
    expected = {"worst": sam.index[0], "median": sam.index[2], "best": sam.index[5]}
    for canvas, (end, name) in zip(browser.ends, expected.items(), strict=True):
        assert canvas.facts[end] == title(name)
        assert [panel["title"] for panel in canvas.panels] == ["Adam", "SAM"]
        assert canvas.panels[0]["tall"] == canvas.panels[1]["tall"]
        assert canvas.panels[0]["pixels"] != canvas.panels[1]["pixels"]
    assert browser.ends[1].facts["place"] == "3 of 6 by SAM's Dice, the worst first"
    for end, place in browser.plot.surface["places"].items():
        browser.plot.point = place
        assert browser.plot.facts["pair"] == title(expected[end.removeprefix("the ")])


def test_where_less_is_better_the_worst_is_the_largest(root):
    pairs = pairs_of(root, metric="map_error", called="error of the map")
    table = pairs.table(CHOICE)
    assert table.value1.is_monotonic_decreasing
    assert table.index[0] == recorded(root, "sam", "map_error").idxmax()
    _, facts = pairs.tells(CHOICE, table, 0)
    assert facts["error of the map"].startswith("Adam ")


def test_the_menus_choose_domain_seed_and_optimizer(root):
    drawn = []
    browser = browser_of(root, drawn=drawn)
    before = browser.plot
    browser.controls["test"].value = "brain-mr"
    assert before.comm is None  # closed, else each choice would stay in memory
    browser.controls["seed"].value = 0
    browser.controls["treatment"].value, browser.controls["baseline"].value = "adam", "sam"
    assert drawn[-1] == Choice("brain-mr", "brain-mr", 0, "sam", "adam")
    adam, sam = (recorded(root, optimizer, "dice", "brain-mr", 0) for optimizer in ("adam", "sam"))
    worst = adam.idxmin()
    assert browser.ends[0].facts["worst"].startswith("brain-mr, test pair ")
    assert numbers(browser.ends[0].facts["Dice"]) == pytest.approx([sam[worst], adam[worst]], abs=5e-4)
    assert browser.plot.surface["points"][0][:2] == pytest.approx([adam[worst], adam[worst] - sam[worst]])


def test_a_choice_without_a_pair_in_common_is_said(root):
    results = gather(read_study(root / "study.yaml"), root).results
    lacks = (results.optimizer == "sam") & (results.seed == 0)
    browser = browser_of(root, results=results[~lacks])
    browser.controls["seed"].value = 0
    assert browser.children[1].value == "These two have no test pair in common."
    browser.controls["seed"].value = 1
    assert browser.children[1] is browser.plot


def test_missing_weights_and_images_are_said_and_the_numbers_stay(root, tmp_path):
    elsewhere = pairs_of(root, folder=tmp_path)
    panels, facts = elsewhere.tells(CHOICE, elsewhere.table(CHOICE), 0)
    assert panels == []
    assert f"{tmp_path}/brain-mr/adam/seed1/weights.pt" in facts["no picture"]
    assert len(numbers(facts["Dice"])) == 2
    other = pairs_of(root, opened=lambda name: open_domain("knee-mr", shape=(32, 32)))
    assert "the images of heart-mr-0-" in other.tells(CHOICE, other.table(CHOICE), 0)[1]["no picture"]


def test_other_images_than_those_measured_are_said(root):
    results = gather(read_study(root / "study.yaml"), root).results
    results.loc[results.metric == "dice", "value"] -= 0.01
    pairs = pairs_of(root, results=results)
    table = pairs.table(CHOICE)
    _, facts = pairs.tells(CHOICE, table, 0)
    assert numbers(facts["now"]) == pytest.approx(table.iloc[0][["value0", "value1"]].to_numpy(float) + 0.01, abs=1e-3)


def test_pairs_that_evaluation_could_not_read_do_not_shift_the_others(root):
    results = gather(read_study(root / "study.yaml"), root).results
    lost = "heart-mr-0-1000001"
    pairs = pairs_of(root, results=results[results.pair != lost])
    for name in pairs.table(CHOICE).index:
        assert pairs.registered(CHOICE, name)[0] == title(name)


def test_one_pair_is_all_three():
    assert three_of([0]) == {"worst": 0, "median": 0, "best": 0}
    assert three_of([0] * 4) == {"worst": 0, "median": 1, "best": 3}


@pytest.fixture
def cells(root, monkeypatch):
    """Runs the notebook's cells without a screen; what it kept and said, and the networks' registrations."""
    registrations = []
    ours = study_browser.register
    monkeypatch.setattr(study_browser, "register", lambda *of, **how: registrations.append(of) or ours(*of, **how))

    def run_cells(folder=None, **changes):
        study, kept, said = read_study(root / "study.yaml"), [], []
        given = {"results": gather(study, root).results, "study": study, "display": lambda *shown: said.extend(shown)}
        given |= {"settings": Compare(study=str(root / "study.yaml"), folder=str(folder or root))}
        run("pairs", **given | changes, treatment="sam", keep=lambda *figure: kept.append(figure))
        return kept, [one.data for one in said], registrations

    return run_cells


def test_without_a_kernel_one_picture_of_three_pairs_stands_in_its_place(cells, root):
    [(picture, name, caption)], said, registrations = cells()
    assert said == []
    assert name == "pairs"
    assert "test pair by Dice of SAM: trained on brain-mr, tested on heart-mr, seed 0." in caption
    assert len(registrations) == 6
    sam, adam = (recorded(root, optimizer, "dice", seed=0) for optimizer in ("sam", "adam"))
    order = sam.sort_values(kind="stable").index[[0, 2, 5]]
    gains, *panels = picture.axes
    assert len(gains.lines[1].get_xdata()) == 6
    titles = [f"{who}\n{dice[name]:.3f}" for name in order for who, dice in (("Adam", adam), ("SAM", sam))]
    assert [ax.get_title().split(",")[0] for ax in panels] == titles
    assert [ax.get_ylabel() for ax in panels[::2]] == [
        f"{end}\n{title(name)}" for end, name in zip(("worst", "median", "best"), order, strict=True)
    ]
    assert len({ax.images[0].get_clim() for ax in panels}) == 1  # the same greys
    assert len({ax.get_position().height.round(3) for ax in panels}) == 1


def test_without_weights_or_two_networks_one_sentence_stands_there(cells, root, tmp_path):
    kept, [said], registrations = cells(folder=tmp_path)
    assert (kept, registrations) == ([], [])
    assert said.startswith("**No pairs to look at:** ")
    assert "brain-mr/adam/seed0/weights.pt" in said
    results = gather(read_study(root / "study.yaml"), root).results
    for rows in (results[results.optimizer != "sam"], results[results.metric == "folding_percent"], results[:0]):
        kept, [said], _ = cells(results=rows)
        assert (kept, said) == (
            [],
            "**No pairs to look at:** there are no two networks with a test pair in common.",
        )
