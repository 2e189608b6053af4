"""Data sets, and the transforms they need: torchvision's names and results without torchvision."""

from __future__ import annotations

from . import transforms as transforms
from .mnist import MNIST
from .transforms import Compose, Normalize, ToTensor

__all__ = ["Compose", "MNIST", "Normalize", "ToTensor"]
