"""`fmsam-register`: `register` from the command line."""

import argparse
import re
import signal
import sys
import warnings
from pathlib import Path

import torch

from fmsam_lib.images.files import open_file
from fmsam_lib.model.weights import OFFICIAL, load
from fmsam_lib.registration.folder import ROLES, spare, staged
from fmsam_lib.registration.register import SIMILARITIES, Registration, register


def main(argv: list[str] | None = None) -> int:
    """`fmsam-register`: 0 when the results are in the folder, 1 when something was wrong, 2 for wrong arguments."""
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a cluster's time limit: leave as after Ctrl-C
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        try:
            spare(args.out, [getattr(args, role) for role in ROLES if getattr(args, role)])
            with staged(args.out) as staging:  # before the work: is there a place for its results?
                result = _run(args)
                result.write(staging)
        except KeyboardInterrupt:
            print("interrupted: nothing was written", file=sys.stderr)
            return 130
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not re.search("memory|alloc", str(error)):
                raise
            print("error: not enough memory: a smaller --shape needs less, and so does --io 0", file=sys.stderr)
            return 1
        finally:
            signal.signal(signal.SIGTERM, before)
    if not args.quiet:
        print(report(result.summary, args.out))
    return 0


def _run(args: argparse.Namespace) -> Registration:
    as_they_are = ("modality", "moving_modality", "shape", "io", "lr", "lmbda", "sigma", "similarity", "seed")
    options = {name: getattr(args, name) for name in (*as_they_are, "labels", "fixed_labels")}
    for role in ROLES:  # before the weights, which may have to be downloaded
        if path := getattr(args, role):
            open_file(Path(path))
    net = load(args.weights).to(args.device)
    result = register(args.fixed, args.moving, net, progress=not args.quiet, **options)
    result.summary["network"]["weights"] = args.weights
    return result


def _arguments(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fmsam-register",
        description="Register two images; the warped image and the transform come out in the fixed image's space.",
    )

    def add(name: str, *, help: str, **how) -> None:
        parser.add_argument(name, help=help + (" (default: %(default)s)" if how.get("default") else ""), **how)

    add("--fixed", required=True, help="image that stays, NIfTI")
    add("--moving", required=True, help="image to be warped onto it, NIfTI")
    add("--out", required=True, help="folder for the results")
    add("--modality", choices=("mr", "ct"), default="mr", help="of both images")
    add("--moving-modality", choices=("mr", "ct"), help="of the moving image, if it is another")
    add("--weights", default="unigradicon", help=f"{' or '.join(OFFICIAL)} (downloaded once), or a file of weights")
    add(
        "--shape",
        type=_positive,
        nargs="+",
        help="grid to work on; unless given, the one that the network was trained on",
    )
    add("--io", type=int, default=0, metavar="STEPS", help="steps of instance optimisation on this pair")
    add("--lr", type=float, default=2e-5, help="learning rate of instance optimisation")
    add("--lmbda", type=float, default=1.5, help="weight of the regulariser in it")
    add("--sigma", type=float, default=5.0, help="window of the similarity, voxels of the grid")
    add("--similarity", choices=SIMILARITIES, default="lncc", help="what instance optimisation maximises")
    add("--labels", help="label image of the moving image, to be warped too")
    add("--fixed-labels", help="label image of the fixed image: Dice before and after goes into the summary")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="where the network runs")
    add("--threads", type=_positive, help="processor threads")
    add("--seed", type=int, default=0, help="of instance optimisation's random points")
    add("--quiet", action="store_true", help="print nothing but problems")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def report(summary: dict, folder: str | Path) -> str:
    """What a person wants to know of a `Registration.summary`, in a few lines."""
    similarity = summary["similarity"]
    lines = [
        f"LNCC {similarity['before']:.3f} -> {similarity['after']:.3f}, {summary['folding_percent']:.2g} % folded, "
        f"SDlogJ {summary['sdlogj']:.3f}, {summary['seconds']:.1f} s"
    ]
    if "instance_optimisation" in summary:
        io = summary["instance_optimisation"]
        lines.append(
            f"instance optimisation: best of {io['steps']} steps was {io['best_step']}, "
            f"loss {io['loss_before']:.4f} -> {io['loss_best']:.4f}"
        )
    for label, value in summary.get("dice", {}).items():
        lines.append(f"Dice of label {label}: {value['before']:.3f} -> {value['after']:.3f}")
    return "\n".join([*lines, *(str(Path(folder) / name) for name in summary["files"])])


if __name__ == "__main__":
    sys.exit(main())
