import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot

from fmsam_lib.plotting import slices
from fmsam_lib.plotting import style as looks
from fmsam_lib.plotting.slices import save


def test_unknown_optimizers_get_looks_of_their_own():
    names = ["adam", "sam", "zoo", "bar", "zoo+io"]
    assert len({looks.look(name, names)["color"] for name in names[:4]}) == 4
    assert looks.look("zoo+io", names)["color"] == looks.look("zoo", names)["color"]


@pytest.mark.parametrize("names", [["adam-2x", "adam-4x", "sam-2x"], ["looksam", "random", "a", "b", "c"]])
def test_no_unknown_optimizer_looks_like_a_known_one_beside_it(names):
    assert len({looks.look(name, names)["color"] for name in names}) == len(names)


def test_a_sweep_of_many_optimizers_is_told_apart():
    names = [
        f"{base}-lr={lr}{rho}" for lr in (0.001, 0.004) for base, rho in (("adam", ""), ("adam-2x", ""), ("sam", ""))
    ]
    names += [f"sam-lr={lr}-rho={rho}" for lr in (0.001, 0.004) for rho in (0.01, 0.03)]
    assert len({(looks.look(name, names)["color"], looks.look(name, names)["marker"]) for name in names}) == len(names)


def test_every_known_look_and_name_is_its_own():
    combined = [{key: str(value) for key, value in look.items()} for look in looks.LOOKS.values()]
    for key in ("color", "marker", "linestyle"):
        assert len({look[key] for look in combined}) == len(looks.LOOKS)
    assert len({looks.name_of(name) for name in looks.LOOKS}) == len(looks.LOOKS)


def test_instance_optimisation_after_a_network_keeps_the_networks_colour():
    plain, refined = looks.look("sam", ["sam"]), looks.look("sam+io", ["sam", "sam+io"])
    assert plain["color"] == refined["color"]
    assert plain["linestyle"] != refined["linestyle"]
    assert refined["markerfacecolor"] == "white"
    assert [looks.name_of(name) for name in ("sam+io", "io", "ants-syn")] == [
        "SAM + IO", "instance optimisation alone", "ANTs SyN",
    ]  # fmt: skip
    rows = pd.DataFrame({"optimizer": ["zoo", "sam+io", "adam+io", "sam", "io", "adam"]})
    assert looks.optimizers_of(rows) == ["io", "adam", "adam+io", "sam", "sam+io", "zoo"]


def test_figures_show_themselves_and_stay_out_of_pyplot():
    figure = drawn()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert not pyplot.get_fignums()


def test_files_are_whole_the_same_each_time_and_alone(tmp_path):
    for folder in ("one", "two"):
        save(drawn(), tmp_path / folder / "deep" / "v1.2")
    for suffix in ("png", "pdf"):
        one, two = ((tmp_path / folder / "deep" / f"v1.2.{suffix}").read_bytes() for folder in ("one", "two"))
        assert one == two
        assert b"CreationDate" not in one
    assert len(list((tmp_path / "one" / "deep").iterdir())) == 2


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "figure.png").write_text("old")

    class Broken(slices.Picture):
        def savefig(self, path, **how):
            path.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save(Broken(), tmp_path / "figure")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("figure.png", "old")]


def drawn(number=5):
    figure, axes = looks.panels(number, 3, 2.0, "loss")
    looks.curve(axes[0], pd.Series([1.0, 2.0, 3.0], [0, 0, 1]), looks.look("sam", ["sam"]))
    looks.legend(figure, ["adam", "sam"])
    return figure


def test_panels_are_those_asked_for_and_the_lowest_of_each_column_has_its_numbers():
    figure, axes = looks.panels(5, 3, 2.0, "loss", sharex=True)
    assert figure.axes == axes
    assert [ax.get_ylabel() for ax in axes] == ["loss", "", "", "loss", ""]
    figure.draw_without_rendering()
    assert [any(t.get_visible() for t in ax.get_xticklabels()) for ax in axes] == [False, False, True, True, True]


def test_a_mean_and_its_range_are_drawn_and_what_is_missing_is_said():
    _, (ax,) = looks.panels(1, 1, 2.0)
    looks.curve(ax, pd.Series([1.0, 2.0, 3.0], [0, 0, 1]), looks.look("sam", ["sam"]))
    assert ax.lines[0].get_ydata().tolist() == [1.5, 3.0]
    band = ax.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (1, 3)
    assert looks.not_finite(pd.Series([1.0, np.nan, np.inf])) == "2 not finite"
    assert looks.missing(pd.DataFrame({"optimizer": ["adam"]}), ["adam", "sam"]) == "\nSAM: –"
