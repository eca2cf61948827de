"""Networks from files: our own, and the official ones of uniGradICON and multiGradICON (`.trch`), both ways.

icon-registration nests the steps, coarse to fine, where we have a list of them:

    theirs                                             ours
    netPhi.netPhi.net.netPhi.net.net.downConvs.0.bias  steps.0.down.0.bias   quarter resolution
    netPhi.netPhi.net.netPsi.net.batchNorms.0.bias     steps.1.norm.0.bias   half
    netPhi.netPsi.net.upConvs.0.weight                 steps.2.up.0.weight   full
    netPsi.net.lastConv.weight                         steps.3.last.weight   full, the last step
"""

import copy
import hashlib
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, build_opener

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fmsam_lib.checking import ConfigError, nearest
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.spatial import identity_map, voxels
from fmsam_lib.records import written_whole

UNIGRADICON: dict[str, Any] = {"down": (16, 32, 64, 256, 512), "up": (16, 32, 64, 128, 256), "levels": 3}
THEIR_NAMES = {"down": "downConvs", "up": "upConvs", "norm": "batchNorms", "last": "lastConv"}
_BY_CONTENT = (EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError)
DAMAGED = (OSError, *_BY_CONTENT, pickle.UnpicklingError, zipfile.BadZipFile)

RELEASES = "https://github.com/uncbiag/uniGradICON/releases/download"
SHIPPED = Path(__file__).parent / "pretrained"
OFFICIAL = {name: f"{RELEASES}/{name}_weights/Step_2_final.trch" for name in ("unigradicon", "multigradicon")}


def unigradicon(weights: Path | str | None = None, *, dim: int = 3, last_step: bool = True) -> GradICON:
    """uniGradICON's own network: 70.7 M parameters in 3-D with the last step (its second stage of training).

    weights: as for `load`; None for an untrained network in training mode.
    Raises: ValueError as `load`, and for weights of another architecture.
    """
    net = GradICON(dim, **UNIGRADICON, last_step=last_step)
    if weights is None:
        return net
    loaded = load(weights)
    if loaded.settings != net.settings:
        raise ValueError(f"expected weights of {net.settings} in {weights}, got those of {loaded.settings}")
    return loaded


def load(weights: Path | str) -> GradICON:
    """The network of a file, in eval mode, with its architecture read from the file.

    weights: a file of `GradICON.save`; a state dict of icon-registration's (uniGradICON's `Step_2_final.trch`
    or what its fine-tuning leaves); "unigradicon" or "multigradicon" for the official files; or the name of one of
    ours (see `pretrained`).
    Raises: ValueError for a file that is missing, damaged or something else; OSError as `official`.
    """
    path = _file(weights)
    try:
        saved = whole(path)
        if isinstance(saved, dict) and "settings" in saved:
            net = GradICON(**saved["settings"])
            net.load_state_dict(saved["weights"])
            net.shape = tuple(saved["shape"]) if saved.get("shape") else None
            net.about = saved.get("about", {}) | {"norm": net.norm()}  # see `save`
        else:
            net = from_icon(saved)
    except DAMAGED as error:
        known, reason = [*OFFICIAL, *shipped()], str(error).split("\n")[0] or type(error).__name__
        if isinstance(error, FileNotFoundError):
            reason = f"No such file, and none of the names {', '.join(known)}{nearest(str(weights).lower(), known)}"
        elif isinstance(error, KeyError) and isinstance(error.args[0], str):
            reason = f"no {error}"
        elif isinstance(error, LookupError | pickle.UnpicklingError):  # torch's own words advise to read it unsafely
            reason = "something other than tensors and numbers"
        told = f"expected weights saved by fmsam or by icon-registration in {path}, got: {reason}"
        raise ValueError(f"{told}; check the path, copy the file again or train anew") from error
    return net.eval()


