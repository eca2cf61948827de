"""Cells of notebook 40, run on made-up tables: what a study's report draws and writes."""

import ast
import json
from contextlib import contextmanager
from types import SimpleNamespace

import pandas as pd

from fmsam_lib.parameters import Compare
from fmsam_lib.study.gather import Found
from fmsam_lib.study.grid import Study
from tests.conftest import PROJECT

CELLS = [
    (cell["metadata"].get("tags", [""])[0], ast.parse("".join(cell["source"])))
    for cell in json.loads((PROJECT / "notebooks/40_compare.ipynb").read_text())["cells"]
    if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", [])
]
STUDY = Study(train_domains=["a"], test_domains=["a", "b"], optimizers=["adam", "sam"], seeds=[0, 1], shape=[32, 32],
              description="made up", train={}, evaluate={}, landscape=None)  # fmt: skip


def defines(node):
    """Imports, functions and constants, which any later cell may use."""
    constant = isinstance(node, ast.Assign) and all(isinstance(t, ast.Name) and t.id.isupper() for t in node.targets)
    return constant or isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef)


def run(*sections, real=(), **given):
    """The notebook's names after the cells tagged `sections`, run on `given`: tables of `Found`, other names.

    figures: what was drawn, by name; tables: what was kept. real: those of the notebook's own functions for this
    (figure, keep, keep_table) that are not to be replaced.
    """
    tables = {name: given.pop(name, pd.DataFrame()) for name in Found._fields[:-3]}
    found = Found(**tables, configs=given.pop("configs", {}), problems=[], notes=[])
    names = {"found": found, "study": STUDY, "settings": Compare(), "against": [("adam", "sam")], "metric": "dice"}
    figures, kept = {}, {}

    @contextmanager
    def figure(name, says, table):
        block = SimpleNamespace()
        yield block
        figures[name] = block.picture

    own = {"figure": figure, "keep_table": lambda table, name, columns=None: kept.update({name: table})}
    definitions = [node for _, tree in CELLS for node in tree.body if defines(node)]
    sections = [[n for n in tree.body if not defines(n)] for tag, tree in CELLS if tag in sections]
    for i, body in enumerate([definitions, *sections]):
        exec(compile(ast.Module(body, []), "40_compare.ipynb", "exec"), names)
        if i == 0:
            names |= {name: value for name, value in own.items() if name not in real} | {"metric": "dice"} | given
    return SimpleNamespace(**names | {"figures": figures, "tables": kept})
