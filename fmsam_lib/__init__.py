"""Sharpness-aware training of registration foundation models: model, SAM trainer, data, evaluation, flatness."""

from fmsam_lib.model.network import GradICON
from fmsam_lib.model.transform import Transform
from fmsam_lib.model.weights import load, unigradicon
from fmsam_lib.registration.register import register
from fmsam_lib.training.sam import SAM

__all__ = ["SAM", "GradICON", "Transform", "load", "register", "unigradicon"]
