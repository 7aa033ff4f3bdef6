"""The model in LitServe: EXPORT=runs/NAME/export python litserve_app.py PORT WORKERS"""

import sys

import litserve
from fastapi import UploadFile
from pixels import crop
from shared import BATCH, DELAY, Model


class Classifier(litserve.LitAPI):
    def setup(self, device):
        self.model = Model()

    def decode_request(self, request: UploadFile):
        return crop(request.file.read(), self.model.spec)

    def batch(self, inputs):
        return inputs

    def predict(self, crops):
        return self.model.classify(crops)

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return output


if __name__ == "__main__":
    api = Classifier(max_batch_size=BATCH, batch_timeout=DELAY)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(sys.argv[2]), fast_queue=True)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", generate_client_file=False)
