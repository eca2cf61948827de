import json
from pathlib import Path

import nbformat
import pytest

from fmsam_lib import parameters as config
from fmsam_lib.checking import ConfigError, read
from fmsam_lib.parameters import Between, Compare, Evaluate, Explain, Landscape, Look, Register, Start, Train

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
KIND = {
    "00_start_here": Start,
    "01_look_at_the_data": Look,
    "04_sam_explained": Explain,
    "10_train": Train,
    "20_evaluate": Evaluate,
    "30_loss_landscape": Landscape,
    "35_between_minima": Between,
    "40_compare": Compare,
    "50_register_your_own": Register,
}


def defaults(name):
    """What the notebook's parameter cell assigns."""
    cell = next(c for c in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells if c.cell_type == "code")
    assert cell.metadata.tags == ["parameters"]
    values = {}
    exec(cell.source, values)
    return {key: value for key, value in values.items() if not key.startswith("__")}


@pytest.mark.parametrize("name", KIND)
def test_the_notebooks_own_defaults_are_valid_and_complete(name):
    read(KIND[name], defaults(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"steps": 1.5}, "steps: expected int, got 1.5"),
        ({"steps": True}, "steps: expected int, got True"),
        ({"lr": "1e-3"}, r"lr: expected float, got '1e-3' \(YAML reads 1e-3 as text: write 1.0e-3\)"),
        ({"lr": 0}, "lr: expected above 0, got 0"),
        ({"lr": float("nan")}, "lr: expected finite numbers, got nan"),
        ({"optimizer": "samm"}, "one of adam, adam-2x, sam, asam, sam-every, looksam, random, got 'samm'"),
        ({"shape": [32]}, "shape: expected 2 or 3 numbers"),
        ({"shape": [32, 8]}, "shape: expected at least 16"),
        ({"shape": "32"}, "shape: expected list"),
        ({"train_domain": ""}, "train_domain: expected at least one"),
        ({"rhoo": 1}, r"rhoo: unknown; known are out, .*did you mean rho\?"),
    ],
)
def test_wrong_values_are_named_with_what_was_expected(change, message):
    with pytest.raises(ConfigError, match=message):
        read(Train, defaults("10_train") | change)


def test_all_problems_are_told_at_once():
    values = defaults("10_train") | {"steps": 0, "lr": -1}
    del values["seed"]
    with pytest.raises(ConfigError, match=r"(?s)3 problems.*seed: missing.*steps:.*lr:"):
        read(Train, values)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("20_evaluate", {"methods": []}, r"methods: expected at least one, got \[\]"),
        (
            "20_evaluate",
            {"methods": ["sam"]},
            r"methods: expected a list of some of none, ants-syn, io, network, network\+io, got \['sam'\]",
        ),
        ("20_evaluate", {"methods": ["none", "none"]}, "methods: expected each once"),
        ("20_evaluate", {"methods": "none"}, "methods: expected a list of some of"),
        ("20_evaluate", {"corruptions": ["fog"]}, "corruptions: expected a list of some of noise, bias_field, .*'fog'"),
        ("20_evaluate", {"corrupted_pairs": 0}, "corrupted_pairs: expected at least 1, got 0"),
        ("20_evaluate", {"io_lr": 0}, "io_lr: expected above 0, got 0"),
        ("20_evaluate", {"alone_lr": -1}, "alone_lr: expected above 0, got -1"),
        ("20_evaluate", {"io": -1}, "io: expected at least 0, got -1"),
        ("20_evaluate", {"fields": 1}, "fields: expected bool, got 1"),
        ("30_loss_landscape", {"normalisation": "weight"}, "normalisation: expected one of filter, layer, none"),
        ("30_loss_landscape", {"rhos": []}, "rhos: expected at least one"),
        ("30_loss_landscape", {"rhos": [0.1, 0]}, "rhos: expected above 0"),
        ("30_loss_landscape", {"draws": 1}, "draws: expected at least 2, got 1"),
        ("30_loss_landscape", {"eigenvalues": -1}, "eigenvalues: expected at least 0"),
        ("30_loss_landscape", {"lanczos_steps": 1}, "lanczos_steps: expected at least 2"),
        ("35_between_minima", {"path_points": 2}, "path_points: expected at least 3, got 2"),
        ("35_between_minima", {"plane_points": 4}, "plane_points: expected an odd number, got 4"),
        ("35_between_minima", {"run": "x"}, "run: unknown; known are baseline, treatment, out"),
        ("10_train", {"snapshots": -1}, "snapshots: expected at least 0, got -1"),
    ],
)
def test_wrong_values_of_evaluation_and_landscape_are_named(name, change, message):
    with pytest.raises(ConfigError, match=message):
        read(KIND[name], defaults(name) | change)


