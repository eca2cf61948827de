"""Sharpness-aware training of registration foundation models: model, SAM trainer, data, evaluation, flatness."""

from fmsam_lib.network import GradICON, Transform, load, unigradicon
from fmsam_lib.sam import SAM

__all__ = ["SAM", "GradICON", "Transform", "load", "unigradicon"]
