"""The model in BentoML: EXPORT=runs/NAME/export WORKERS=2 bentoml serve bentoml_app:Classifier --port PORT"""

import os
from pathlib import Path

import bentoml
from pixels import crop
from shared import BATCH, Model


@bentoml.service(workers=int(os.environ.get("WORKERS", "2")), logging={"access": {"enabled": False}})
class Classifier:
    def __init__(self):
        self.model = Model()

    @bentoml.api(batchable=True, max_batch_size=BATCH)
    def classify(self, images: list[Path]) -> list[dict[str, float]]:
        return self.model.classify([crop(path.read_bytes(), self.model.spec) for path in images])