def whole(path: Path | str) -> Any:
    """What torch saved, without pickle's code; its parts' checksums are compared, which torch does not do itself."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as parts:
            if changed := parts.testzip():
                raise ValueError(f"{changed}, which is not as it was written")
    return torch.load(path, weights_only=True, map_location="cpu")


def pretrained(name: str) -> GradICON:
    """One of the small networks that come with fmsam, in eval mode: `shipped()` has their names.

    `docs/pretrained.md` says what each was trained on, under which licences, and what to expect of it.
    Raises: ConfigError for another name; ValueError for a file that is not the one that was shipped.
    """
    if name not in shipped():
        raise ConfigError(f"expected one of {', '.join(shipped())}, got {name!r}{nearest(name, shipped())}")
    return load(name)


def shipped() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.pt"))


def _file(weights: Path | str) -> Path:
    """Where weights lie: those with a name, or those of a path."""
    if weights in OFFICIAL:
        return official(str(weights))
    if weights not in shipped():
        return Path(weights)
    path = SHIPPED / f"{weights}.pt"
    if path.with_suffix(".sha256").read_text(encoding="utf-8").split()[:1] != [sha256(path)]:
        raise ValueError(f"expected the weights that came with fmsam in {path}, got a changed file: install anew")
    return path


def official(name: str) -> Path:
    """The file of the official weights "unigradicon" or "multigradicon", downloaded at its first use (280 MB).

    It is kept in the environment's FMSAM_CACHE, else in `~/.cache/fmsam`. Raises: OSError without network.
    """
    path = Path(os.environ.get("FMSAM_CACHE") or Path.home() / ".cache" / "fmsam") / "weights" / f"{name}.trch"
    if not path.exists():
        try:
            with written_whole(path) as partial:
                with build_opener(SameScheme).open(OFFICIAL[name]) as source, open(partial, "wb") as file:
                    size = int(source.headers["Content-Length"] or 0) or None
                    with tqdm.wrapattr(source, "read", total=size, desc=name) as read:
                        shutil.copyfileobj(read, file)
                torch.load(partial, weights_only=True, mmap=True)  # a connection closed early passes for an end
                path.with_suffix(".sha256").write_text(sha256(partial) + "\n", encoding="utf-8")
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            todo = f"download it by hand and put it at {path}"
            raise OSError(f"expected to download {OFFICIAL[name]}, got: {error}; {todo}") from error
    return path


class SameScheme(HTTPRedirectHandler):
    """Follows no redirect from https to http, where anyone on the way may answer."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(newurl).scheme != req.type:
            raise OSError(f"a redirect from {req.type} to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def signed(net: GradICON) -> dict[str, Any]:
    """What a network's `about` holds to find it changed: its map of a test pair, and its norm."""
    return {"golden": golden(net), "norm": net.norm()}


def golden(net: GradICON) -> list[float]:
    """Where the network sends some points of a pair made by a formula, in samples: the same wherever it works right."""
    net = copy.deepcopy(net).cpu().float().eval()
    net.precision, shape = "float32", net.shape or (64,) * net.dim
    x = identity_map(shape).double()
    waves = [(0.5 + 0.5 * torch.sin(9 * x + x.flip(1) * phase).prod(1, keepdim=True)).float() for phase in (2, 3)]
    with torch.no_grad():
        found = voxels(net(*waves).map - identity_map(shape), shape)
    some = (slice(n // 8, None, max(1, n // 4)) for n in shape)
    return found[(slice(None), slice(None), *some)].flatten().double().tolist()


def check(weights: Path | str) -> dict[str, Any]:
    """Whether this installation gets from weights what it should.

    sha256: of the file; "as downloaded": whether it is still that of the download, where there was one. deviation: in
    samples, from the map that the weights were saved with; None for weights without one, such as the official ones.
    fine: False where either is wrong (a deviation over 1e-3), None where there is nothing to compare.
    Raises as `load`.
    """
    net, path = load(weights), _file(weights)
    found: dict[str, Any] = {"sha256": sha256(path), "deviation": None, "fine": None}
    if "golden" in net.about:
        apart = torch.tensor(golden(net)) - torch.tensor(net.about["golden"])
        found |= {"deviation": float(apart.abs().max()), "fine": bool(apart.abs().max() <= 1e-3)}
    if path.with_suffix(".sha256").exists():
        same = path.with_suffix(".sha256").read_text(encoding="utf-8").split()[:1] == [found["sha256"]]
        found |= {"as downloaded": same, "fine": found["fine"] if same else False}
    return found


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def from_icon(state: dict[str, Tensor]) -> GradICON:
    """The network whose weights icon-registration has in `state`, the state dict of its `regis_net`.

    Raises: ValueError where it is not of uniGradICON's kind (steps of `UNet2` at resolutions that double).
    """
    if not (isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())):
        raise ValueError("something other than a state dict")
    state = {key.removeprefix("regis_net."): value for key, value in state.items()}
    theirs = f"{THEIR_NAMES['down']}."
    found = {key.split(theirs)[0] for key in state if theirs in key}
    known = {frozenset(icon_prefixes(n, last)): (n, last) for n in range(1, 9) for last in (False, True)}
    if frozenset(found) not in known:
        raise ValueError(f"keys that no network of uniGradICON's kind has, such as {', '.join(sorted(state)[:2])}")
    levels, last_step = known[frozenset(found)]
    of_first = {part: icon_prefixes(levels, last_step)[0] + name for part, name in THEIR_NAMES.items()}
    depths = range(sum(key.startswith(f"{of_first['down']}.") for key in state) // 2)  # a weight and a bias each
    down = tuple(len(state[f"{of_first['down']}.{depth}.weight"]) for depth in depths)
    up = tuple(state[f"{of_first['up']}.{depth}.weight"].shape[1] for depth in depths)
    net = GradICON(state[f"{of_first['last']}.weight"].dim() - 2, down=down, up=up, levels=levels, last_step=last_step)
    ours = dict(zip(to_icon(net), net.state_dict(), strict=True))
    if more := sorted(state.keys() - ours.keys()):
        raise ValueError(f"the key {more[0]}, which no network of uniGradICON's kind has")
    net.load_state_dict({ours[key]: value for key, value in state.items()})
    if (down, up, levels) == tuple(UNIGRADICON.values()):
        net.shape = (175,) * net.dim  # the grid that uniGradICON was trained on
    return net


def to_icon(net: GradICON) -> dict[str, Tensor]:
    """`from_icon`'s inverse: a state dict for icon-registration's `regis_net`."""
    prefixes = icon_prefixes(net.levels, net.settings["last_step"])
    named = [(*key.split(".", 3)[1:], value) for key, value in net.state_dict().items()]
    return {f"{prefixes[int(step)]}{THEIR_NAMES[part]}.{rest}": value for step, part, rest, value in named}


def icon_prefixes(levels: int, last_step: bool) -> list[str]:
    """Where icon-registration keeps each step, coarse to fine.

    >>> icon_prefixes(2, last_step=True)
    ['netPhi.netPhi.net.net.', 'netPhi.netPsi.net.', 'netPsi.net.']
    """
    prefixes = ["net."]  # a FunctionFromVectorField's network
    for _ in range(levels - 1):  # TwoStepRegistration(DownsampleRegistration(coarser steps), one more)
        prefixes = [*(f"netPhi.net.{prefix}" for prefix in prefixes), "netPsi.net."]
    return [*(f"netPhi.{prefix}" for prefix in prefixes), "netPsi.net."] if last_step else prefixes
