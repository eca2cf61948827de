"""How long the teaching notebooks take that need no data and no run: from a fresh kernel to the last cell.

    python benchmarks/notebooks.py

Writes benchmarks/notebooks.csv; `busy` is the machine's load before it began, where the system tells it.
"""

import os
import tempfile
from datetime import datetime
from pathlib import Path

import papermill
from recording import record

from fmsam_lib.records import PROJECT

REACH = {
    "00_start_here": "<= 180",
    "01_look_at_the_data": "<= 180",
    "02_registration_by_hand": "<= 180",
    "03_the_network": "<= 180",
    "04_sam_explained": "<= 180",
    "05_how_far_to_climb": "",
    "06_does_sam_help": "",
    "50_register_your_own": "",
    "60_when_not_to_trust_it": "",
}


def run(name: str, folder: str):
    """The notebook, executed with its own parameters; what it writes goes into `folder`."""
    more = {"out": str(Path(folder) / name)} if name == "50_register_your_own" else {}
    path = PROJECT / "notebooks" / f"{name}.ipynb"
    return papermill.execute_notebook(path, Path(folder) / path.name, more, cwd=path.parent, progress_bar=False)


def seconds(notebook, cell=None) -> float:
    """From the start to the end of a cell, of the whole notebook without one."""
    began, ended = notebook.metadata.papermill.start_time, (cell or notebook).metadata.papermill.end_time
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds()


def main() -> None:
    busy, rows = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "", []
    with tempfile.TemporaryDirectory() as folder:
        for name, reach in REACH.items():
            notebook = run(name, folder)
            if name == "00_start_here":
                first = next(cell for cell in notebook.cells if "pretrained(" in cell.source)
                rows.append((f"{name}: to the first registration", seconds(notebook, first), "<= 30", "s"))
            rows.append((name, seconds(notebook), reach, "s"))
    record(rows, __file__, threads=1, busy=busy)


if __name__ == "__main__":
    main()
