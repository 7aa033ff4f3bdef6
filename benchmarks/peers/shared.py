"""What the peers have in common: our crop graph in ONNX Runtime, Pillow before it, the best five labels after it."""

import json
import os
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime

BATCH = 32
DELAY = 0.002  # seconds


class Model:
    """The crop graph of the export folder in $EXPORT, on one thread."""

    def __init__(self):
        (path,) = Path(os.environ["EXPORT"]).glob("*.crops.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.spec = json.loads(self.session.get_modelmeta().custom_metadata_map["spec"])

    def classify(self, crops):
        """A dict of the best five labels for each crop."""
        (probabilities,) = self.session.run(None, {"images": np.stack(crops)})
        indices = np.argsort(-probabilities, axis=1)[:, :5]
        return [
            {self.spec["labels"][i]: float(row[i]) for i in best}
            for row, best in zip(probabilities, indices, strict=True)
        ]
