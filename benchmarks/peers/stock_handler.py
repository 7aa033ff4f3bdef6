"""The least handler that serves a network of any size on the stock BaseHandler: Pillow, then the crop graph."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from ts.torch_handler.base_handler import BaseHandler


class StockHandler(BaseHandler):
    def initialize(self, context):
        super().initialize(context)
        self.spec = json.loads((Path(context.system_properties["model_dir"]) / "spec.json").read_text())

    def preprocess(self, requests):
        return torch.from_numpy(np.stack([self.crop(next(iter(request.values()))) for request in requests]))

    def crop(self, body):
        size, resize = self.spec["size"], self.spec["resize"]
        picture = Image.open(io.BytesIO(body)).convert("RGB")
        side = max(1, (2 * min(picture.size) * size + resize) // (2 * resize))
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side))
        return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))

    def inference(self, crops):
        with torch.inference_mode():
            return self.model.classify_crops(crops.to(self.device))

    def postprocess(self, probabilities):
        values, places = probabilities.topk(min(5, len(self.spec["labels"])), dim=1)
        return [
            {self.spec["labels"][i]: value for i, value in zip(*pair, strict=True)}
            for pair in zip(places.tolist(), values.tolist(), strict=True)
        ]
