"""Sharpness-aware training of registration foundation models: model, SAM trainer, data, evaluation, flatness."""

from fmsam_lib.checking import ConfigError
from fmsam_lib.evaluation.evaluate import evaluate
from fmsam_lib.images.domains import domain_names, open_domain
from fmsam_lib.metrics import measure
from fmsam_lib.model.network import GradICON
from fmsam_lib.model.transform import Transform
from fmsam_lib.model.weights import load, pretrained, unigradicon
from fmsam_lib.pair import Pair
from fmsam_lib.plotting.cards import show_themselves
from fmsam_lib.records import DataError
from fmsam_lib.registration.register import register
from fmsam_lib.training.loop import train
from fmsam_lib.training.losses import objective
from fmsam_lib.training.sam import SAM
from fmsam_lib.widgets.pair_explorer import explore

show_themselves()

__all__ = [
    "SAM", "ConfigError", "DataError", "GradICON", "Pair", "Transform", "domain_names", "evaluate", "explore", "load",
    "measure", "objective", "open_domain", "pretrained", "register", "train", "unigradicon",
]  # fmt: skip
