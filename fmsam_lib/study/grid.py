"""What a study file may say, and the grid of runs that it means: train domain x optimizer x seed."""

import hashlib
import itertools
import re
import typing
from typing import Any, Literal, NamedTuple

import pandas as pd
from pydantic import Field, ValidationInfo, field_validator, model_validator

from fmsam_lib.checking import Parameters, each_once, nearest
from fmsam_lib.flatness.mode_connectivity import ALIKE
from fmsam_lib.parameters import EQUAL_COMPUTE, Count, Distinct, Method, Name, Natural, Optimizer, Shape, Some, Train
from fmsam_lib.plotting.cards import card

NotebookName = Literal["10_train", "20_evaluate", "30_loss_landscape", "35_between_minima", "40_compare"]
BASELINE = "adam"  # the other optimizers are compared with it
TAKEN = (*typing.get_args(Optimizer), *typing.get_args(Method), "between")  # no variant's names; the last is a folder's
USED_BY = {  # parameters that say nothing to the other optimizers
    **dict.fromkeys(("rho", "rho_schedule", "sync_climb"), {*typing.get_args(Optimizer)} - {BASELINE, EQUAL_COMPUTE}),
    **dict.fromkeys(("climb", "late"), ("sam",)),
    **{"every": ("sam-every", "looksam"), "alpha": ("looksam",)},
}
# No training domain's folder: what else lies in a study's.
NO_FOLDER = re.compile(r"none|io|figures|[.-].*|.*[/\\{}\n].*|.*\.(csv|html|ipynb|json|log|pt|txt|yaml)")


class Resources(Parameters):
    """What a scheduler gives to one run of a notebook."""

    cpus: Count | None = Field(None, description="cores; null: processes x threads of the notebook's section")
    gpus: Natural | None = Field(None, description="null: one a process where a training's device is cuda")
    memory_mb: Count = Field(4000, description="for all of its processes")
    minutes: Count = Field(240, description="after which it is ended; a training goes on from its last checkpoint")


