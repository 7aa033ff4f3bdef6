"""What a model is: its spec, its network, its preprocessing, and how it is kept on disk."""

from model.run import load_run
from model.serving_graphs import Classifier
from predictor.spec import ModelSpec, SpecError

__all__ = ["Classifier", "ModelSpec", "SpecError", "load_run"]
