"""Sliders over any figure, driven through their controls."""

import base64

import ipywidgets as widgets
import pytest

from fmsam_lib.plotting.slices import Picture
from fmsam_lib.widgets import sliders
from fmsam_lib.widgets.sliders import slide


def power(rate=1.0, x=0.5):
    figure = Picture(figsize=(2, 2))
    axes = figure.subplots()
    axes.plot([0, x, 2 * x], [0, rate * x, rate * (2 * x) ** 2], label=f"rate {rate:g}")
    axes.legend()
    return figure


@pytest.fixture(autouse=True)
def displayed(monkeypatch):
    """What a notebook would have shown, in order."""
    things = []
    monkeypatch.setattr(sliders, "display", lambda thing, raw=False: things.append(thing))
    return things


def test_sliders_redraw_any_figure(displayed):
    controls = {"rate": widgets.FloatLogSlider(value=0.35, min=-3, max=0), "x": widgets.FloatSlider(value=0.9, min=-1)}
    shown = slide(power, controls, interactive=True)
    (bundle,) = displayed
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == shown.widget.model_id
    assert base64.b64decode(bundle["image/png"]) == shown.image.value  # for whoever has no kernel to show the widget
    assert shown.figure.axes[0].lines[0].get_xdata()[1] == 0.9
    assert [control.description for control in controls.values()] == ["rate", "x"]
    pictures = [bytes(shown.image.value)]
    for name, value in (("rate", 0.01), ("x", 0.5)):
        shown.controls[name].value = value
        assert bytes(shown.image.value).startswith(b"\x89PNG")
        assert bytes(shown.image.value) not in pictures
        pictures.append(bytes(shown.image.value))
    assert shown.figure.axes[0].get_legend().get_texts()[0].get_text() == "rate 0.01"
    assert shown.figure.axes[0].lines[0].get_xdata()[1] == 0.5


def test_without_a_notebook_sliders_leave_the_still_picture(displayed):
    assert slide(power, {"rate": widgets.FloatSlider(value=0.1)}) is None
    assert len(displayed) == 1
    assert isinstance(displayed[0], Picture)