class Study(Parameters):
    """The grid train domain x optimizer x seed; the sections override the notebooks' own defaults.

    leave_one_out: domains, or names of `groups` of domains, of which all but one are trained on together, each left out
    in turn, or those of them that `only` names: so many training domains more. always: domains that train along
    whichever is left out. baselines: registrations without training, for the same tables. variants: further optimizers
    by name, `{sam-0.03: {optimizer: sam, rho: 0.03}}`: an optimizer and what else differs. landscape: null leaves out
    notebooks 30 and 35. train, variants: a list where the parameter is none, `rho: [0.01, 0.03]`, multiplies the
    optimizers that use it (`swept`). resources: by notebook, `Resources`.
    """

    description: str
    groups: dict[str, Some[Name]] = Field({})
    always: Distinct[Name] = Field([])
    leave_one_out: Distinct[Name] = Field([])
    only: Distinct[Name] = Field([])
    train_domains: Distinct[Name] = Field([])
    test_domains: Some[Name]
    variants: dict[str, dict[str, Any]] = Field({})
    optimizers: Some[Name]
    seeds: Some[Natural]
    shape: Shape
    baselines: Distinct[Literal["ants-syn", "io"]] = Field([])
    train: dict[str, Any]
    evaluate: dict[str, Any]
    landscape: dict[str, Any] | None
    between: dict[str, Any] = Field({})
    resources: dict[NotebookName, dict[str, Any]] = Field({})

    @field_validator("train_domains")
    @classmethod
    def _all_but_one(cls, given: list[str], info: ValidationInfo) -> list[str]:
        """Those of the file, and all but one of `leave_one_out` for each of its domains."""
        if "leave_one_out" not in info.data:  # it is wrong itself
            return given
        left_out, always = info.data["leave_one_out"], info.data.get("always", [])
        if len(left_out) == 1:
            raise ValueError(f"expected two domains or more in leave_one_out, not {left_out[0]} alone")
        if always and not left_out:
            raise ValueError(f"expected leave_one_out with always, {', '.join(always)}, which it never leaves out")
        groups, turns = info.data.get("groups", {}), info.data.get("only") or left_out
        if unknown := [one for one in turns if one not in left_out]:
            raise ValueError(f"expected in only some of leave_one_out, not {', '.join(unknown)}")
        each_once([*always, *(name for one in left_out for name in groups.get(one, [one]))])  # else it stays in a turn
        kept = [[name for other in left_out if other != one for name in groups.get(other, [other])] for one in turns]
        others = ["+".join(each_once([*names, *always])) for names in kept]
        if not (given or others):
            raise ValueError("expected train_domains or leave_one_out: name what to train on")
        return list(dict.fromkeys([*given, *others]))

    @field_validator("variants")
    @classmethod
    def _named(cls, variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, variant in variants.items():
            if not re.fullmatch(r"\w[\w.-]*", name) or name.lower() in TAKEN:  # some disks have no capitals
                taken = f"that is no optimizer's or method's, none of {', '.join(TAKEN)}"
                raise ValueError(f"{name!r}: expected a name of letters, digits, '.', '_' and '-' {taken}")
            if not isinstance(variant.get("optimizer"), str):
                raise ValueError(f"{name}: expected an optimizer, one")
        return variants

    @field_validator("optimizers")
    @classmethod
    def _known(cls, names: list[str], info: ValidationInfo) -> list[str]:
        known = [*typing.get_args(Optimizer), *info.data.get("variants", names)]
        if unknown := [f"{name} is unknown{nearest(name, known)}" for name in names if name not in known]:
            raise ValueError(f"expected some of {', '.join(known)}; {'; '.join(unknown)}")
        return names

    @model_validator(mode="after")
    def _one_folder_each(self) -> "Study":
        trains: dict[str, str] = {}
        for train in self.train_domains:
            name = self.folder_of(train)
            if NO_FOLDER.fullmatch(name):
                raise ValueError(f"train_domains: {name!r} cannot be a folder of the study: give it another name")
            if (other := trains.setdefault(name.lower(), train)) != train:
                told = f"{other} and {train} would both have the folder {name}"
                raise ValueError(f"train_domains: {told}: leave one out or give the group another name")
        return self

    def members(self, one: str) -> list[str]:
        """The domains of a group; a domain alone."""
        return self.groups.get(one, [one])

    def left_out(self, train: str) -> str:
        """The domain or group that these training domains leave out; "" where they are no such training."""
        every = {name for one in self.leave_one_out for name in self.members(one)} | {*self.always}
        return next((one for one in self.leave_one_out if {*train.split("+")} == every - {*self.members(one)}), "")

    def short(self, train: str) -> str:
        """A name of many training domains that fits a column: "all but heart", "4 domains"."""
        if one := self.left_out(train):
            return f"all but {one}"
        size = train.count("+") + 1
        alike = [other for other in self.train_domains if other.count("+") + 1 == size and not self.left_out(other)]
        number = f" ({alike.index(train) + 1})" if train in alike[1:] else ""
        return train if size < 3 else f"{size} domains{number}"

    def folder_of(self, train: str) -> str:
        """Their name in folders: "all-but-heart", "brain-mr-and-3-more-5d2c1f"; of one or two domains, themselves."""
        first, *more = train.split("+")
        digest = hashlib.sha256(train.encode()).hexdigest()[:6]
        listed = train if len(more) < 2 else f"{first}-and-{len(more)}-more-{digest}"
        return f"all-but-{one}" if (one := self.left_out(train)) else listed

    def run(self, train: str, optimizer: str, seed: int) -> "Run":
        return Run(train, optimizer, seed, f"{self.folder_of(train)}/{optimizer}/seed{seed}")

    def _repr_html_(self) -> str:
        """At the end of a cell: the grid, a training domain a row, an optimizer a column, seeds in the cells."""
        seeds = f"seeds {', '.join(map(str, self.seeds))}"
        table = pd.DataFrame(seeds, index=self.train_domains, columns=self.optimizers).to_html()
        facts = {"runs": len(grid(self)), "tested on": ", ".join(self.test_domains)}
        facts |= {"baselines": ", ".join(self.baselines), "shape": " × ".join(map(str, self.shape))}
        return card(self.description, facts, more=table)


class Run(NamedTuple):
    """One cell of the grid, and its folder below the study's."""

    train_domain: str
    optimizer: str
    seed: int
    folder: str


def grid(study: Study) -> list[Run]:
    """All runs of a study."""
    return [study.run(*cell) for cell in itertools.product(study.train_domains, study.optimizers, study.seeds)]


def swept(study: Study) -> Study:
    """The study with an optimizer for each combination of values where a parameter of the trainings has several.

    It is a variant, "sam-lr=0.01-rho=0.03", whatever their order in the file. A parameter that is a list itself has
    several where it is a list of lists. ValueError for values that are none, the same twice, or of no use.
    """
    common = {name: values for name, values in study.train.items() if _several(name, values)}
    variants, optimizers, unused = {**study.variants}, [], [*common]
    for optimizer in study.optimizers:
        own = study.variants.get(optimizer, {"optimizer": optimizer})
        used = {name: common[name] for name in common if own["optimizer"] in USED_BY.get(name, [own["optimizer"]])}
        lists = {name: values for name, values in sorted((used | own).items()) if _several(name, values)}
        unused = [name for name in unused if name not in used or name in own]
        if idle := [name for name in lists if own["optimizer"] not in USED_BY.get(name, [own["optimizer"]])]:
            raise ValueError(f"{optimizer}: expected lists that {own['optimizer']} uses, got {', '.join(idle)}")
        for values in itertools.product(*lists.values()):
            chosen = dict(zip(lists, values, strict=True))
            called = "-".join([optimizer, *map(named, lists, values)])
            variants |= {called: own | chosen} if chosen else {}
            optimizers.append(called)
        if not all(lists.values()) or len({name.lower() for name in optimizers}) < len(optimizers):
            told = "expected one value or more of each parameter, and names that differ in more than capitals"
            raise ValueError(f"{optimizer}: {told}, got {lists}")
    if unused:
        raise ValueError(f"train: expected optimizers that use {', '.join(unused)}, got {', '.join(study.optimizers)}")
    train = {name: value for name, value in study.train.items() if name not in common}
    return study.model_copy(update={"train": train, "variants": variants, "optimizers": optimizers})


def _several(name: str, value: Any) -> bool:
    """Whether this is not a parameter's value but a list of values."""
    if name not in Train.model_fields or not isinstance(value, list):
        return False
    return typing.get_origin(Train.model_fields[name].annotation) is not list or any(isinstance(v, list) for v in value)


def named(name: str, value: Any) -> str:
    """A parameter with a value, as a part of an optimizer's name and so of files on any system: "down=4_8"."""
    return f"{name}=" + re.sub(r"[^\w.-]+", "_", str(value)).strip("_")


def swept_from(optimizer: str) -> tuple[str, set[str]]:
    """What a sweep made it from, and by which values: of "adam-2x-lr=0.1", "adam-2x" and {"lr=0.1"}."""
    base, *values = re.split(r"-(?=\w+=)", optimizer)
    return base, {*values}


def compared(study: Study) -> tuple[str, str]:
    """Baseline and treatment of the report: Adam, and the first optimizer that is another one at the same steps."""
    bases = {optimizer: swept_from(optimizer)[0] for optimizer in study.optimizers}
    baseline = next((o for kind in (BASELINE, EQUAL_COMPUTE) for o in bases if bases[o] == kind), study.optimizers[0])
    others = [o for o in bases if bases[o] != bases[baseline]] or study.optimizers[1:] or [baseline]
    return baseline, next((o for o in others if bases[o] != EQUAL_COMPUTE), others[0])


def twins(study: Study) -> list[tuple[Run, Run]]:
    """Runs of baseline and treatment with the same training domain and seed: one start, one loss, two solutions."""
    names = compared(study)
    default = {name: Train.model_fields[name].default for name in ALIKE}
    of = [default | study.train | study.variants.get(name, {}) for name in names]
    fit = names[0] != names[1] and of[1].get("rho") != 0 and all(of[0][name] == of[1][name] for name in ALIKE)
    cells = itertools.product(study.train_domains, study.seeds) if fit else ()
    return [(study.run(d, names[0], s), study.run(d, names[1], s)) for d, s in cells]
