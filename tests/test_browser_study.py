"""A person's way through the study browser: JupyterLab in a real browser, a point clicked, arrow keys, a menu."""

import re

import pytest

from fmsam_lib.evaluation.evaluate import read_results
from fmsam_lib.evaluation.statistics import per_pair
from tests import test_browser
from tests.test_browser import bottom_until, browser, lab, opened_in_lab, page, run_all, shot  # noqa: F401
from tests.widgets.small_study import compute

pytestmark = [*test_browser.pytestmark, pytest.mark.slow]


def numbers(text):
    return list(map(float, re.findall(r"[-+]?\d+\.\d+", text)))


def test_a_click_on_a_point_goes_to_its_pair(lab, page, once):  # noqa: F811
    root = once("browsed", compute)
    opened_in_lab(lab, page, "40_compare", {"study": str(root / "study.yaml"), "folder": str(root)})
    run_all(page)
    plot = page.locator(".fmsam-canvas .surface")
    bottom_until(page, plot)

    def table(seed):
        """Name, Dice of Adam and Dice of SAM of each pair of heart-mr, from SAM's worst to its best."""
        values = []
        for optimizer in ("adam", "sam"):
            rows = read_results(root / f"brain-mr/{optimizer}/seed{seed}/results.csv")
            values.append(per_pair(rows[rows.test_domain == "heart-mr"], "dice").set_index("pair").value)
        found = [
            (f"heart-mr, test pair {int(name[-2:]) + 1}", values[0][name], dice) for name, dice in values[1].items()
        ]
        return sorted(found, key=lambda row: row[2])

    def shows(row):
        """Wait until the pair and its numbers are there; a picture of its registration by SAM."""
        there = page.wait_for_function(
            """told => {
                const cells = [...document.querySelectorAll(".fmsam-canvas table")[0].querySelectorAll("td")];
                const texts = cells.map((cell) => cell.textContent);
                return told.every((text) => texts.includes(text)) && texts;
            }""",
            arg=[row[0], f"Adam {row[1]:.3f}, SAM {row[2]:.3f}"],
        ).json_value()
        told = dict(zip(there[::2], there[1::2], strict=True))
        assert numbers(told["difference"]) == pytest.approx([row[2] - row[1]], abs=5.1e-4)
        assert "no picture" not in told
        return page.locator(".fmsam-canvas canvas").nth(1).evaluate("canvas => canvas.toDataURL()")

    rows = table(seed=0)
    worst = shows(rows[0])
    place = plot.locator(".point").evaluate("point => [point.style.left, point.style.top]")
    page.get_by_role("button", name="go to the best").click()
    best = shows(rows[-1])
    assert best != worst
    area = plot.bounding_box()
    left, top = (float(share.removesuffix("%")) / 100 for share in place)
    plot.click(position={"x": left * area["width"] + 3, "y": top * area["height"] - 3})  # beside the point
    assert shows(rows[0]) == worst
    for row in rows[1:3]:
        plot.press("ArrowRight")
        shows(row)
    plot.press("ArrowLeft")
    shows(rows[1])
    titles = page.locator(".fmsam-canvas figcaption").all_inner_texts()
    assert titles == ["Adam", "SAM"] * 4
    widths = [canvas.bounding_box()["width"] for canvas in page.locator(".fmsam-canvas canvas").all()[2:]]
    assert max(widths) - min(widths) < 1
    shot(page, "study", plot)
    shot(page, "study_three", page.locator(".fmsam-canvas").last)
    page.locator(".widget-dropdown", has_text="seed").locator("select").select_option("1")
    shows(table(seed=1)[0])
