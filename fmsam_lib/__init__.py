"""Sharpness-aware training of registration foundation models: model, SAM trainer, data, evaluation, flatness."""

from fmsam_lib.network import GradICON, Transform
from fmsam_lib.register import register  # from here on `fmsam_lib.register` is the function
from fmsam_lib.sam import SAM
from fmsam_lib.weights import load, unigradicon

__all__ = ["SAM", "GradICON", "Transform", "load", "register", "unigradicon"]
