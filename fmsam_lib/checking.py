"""How parameters are checked: every problem of a model named at once, in words that say what to do.

In: a pydantic model of `parameters` and values from a parameter cell, a study file, a command line or a call. Out: the
model filled in, or a `ConfigError`.
"""

import difflib
import itertools
import os
import re
import symtable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fmsam_lib.records import PROJECT


class ConfigError(ValueError):
    """A parameter that cannot be right: says which, what was expected and what came."""


def each_once(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError(f"expected each once, got {max(values, key=values.count)} more often")
    return values


def odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("expected an odd number")
    return value


def plain_name(name: str) -> str:
    """A name that can be a folder's and a word of a command: Snakemake has its own use for braces."""
    if name.startswith("-") or not name.isprintable() or {*"{}"} & {*name}:
        raise ValueError("expected a name without braces, line breaks and a hyphen at its start")
    return name


def in_project(path: str) -> str:
    """Relative paths of results count from the project's folder, wherever a notebook was started."""
    return str(PROJECT / os.path.expanduser(path)) if path else ""


def plain(value: Any) -> Any:
    """Tuples as lists, paths as text, numpy's numbers as Python's."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


class Parameters(BaseModel):
    """A model that takes nothing it does not know, and numbers only for numbers; tuples and numpy's numbers will do."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)
    _plain = model_validator(mode="before")(plain)


WORDS = {
    "greater_than_equal": "expected at least {ge:g}",
    "greater_than": "expected above {gt:g}",
    "less_than": "expected below {lt:g}",
    "finite_number": "expected a finite number",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "bool_type": "expected True or False",
    "string_type": "expected text",
    "string_too_short": "expected at least one character",
    "list_type": "expected a list",
    "too_short": "expected at least {min_length}",
    "too_long": "expected at most {max_length}",
    "literal_error": "expected one of {expected}",
}
Model = TypeVar("Model", bound=Parameters)


def read(kind: type[Model], values: dict, *, source: str = "parameters") -> Model:
    """`kind` (a model above) from `values`, every problem named at once.

    >>> from fmsam_lib.parameters import Look
    >>> read(Look, {"domain": "brain-mr", "index": -1, "pears": 3})
    Traceback (most recent call last):
    fmsam_lib.checking.ConfigError: 2 problems in parameters (of Look):
    - index: expected at least 0, got -1
    - pears: unknown; known are domain, shape, data, index, pairs (did you mean pairs?)
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = dict.fromkeys(_in_words(kind, problem) for problem in error.errors())
    count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
    raise ConfigError(f"{count} in {source} (of {kind.__name__}):\n" + "\n".join(f"- {p}" for p in problems))


def _in_words(kind: type[Parameters], problem: Any) -> str:
    if not problem["loc"]:  # of several fields together
        return problem["msg"].removeprefix("Value error, ")
    name, value, of = str(problem["loc"][0]), problem["input"], problem.get("ctx", {})
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown; known are {', '.join(kind.model_fields)}{nearest(name, kind.model_fields)}"
    if problem["type"] == "missing":
        return f"{name}: missing"
    words = WORDS.get(problem["type"])  # a message that quotes a value is no template
    said = words.format(**of) if words else problem["msg"].removeprefix("Value error, ")
    trick = " (YAML reads 1e-3 as text: write 1.0e-3)" * (problem["type"] == "float_type" and isinstance(value, str))
    if problem["type"] == "literal_error":
        said, trick = re.sub(r"'([\w+-]+)'", r"\1", said), nearest(str(value), re.findall("'([^']*)'", of["expected"]))
    return f"{name}: {said}, got {value!r}{trick}"


def nearest(name: str, known) -> str:
    """A word to an error about an unknown name, "" where nothing known is like it."""
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def from_notebook(kind: type[Model], namespace: dict) -> Model:
    """The checked parameters of the notebook whose globals are `namespace`; call it in the second cell.

    A parameter counts as given when the parameter cell, or the cell papermill puts after it, assigns it, so
    that a misspelt one is found and variables of later cells don't count when a person runs the cell again.
    Both cells begin with "# Parameters", which is papermill's whole first line.

    Raises ConfigError also where papermill found no cell tagged `parameters`: it puts its own first, and the defaults
    take back what that one gave.
    """
    cells = [cell for cell in namespace["In"] if cell.startswith("# Parameters")]
    before = [*itertools.takewhile(lambda cell: cell.split("\n", 1)[0].strip() == "# Parameters", cells)]
    if len(before) < len(cells) and (lost := [name for cell in before for name in _assigned(cell)]):
        told = f"the given {', '.join(lost)} came before the cell of defaults, which would take their place"
        todo = "tag the cell that begins with '# Parameters:' as `parameters` (Jupyter: Property Inspector, Cell Tags)"
        raise ConfigError(f"{told}: that cell has lost its tag; {todo} and run the notebook again")
    groups = itertools.groupby(namespace["In"], lambda cell: cell.startswith("# Parameters"))
    given = [list(cells) for of_parameters, cells in groups if of_parameters]
    if not given:
        raise ConfigError('no parameter cell was run: run the first code cell (it begins with "# Parameters")')
    values = {name: namespace[name] for cell in given[-1] for name in _assigned(cell)}
    return read(kind, values, source="the parameter cell")


def _assigned(cell: str) -> list[str]:
    names = symtable.symtable(cell, "cell", "exec").get_symbols()
    return [name.get_name() for name in names if name.is_assigned() and not name.is_imported()]
