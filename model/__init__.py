"""What a model is: its spec, its network, its preprocessing, and how it is kept on disk."""

from model.classifier import Classifier
from model.run import load_run
from model.spec import ModelSpec, SpecError

__all__ = ["Classifier", "ModelSpec", "SpecError", "load_run"]
