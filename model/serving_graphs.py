"""The three graphs that are exported, each the next one's inside: network, crop graph, pixel graph."""

import torch
from torch import Tensor, nn

from model.tensor_preprocessing import Resize, normalise
from predictor.spec import ModelSpec


class Classifier(nn.Module):
    """A network with its preprocessing before it and its probabilities after it, as the spec says.

    `forward` is the pixel graph, `classify_crops` the crop graph, the submodule `network` the network itself.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.network = network
        self.height, self.width = spec.height, spec.width
        self.resize = Resize(spec.rule)
        self.temperature = float(spec.temperature)
        self.register_buffer("mean", torch.tensor(spec.mean))
        self.register_buffer("std", torch.tensor(spec.std))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W, 3), RGB, any H and W, to probabilities float32 (N, C)."""
        return self.classify_crops(self.resize(images))

    @torch.jit.export
    def classify_crops(self, images: Tensor) -> Tensor:
        """uint8 (N, height, width, 3), RGB, of the spec's size, to probabilities float32 (N, C)."""
        return self.to_probabilities(self.network(self.to_planes(images)))

    def to_planes(self, crops: Tensor) -> Tensor:
        """What is before the network: uint8 (N, height, width, 3) to float32 (N, 3, height, width), normalised."""
        return normalise(crops, self.mean, self.std)

    def to_probabilities(self, logits: Tensor) -> Tensor:
        """What is after it: float32 (N, C), adding up to 1 in each row."""
        return torch.softmax(logits / self.temperature, dim=1)


class CropGraph(nn.Module):
    """`Classifier.classify_crops` as a module, for exporters that take only `forward`."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.classify_crops(images)