def test_what_can_be_left_out_may_be_nothing():
    """No corruption, no instance optimisation, no Hessian, flatness on all domains."""
    read(Evaluate, defaults("20_evaluate") | {"corruptions": [], "io": 0})
    read(
        Landscape, defaults("30_loss_landscape") | {"measured_on": [], "eigenvalues": 0, "probes": 0, "ascent_steps": 0}
    )


def test_even_numbers_of_points_miss_the_trained_weights():
    with pytest.raises(ConfigError, match="plane_points: expected an odd number, got 8"):
        read(Landscape, defaults("30_loss_landscape") | {"plane_points": 8})


START = (
    '# Parameters: ...\ndomain: str = "brain-mr"\nshape: list = [32, 32]\nsteps: int = 5\nrho: float = 0\nseed: int = 0'
)


def session(*cells):
    """The globals of a notebook in which `cells` were run."""
    namespace = {}
    for cell in cells:
        exec(cell, namespace)
    return namespace | {"In": ["", *cells, "config.from_notebook(...)"]}


def test_injected_parameters_take_the_place_of_defaults():
    assert config.from_notebook(Start, session(START, "# Parameters\nsteps = 7")).steps == 7


def test_an_unknown_injected_parameter_is_found():
    with pytest.raises(ConfigError, match="stepps: unknown; known are domain, shape, steps, rho, seed"):
        config.from_notebook(Start, session(START, "# Parameters\nstepps = 7"))


def test_variables_of_other_cells_are_not_parameters():
    assert config.from_notebook(Start, session("stepps = 3", START, "import json", "x = 1")).steps == 5


def test_a_corrected_parameter_cell_forgets_the_wrong_one():
    assert config.from_notebook(Start, session(START + "\nstepps = 7", "x = 1", START)).steps == 5


def test_running_the_second_cell_first_says_so():
    with pytest.raises(ConfigError, match="run the first code cell"):
        config.from_notebook(Start, {"In": ["", "x = 1"]})


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.json"
    config.write_json(path, {"a": 1})
    with pytest.raises(UnicodeEncodeError), config.written_whole(path) as partial:
        partial.write_text("half of it, then \ud800", encoding="utf-8")
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_provenance_names_commit_versions_and_hardware():
    made = config.provenance()
    assert made["packages"]["torch"].startswith("2.")
    assert made["cores"] >= 1
    assert made["commit"]
    assert made["cpu"]


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match="expected a run of notebook 10_train"):
        config.trained_with(tmp_path)


def test_runs_recorded_before_a_parameter_was_added_can_be_read(tmp_path):
    old = {name: value for name, value in defaults("10_train").items() if name not in config.ADDED}
    (tmp_path / "config.json").write_text(json.dumps({"parameters": old}))
    assert config.trained_with(tmp_path) == read(Train, old | config.ADDED)


def test_what_older_records_lack_is_the_notebooks_default():
    """But for validation, which only watches: there was none."""
    ours = {name: defaults("10_train")[name] for name in config.ADDED}
    assert ours | {"validation": 0} == config.ADDED
