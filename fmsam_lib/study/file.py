"""A study file, found, read and checked."""

import re
from pathlib import Path

import yaml

from fmsam_lib.checking import ConfigError, plain, read
from fmsam_lib.flatness.landscape import TRAINING
from fmsam_lib.model.weights import OFFICIAL, load, shipped
from fmsam_lib.parameters import Between, Evaluate, Landscape, Train
from fmsam_lib.records import PROJECT
from fmsam_lib.study.grid import Study, grid, swept
from fmsam_lib.study.notebooks import NOTEBOOKS, jobs


class Once(yaml.SafeLoader):
    """YAML in which a key may stand once: of two, PyYAML takes the last."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value]
        if twice := [key for i, (key, _) in enumerate(node.value) if keys[i] in keys[:i] and key.value != "<<"]:
            raise yaml.MarkedYAMLError(problem=f"{twice[0].value} stands twice", problem_mark=twice[0].start_mark)
        return node


# Without YAML 1.1's octal whole numbers and those of base 60: 010 and 1:30 are text, and no seed.
WHOLE = re.compile(r"[-+]?(0|[1-9][\d_]*|0b[01_]+|0x[\da-fA-F_]+)$")
OTHERS = {k: [r for r in v if not r[0].endswith(":int")] for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
Once.yaml_implicit_resolvers = OTHERS
Once.add_implicit_resolver("tag:yaml.org,2002:int", WHOLE, [*"-+0123456789"])


def placed(study: str, runs: Path) -> tuple[Path, Path]:
    """The file of a study, given by its name in `studies/` or by its path, and the folder for its results."""
    by_path = Path(study).suffix in (".yaml", ".yml")
    if not by_path and study != Path(study).name:
        raise ConfigError(f"expected a path that ends in .yaml, or a name in studies/, got {study}")
    path = Path(study).resolve() if by_path else PROJECT / "studies" / f"{study}.yaml"
    return path, runs.resolve() / (path.stem if by_path else study)


def read_study(path: Path | str) -> Study:
    """A study file; whatever one of its notebooks would refuse is an error here, before an hour of training.

    Raises ConfigError, which names the file and, of a wrong parameter, section and run.
    """
    path = Path(path)
    try:
        values = plain(Once(path.read_text(encoding="utf-8")).get_single_data())
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise ConfigError(f"no study file {path}; known studies: {known}") from None
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML in UTF-8: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of {', '.join(Study.model_fields)}, got {values!r}")
    study = read(Study, values, source=str(path))
    if taken := sorted({TRAINING, "seen", "unseen"} & {*study.test_domains, *study.train_domains}):
        raise ConfigError(f"{path}: expected other domains than {', '.join(taken)}, as tables have rows of that name")
    read(Between, study.between, source=f"{path}, section between")  # also where notebook 35 is not run
    every = study.model_copy(update={"optimizers": list(dict.fromkeys([*study.optimizers, *study.variants]))})
    try:
        study, every = swept(study), swept(every)
        work = jobs(every, Path("runs"), "", path)
    except ValueError as error:
        raise ConfigError(f"{path}, {error}") from None
    averaged = {job.folder for job in work if job.values.get("averages")}
    used = {run.folder for run in grid(study)}
    for job in work:
        notebook = NOTEBOOKS[job.notebook]
        source = f"{path}, section {notebook.section}, run {job.folder}"
        given, unfit, fit = read(notebook.takes, job.values, source=source), set[str](), ""
        if isinstance(given, Evaluate) and job.folder in used:
            other = () if job.folder in averaged else ("+ema", "+tail")
            unfit = {name for name in given.methods if not name.startswith("network") or name.endswith(other)}
            unfit |= {f"io: {given.io}"} if given.io and "network+io" not in given.methods else set()
            fit = "methods of networks (others are baselines), network+io with io, "
            fit += "+ema and +tail with train: {averages: true}"
        elif isinstance(given, Train) and (name := given.weights) in (*OFFICIAL, *shipped()):
            unfit = {name} if len(given.shape) != (3 if name in OFFICIAL else load(name).dim) else unfit
            fit = f"weights for {len(given.shape)} dimensions, as those of shape"
        elif isinstance(given, Landscape):
            unfit = {*given.measured_on} - {TRAINING, *given.test_domains}
            fit = f"measured_on to name {TRAINING} or test_domains"
        if unfit:
            raise ConfigError(f"{source}: expected {fit}, got {', '.join(sorted(unfit))}")
    return study
