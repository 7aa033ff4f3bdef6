"""The least handler that serves a network of any size on the stock BaseHandler: Pillow, then the crop graph."""

import json
from pathlib import Path

import numpy as np
import torch
from pixels import crop
from ts.torch_handler.base_handler import BaseHandler


class StockHandler(BaseHandler):
    def initialize(self, context):
        super().initialize(context)
        self.spec = json.loads((Path(context.system_properties["model_dir"]) / "spec.json").read_text())

    def preprocess(self, requests):
        return torch.from_numpy(np.stack([crop(next(iter(request.values())), self.spec) for request in requests]))

    def inference(self, crops):
        with torch.inference_mode():
            return self.model.classify_crops(crops.to(self.device))

    def postprocess(self, probabilities):
        values, indices = probabilities.topk(min(5, len(self.spec["labels"])), dim=1)
        return [
            {self.spec["labels"][i]: value for i, value in zip(*pair, strict=True)}
            for pair in zip(indices.tolist(), values.tolist(), strict=True)
        ]
