import pandas as pd
import pytest

from fmsam_lib.evaluate import COLUMNS
from fmsam_lib.report import Found, radii


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
    configs = {
        f"a+b/sam-{rho}/seed0": {"parameters": {"train_domain": "a+b", "optimizer": "sam", "rho": rho, "lr": 1e-3}}
        for rho in (0.1, 0.2)
    }
    results = pd.DataFrame(rows)[COLUMNS]
    table = radii(Found(results, pd.DataFrame(), pd.DataFrame(history), configs, []))
    assert table.optimizer.tolist() == ["sam"] * 4
    assert table.rho.tolist() == [0.1, 0.1, 0.2, 0.2]
    assert table.domains.tolist() == ["seen", "unseen"] * 2
    assert table.dice.tolist() == pytest.approx([0.6, 0.3, 0.7, 0.4])
    assert table.loss.tolist() == [18.5] * 4  # of steps 18 and 19


def test_without_runs_there_are_no_radii():
    none = pd.DataFrame([{name: "x" for name in COLUMNS} | {"value": 0.5, "metric": "dice"}])
    for configs in ({}, {"a/sam/seed0": {}}):
        table = radii(Found(none, pd.DataFrame(), pd.DataFrame(), configs, []))
        assert not table.groupby("optimizer").rho.nunique().max() > 1
