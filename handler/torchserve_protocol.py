"""What the handler uses of TorchServe: `ts.context.Context`, of which upstream says no types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

Fields = Mapping[str, Any]  # of one request: name to bytes, or to the value where TorchServe has decoded JSON
Headers = Mapping[str, Any]  # name to text; and a field's name to {"content-type": …}


class Context(Protocol):
    """Of a worker when it is initialised; of a batch when it is handled. `idx` is the index of a request."""

    model_name: str
    manifest: Mapping[str, Any]  # of the archive
    model_yaml_config: Mapping[str, Any] | None  # model-config.yaml
    metrics: Any  # TorchServe's cache of metrics, or None

    @property
    def system_properties(self) -> Mapping[str, Any]:
        """`model_dir`, `gpu_id`, `batch_size`, `limit_max_image_pixels` and others."""

    def get_all_request_header(self, idx: int) -> Headers: ...

    def set_response_status(self, code: int, phrase: str, idx: int) -> None: ...

    def set_response_content_type(self, idx: int, value: str) -> None: ...

    def set_response_header(self, idx: int, key: str, value: str) -> None: ...
