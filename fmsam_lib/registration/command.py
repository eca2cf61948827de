"""`fmsam-register`: `register` from the command line."""

import argparse
import functools
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch

from fmsam_lib.checking import ConfigError, read
from fmsam_lib.images.files import read_values
from fmsam_lib.metrics import percent
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.weights import check, load
from fmsam_lib.parameters import Register, Registering
from fmsam_lib.registration import apply
from fmsam_lib.registration.batch import register_all, stamps
from fmsam_lib.registration.folder import ROLES, check_room, staged
from fmsam_lib.registration.register import register
from fmsam_lib.registration.verdict import in_words


def main(argv: list[str] | None = None) -> int:
    """`fmsam-register`: 0 when the results are in the folder, 1 when something was wrong, 2 for wrong arguments."""
    argv = sys.argv[1:] if argv is None else argv
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a cluster's time limit: leave as after Ctrl-C
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        try:
            return apply.main(argv[1:]) if argv[:1] == ["apply"] else _main(argv)
        except KeyboardInterrupt:
            print("interrupted: nothing was written of what was at work", file=sys.stderr)
            return 130
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
        except (MemoryError, RuntimeError) as error:
            if not re.search("[mM]emory|alloc", repr(error)):
                raise
            print("error: not enough memory: a smaller --shape needs less, and so does --io 0", file=sys.stderr)
        finally:
            signal.signal(signal.SIGTERM, before)
    return 1


def _main(argv: list[str]) -> int:
    run, more = _arguments(argv)
    if more["check"]:
        return _check(run.weights)
    if run.threads:
        torch.set_num_threads(run.threads)
    network = functools.cache(lambda: load(run.weights).to(more["device"]))  # asked for when all files are there
    if more["pairs"]:
        options = run.model_dump(include={*Registering.model_fields, "weights"})
        named = {name: options[name] for name in ("weights", "start") if os.path.isfile(options[name])}
        options |= {name: [file, *stamps(Path(file))] for name, file in named.items()}  # of one name, but another file
        each = functools.partial(_register, run, network)
        return register_all(more["pairs"], run.out, each, options, quiet=more["quiet"])
    files = {role: getattr(run, role) for role in ROLES if getattr(run, role)}
    summary = _register(run, network, files, run.out, progress=not more["quiet"])
    if not more["quiet"]:
        print(report(summary, run.out))
    return 0


def _check(weights: str) -> int:
    """`fmsam-register --check`: 0 where the weights give what they should or nobody knows what that is, else 1."""
    found = check(weights)
    print(f"{weights}: SHA-256 {found['sha256']}")
    if not found.get("as downloaded", True):
        print("not the file that was downloaded: fetch it anew")
    said = {None: "unknown: these weights do not say what map they should give", True: "as expected", False: "wrong"}
    apart = "" if found["deviation"] is None else f", {found['deviation']:.2g} samples from the map saved with them"
    print(said[found["fine"]] + apart)
    return int(found["fine"] is False)


def _register(
    run: Register, network: Callable[[], GradICON], files: dict[str, str], out: str | Path, *, progress: bool = False
) -> dict[str, Any]:
    """Register a pair's files into the folder `out`; the summary. What can be checked before the work is checked."""
    with staged(out, files.values()) as staging:
        voxels = {role: math.prod(read_values(path, 2).GetSize()) for role, path in files.items()}
        net, options = network(), run.model_dump(include=set(Registering.model_fields))
        # What `Registration.write` leaves: float32 on the images' voxels, two transforms in float64 on the grid.
        grid = math.prod(run.shape or net.shape or ())
        check_room(out, 36 * voxels["fixed"] + 12 * voxels["moving"] + 2 * 8 * net.dim * grid)
        result = register(**files, net=net, progress=progress, **options)
        result.summary["network"]["weights"] = run.weights
        result.write(staging)
    return result.summary


def _arguments(argv: list[str]) -> tuple[Register, dict[str, Any]]:
    """What to register, and the other options by their names; help and limits are the parameters'."""
    parser = argparse.ArgumentParser(
        prog="fmsam-register",
        description="Register two images; the warped image and the transform come out in the fixed image's space.",
        epilog="fmsam-register apply --help: move other images, labels and points by a transform found before",
    )
    first = ("fixed", "moving", "out")
    for name, field in sorted(Register.model_fields.items(), key=lambda item: item[0] not in first):
        default = "" if field.default in ("", []) else " (default: %(default)s)"
        help_text = f"{field.description}{default}"
        parser.add_argument(_flag(name), default=field.default, help=help_text, **_kind(field.annotation))
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0], help="where to run (default: %(default)s)")
    parser.add_argument("--pairs", help="CSV of pairs instead: columns fixed, moving, and name, labels, ...")
    parser.add_argument("--check", action="store_true", help="only say whether the weights give here what they should")
    parser.add_argument("--quiet", action="store_true", help="print nothing but problems")
    values = vars(parser.parse_args(argv))
    more = {name: values.pop(name) for name in ("device", "pairs", "check", "quiet")}
    files = {role for role in ROLES if values[role]}
    complete = not files if more["pairs"] else {"fixed", "moving"} <= files
    if not more["check"] and not (values["out"] and complete):
        parser.error("expected --out, and --fixed and --moving, or --pairs with all files in it")
    try:
        return read(Register, values), more
    except ConfigError as error:
        problems = str(error).split("\n- ")[1:]
        parser.error("\n".join(re.sub(r"^\w+", lambda name: _flag(name[0]), problem) for problem in problems))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(annotation: Any) -> dict[str, Any]:
    """How argparse reads a field: a switch, one of several words, several whole numbers, or one value."""
    if annotation is bool:
        return {"action": "store_true"}
    if get_origin(annotation) is Literal:
        return {"choices": [word for word in get_args(annotation) if word]}
    return {"nargs": "+", "type": int} if get_origin(annotation) is list else {"type": annotation}


def report(summary: dict[str, Any], folder: str | Path) -> str:
    """What a person wants to know of a `Registration.summary`, in a few lines."""
    similarity = "LNCC {before:.3f} -> {after:.3f}".format(**summary["similarity"])
    regularity = f"{percent(summary['folding_percent'])} folded, SDlogJ {summary['sdlogj']:.3f}"
    lines = [f"{similarity}, {regularity}, {summary['seconds']:.1f} s", in_words(summary["verdict"])]
    if io := summary.get("instance_optimisation"):
        best = "best of {steps} steps was {best_step}, loss {loss_before:.4f} -> {loss_best:.4f}"
        lines.append("instance optimisation: " + best.format(**io))
    for label, value in summary.get("dice", {}).items():
        lines.append(f"Dice of label {label}: {value['before']:.3f} -> {value['after']:.3f}")
    return "\n".join([*lines, *(str(Path(folder) / name) for name in summary["files"])])


if __name__ == "__main__":
    sys.exit(main())
