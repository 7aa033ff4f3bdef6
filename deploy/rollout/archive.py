"""What a rollout must know of an archive: its version, and what it predicts for its golden images."""

from __future__ import annotations

import base64
import json
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import requests
import yaml

from deploy.rollout.errors import Mistake
from deploy.rollout.torchserve_client import message_of
from predictor.spec import ModelSpec, SpecError


@dataclass(frozen=True)
class Archive:
    path: Path
    name: str
    version: str
    spec: ModelSpec
    images: list[bytes]
    probabilities: list[list[float]]  # a row for each image
    tolerance: float  # of a probability
    workers: int | None  # None: as many as the old version has

    @classmethod
    def read(cls, path: Path) -> Archive:
        """
        Raises:
            Mistake: it is damaged, or not an archive of this project.
        """
        try:
            with zipfile.ZipFile(path) as files:
                if damaged := files.testzip():
                    raise Mistake(f"{path}: {damaged} in it is damaged; copy or export it again")
                model = json.loads(files.read("MAR-INF/MANIFEST.json"))["model"]
                spec = ModelSpec.from_json(files.read("spec.json").decode(), source=f"{path}: spec.json")
                golden = json.loads(files.read("golden.json"))
                settings = yaml.safe_load(files.read("model-config.yaml")) or {}
                archive = cls(
                    path=path,
                    name=model["modelName"],
                    version=model["modelVersion"],
                    spec=spec,
                    images=[base64.b64decode(image["b64"]) for image in golden["images"]],
                    probabilities=golden["probabilities"],
                    tolerance=max(golden["tolerance"].values()),  # what the worker runs on is not known here
                    workers=settings.get("minWorkers"),
                )
        except Mistake:
            raise
        except SpecError as error:
            raise Mistake(str(error)) from None
        except OSError as error:
            raise Mistake(f"{path}: {error.strerror or error}") from None
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise Mistake(f"{path}: is damaged or no archive ({error}); copy or export it again") from None
        except KeyError as error:
            raise Mistake(
                f"{path}: is no whole archive of `python -m export` ({error.args[0]}); export again"
            ) from None
        except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())  # YAML's has several lines
            raise Mistake(f"{path}: cannot be read ({reason}); make it with `python -m export`") from None
        archive._check()
        return archive

    @property
    def stored(self) -> str:
        """Its file's name in the model store."""
        return f"{self.name}-{self.version}.mar"

    def mismatch(self, i: int, response: requests.Response) -> str:
        """How the response to golden image i differs from what the export predicted; empty if it does not."""
        if response.status_code != 200:
            return f"golden image {i} got {message_of(response)}"
        got = response.headers.get("x-model-version"), response.headers.get("x-model-weights-sha256")
        if got != (self.version, self.spec.weights_sha256):
            return f"golden image {i} was predicted by version {got[0]}, weights {str(got[1])[:12]}"
        expected = dict(zip(self.spec.labels, self.probabilities[i], strict=True))
        try:
            prediction: dict[str, float] = response.json()
            best = max(prediction, key=prediction.__getitem__)
            off = max(abs(prediction[label] - expected[label]) for label in prediction)
            off = max(off, max(expected.values()) - expected[best])
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"golden image {i} got no prediction with the labels of spec.json: {response.text[:100]}"
        if not off <= self.tolerance:  # NaN is a mismatch
            return f"golden image {i}: a probability is {off:.2g} off, and {self.tolerance:g} is allowed"
        return ""

    def _check(self) -> None:
        if not (isinstance(self.name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name)):
            raise Mistake(f"{self.path}: the name {self.name!r} cannot be used; export with --name")
        is_number = isinstance(self.version, str) and re.fullmatch(r"\d+(\.\d+)?", self.version)
        if not is_number or not float(self.version):
            raise Mistake(
                f"{self.path}: the version is {self.version!r}, and TorchServe takes numbers only, like 2 or 2.1; "
                "export with --version"
            )
        if not self.images:
            raise Mistake(f"{self.path}: golden.json holds no images, so nothing can be proven; export again")
        if not self._is_whole():
            raise Mistake(
                f"{self.path}: its files hold values of another kind than `python -m export` writes; export again"
            )

    def _is_whole(self) -> bool:
        """Whether the values from its JSON and YAML files are of the types that this class says, and fit together."""
        rows = self.probabilities if isinstance(self.probabilities, list) else [None]
        return (
            len(rows) == len(self.images)
            and all(isinstance(row, list) and len(row) == len(self.spec.labels) for row in rows)
            and all(isinstance(value, (int, float)) for row in rows for value in row)
            and isinstance(self.tolerance, (int, float))
            and (self.workers is None or (isinstance(self.workers, int) and self.workers > 0))
        )
