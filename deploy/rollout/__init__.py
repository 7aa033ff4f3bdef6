"""A new version of a model in a running TorchServe: `python -m deploy.rollout`, and what it is made of."""

from deploy.rollout.archive import Archive
from deploy.rollout.errors import Failed, Mistake, Unfinished
from deploy.rollout.steps import rollout
from deploy.rollout.torchserve_client import TorchServeClient

__all__ = ["Archive", "Failed", "Mistake", "TorchServeClient", "Unfinished", "rollout"]
