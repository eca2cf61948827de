"""A study file: what it may say, read and checked."""

import dataclasses
import re
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import yaml

from fmsam_lib.checking import ConfigError, nearest, read
from fmsam_lib.parameters import Between, Evaluate, Landscape, Method, Optimizer, Train, problems_of

Baseline = Literal["ants-syn", "io"]


@dataclass(frozen=True, kw_only=True)
class Study:
    """The grid train domain x optimizer x seed; the sections override the notebooks' own defaults.

    leave_one_out: domains of which all but one are trained on together, each left out in turn: so many training domains
    more. baselines: registrations without training, for the same tables: ANTs' SyN, instance optimisation alone.
    variants: further optimizers by name, `{sam-0.03: {optimizer: sam, rho: 0.03}}`: an optimizer and what else of the
    training's parameters differs.
    """

    description: str
    test_domains: list[str]
    optimizers: list[str]
    seeds: list[int]
    shape: list[int]
    train: dict[str, object]
    evaluate: dict[str, object]
    landscape: dict[str, object]
    between: dict[str, object] = field(default_factory=dict)
    train_domains: list[str] = field(default_factory=list)
    leave_one_out: list[str] = field(default_factory=list)
    baselines: list[Baseline] = field(default_factory=list)
    variants: dict[str, dict] = field(default_factory=dict)


SECTIONS = {"train": Train, "evaluate": Evaluate, "landscape": Landscape, "between": Between}


SET_BY_THE_STUDY = ("out", "run", "train_domain", "test_domains", "optimizer", "seed", "shape", "data", "methods")


SET_BY_THE_STUDY += ("baseline", "treatment")


TAKEN = (*typing.get_args(Optimizer), *typing.get_args(Method), "between")  # no variant's names; the last is a folder's


def read_study(path: Path | str) -> Study:
    """A study file; unknown names, in its sections too, are errors that list the known ones."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise ConfigError(f"no study file {path}; known studies: {known}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of {', '.join(f.name for f in fields(Study))}, got {values!r}")
    study = read(Study, values, source=str(path))
    for section, kind in SECTIONS.items():
        _check_section(getattr(study, section), kind, f"{path}, section {section}")
    for name, variant in study.variants.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name in TAKEN:
            raise ConfigError(
                f"{path}, variant {name!r}: expected a name of letters, digits, '.', '_' and '-' that is no "
                f"optimizer's or method's, none of {', '.join(TAKEN)}"
            )
        if not isinstance(variant, dict) or "optimizer" not in variant:
            raise ConfigError(f"{path}, variant {name}: expected a mapping with an optimizer, got {variant!r}")
        _check_section(variant, Train, f"{path}, variant {name}", also=("optimizer",))
    known = [*typing.get_args(Optimizer), *study.variants]
    problems = [f"{name}: unknown{nearest(name, known)}" for name in study.optimizers if name not in known]
    if problems:
        raise ConfigError(f"{path}, optimizers: expected some of {', '.join(known)}; got\n- " + "\n- ".join(problems))
    return dataclasses.replace(study, train_domains=_train_domains(study, path))


def _train_domains(study: Study, path: Path) -> list[str]:
    """Those of the file, and all but one of `leave_one_out` for each of its domains."""
    left_out = study.leave_one_out
    if len(left_out) == 1:
        raise ConfigError(f"{path}, leave_one_out: expected two domains or more, got {left_out[0]} alone")
    others = ["+".join(other for other in left_out if other != domain) for domain in left_out]
    both = list(dict.fromkeys([*study.train_domains, *others]))
    if not both:
        raise ConfigError(f"{path}: expected train_domains or leave_one_out, got neither: name what to train on")
    return both


def _check_section(given: dict, kind: type, where: str, also: tuple[str, ...] = ()) -> None:
    hints = typing.get_type_hints(kind).items()
    hints = {name: hint for name, hint in hints if name in also or name not in SET_BY_THE_STUDY}
    problems = [f"{n}: unknown; known are {', '.join(hints)}{nearest(n, hints)}" for n in sorted(given.keys() - hints)]
    problems += [f"{n}: {p}" for n in sorted(given.keys() & hints) for p in problems_of(n, given[n], hints[n])]
    if problems:
        raise ConfigError(f"{where}:\n" + "\n".join(f"- {p}" for p in problems))
