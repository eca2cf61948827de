"""Instance optimisation and fine-tuning on a set never seen, as recorded by studies/helps.py."""

import pandas as pd
import pytest

import fmsam_lib as fm
from tests.conftest import as_module

KINDS = ["nothing", "io", "fine-tuned, adam", "fine-tuned, sam"]


def test_every_help_is_measured_once_on_what_was_not_seen(tmp_path, monkeypatch):
    script = as_module("studies/helps.py")
    small = {"OUT": tmp_path / "helps.csv", "GRADIENTS": 4, "WITHOUT": {"none": None}}
    small |= {"AMOUNTS": dict(zip(KINDS, [(0,), (2,), (3,), (3,)], strict=True))}
    for name, value in small.items():
        monkeypatch.setattr(script, name, value)
    folder = tmp_path / "study" / "heart-mr" / "adam-2x" / "seed10"
    domain = fm.open_domain("heart-mr", shape=(32, 32))
    net, _ = fm.train(domain, out=folder, seed=10, steps=80, down=[4, 8], levels=2, lr=0.01, progress=False)
    pd.DataFrame({"test_domain": ["heart-mr", "brain-mr"]}).to_csv(folder / "results.csv", index=False)

    script.measure(tmp_path / "study", [10], ["adam-2x"], KINDS, 2)
    table = pd.read_csv(tmp_path / "helps.csv")
    assert table.means.tolist() == [*KINDS, "nothing"]
    assert table.training.tolist() == ["adam-2x"] * 4 + ["none"]
    assert set(table.test_domain) == {"brain-mr"}  # the heart was trained on
    for line, method in ((table.iloc[0], net), (table.iloc[4], None)):
        values = fm.evaluate(method, fm.open_domain("brain-mr", shape=(32, 32)), pairs=2).query("metric == 'dice'")
        assert line.dice == pytest.approx(values.groupby("pair").value.mean().mean(), abs=1e-6)
    assert table.dice.nunique() >= 3  # fine-tuning with Adam or SAM changes it, each in its own way

    written = (tmp_path / "helps.csv").read_bytes()
    monkeypatch.setattr(script, "helped", lambda *_: pytest.fail("measured twice"))
    script.measure(tmp_path / "study", [10], ["adam-2x"], KINDS, 2)
    assert (tmp_path / "helps.csv").read_bytes() == written
