"""A list of pairs, each registered as one alone is, and one table of all."""

import csv
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from fmsam_lib.checking import nearest, plain
from fmsam_lib.images.files import parts, stem
from fmsam_lib.records import DataError, data_error, read_json, write_csv, write_json
from fmsam_lib.registration.folder import LONGEST, ROLES, SUMMARY, fitting

TABLE = "pairs.csv"
COLUMNS = ["name", "status", "similarity_before", "similarity_after", "folding_percent", "sdlogj"]
COLUMNS += ["dice_before", "dice_after", "seconds", "verdict", "reason"]


def register_all(
    pairs: str | Path, out: str | Path, register_one: Callable, options: dict[str, Any], *, quiet: bool = False
) -> int:
    """Register each pair of the CSV file `pairs` into `<out>/<name>/`; 0, or 1 where a pair failed, which it names.

    register_one: takes the paths of a pair's files, by their names in `ROLES`, and its folder; leaves `summary.json`.
    options: all else that the results depend on. What is there of the same files (by cell and `stamps`) and options,
    as its summary says, is not made again. `<out>/pairs.csv` comes at the end, a line a pair, from the summaries.
    quiet: only failures are printed.

    Raises DataError, before the work, as `read_pairs`.
    """
    out, lines = Path(out), []
    for name, row in read_pairs(Path(pairs), out).items():
        files, folder = {role: Path(pairs).parent / cell for role, cell in row.items()}, out / name
        try:
            made_of = plain({"files": {role: [row[role], *stamps(f)] for role, f in files.items()}, "options": options})
            made = read_json(folder / SUMMARY, {})
            if made.get("made_of") != made_of or not all((folder / name).exists() for name in made["files"]):
                register_one({role: str(file) for role, file in files.items()}, folder)
                write_json(folder / SUMMARY, read_json(folder / SUMMARY, {}) | {"made_of": made_of})
            summary = read_json(folder / SUMMARY, {})
            dice = pd.DataFrame(summary.get("dice", {}), dtype=float).mean(axis=1).add_prefix("dice_")
            lines.append({**summary, **dice, "name": name, "status": "done"})
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            lines.append({"name": name, "status": "failed", "verdict": {"reason": str(error) or repr(error)}})
        if not quiet:
            print(f"{name}: {lines[-1]['status']}", flush=True)
    table = pd.json_normalize(lines, sep="_").rename(columns=lambda column: column.removeprefix("verdict_"))
    write_csv(table, out / TABLE, COLUMNS)
    failed = ["{name}: {verdict[reason]}".format(**line) for line in lines if line["status"] == "failed"]
    if failed or not quiet:
        print("\n- ".join([f"{len(failed)} of {len(lines)} pairs failed; {out / TABLE}", *failed]))
    return 1 if failed else 0


def stamps(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and date of every file that an image consists of: of a header its data too, of a folder its slices."""
    files = sorted(path.iterdir()) if path.is_dir() else parts(path)
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def read_pairs(path: Path, out: Path) -> dict[str, dict[str, str]]:
    """By each pair's name its files as the table has them; they count from the table's folder.

    Raises DataError, which names all that is wrong at once, and where the results could not be written.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, restkey="", restval="")
            columns = table.fieldnames = [column.strip() for column in table.fieldnames or []]
            rows = [(table.line_num, {c: "".join(cell).strip() for c, cell in row.items()}) for row in table]
    except (OSError, UnicodeError, csv.Error) as error:
        raise data_error(path, "a CSV file in UTF-8", error, "Save it as such.") from error
    if "fixed" not in columns and re.search("[;\t]", "".join(columns)):
        raise data_error(path, "commas between columns", "semicolons or tabs", "Save it again, with commas.")
    known, found, pairs = [*ROLES, "name"], [f"column {c}: missing" for c in ROLES[:2] if c not in columns], {}
    for column in columns:
        if column and (column not in known or columns.count(column) > 1):
            found.append(f"column {column!r}: expected each once of {', '.join(known)}{nearest(column, known)}")
    for line, cells in rows if not found else []:
        row = {column: cell for column, cell in cells.items() if cell and column}
        name = row.pop("name", "_".join(fitting(*(stem(row.get(role, "")) for role in ROLES[:2]))))
        wrong = ["a cell without a column"] * bool(cells.get("")) + [f"no {r}" for r in ROLES[:2] if r not in row]
        wrong += [f"no file {path.parent / cell}" for cell in row.values() if not (path.parent / cell).exists()]
        if name in pairs or name.startswith(".") or "/" in name or name == TABLE or len(os.fsencode(name)) > LONGEST:
            wrong.append(f"expected a name for a folder of its own, in a column `name`, found {name!r}")
        if any(cells.values()):
            found += [f"line {line}: {problem}" for problem in wrong]
            pairs[name] = row
    if (out / TABLE).resolve() == path.resolve():
        found.append(f"the results' table would replace it: choose another folder than {out}")
    if found or not pairs:
        raise DataError("\n- ".join([f"{path}: expected a table of pairs", *(found or ["no pair in it"])]))
    return pairs
