"""How a benchmark is timed and kept: medians of calls that take turns; a CSV with what they were measured on."""

import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch

from fmsam_lib.records import provenance, write_csv

FIGURE = ("figure", "value", "reach", "unit")


def record(rows: Iterable, script: str, *, threads: int, **more) -> pd.DataFrame:
    """Print `rows` and write them to `<script>.csv`; returns the table.

    rows: tuples (figure, value, reach, unit), or dicts of these four and whatever else helps. reach: what the value
    should be, such as "<= 0.5", or "". script: `__file__`. more: further columns, the same in every row.
    """
    rows, made = list(rows), provenance()
    table = pd.DataFrame(rows) if isinstance(rows[0], dict) else pd.DataFrame(rows, columns=list(FIGURE))
    print(table.to_string(index=False))
    table = table.assign(commit=made["commit"], cpu=made["cpu"], threads=threads, torch=torch.__version__, **more)
    write_csv(table, Path(script).with_suffix(".csv"), float_format="%.4g")
    return table


def alternating(repeats: int, **calls) -> dict[str, float]:
    """Median seconds of each call, after one round to warm up; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
