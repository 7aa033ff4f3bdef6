"""The five ports of a TorchServe, and the addresses that go with them."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from launcher.errors import ServerError


@dataclass(frozen=True)
class Ports:
    inference: int
    management: int
    metrics: int
    grpc_inference: int
    grpc_management: int

    @classmethod
    def of_config(cls, properties: dict[str, str]) -> Ports:
        def port(name: str, default: int) -> int:
            found = re.search(r"(?:^|:)(\d+)$", properties.get(name, ""))
            return int(found[1]) if found else default

        return cls(
            port("inference_address", 8080),
            port("management_address", 8081),
            port("metrics_address", 8082),
            port("grpc_inference_port", 7070),
            port("grpc_management_port", 7071),
        )

    @classmethod
    def from_first(cls, first: int) -> Ports:
        if not 1 <= first <= 65531:
            raise ServerError(f"--port {first}: must be from 1 to 65531, as five ports are taken")
        return cls(*range(first, first + 5))

    @classmethod
    def free(cls) -> Ports:
        """Five that nobody uses at this moment."""
        sockets = [socket.socket() for _ in range(5)]
        try:
            for one in sockets:
                one.bind(("127.0.0.1", 0))
            return cls(*(one.getsockname()[1] for one in sockets))
        finally:
            for one in sockets:
                one.close()


def check_ports(ports: Ports) -> None:
    for port in vars(ports).values():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as TorchServe does: TIME_WAIT is no obstacle
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise ServerError(f"port {port} cannot be used ({error.strerror}); choose others: PORT=9000") from None


def addresses(ports: Ports, properties: dict[str, str]) -> dict[str, str]:
    """The ports in the place of those of `properties`, whose schemes (https with TLS) and hosts stay."""
    found = {"grpc_inference_port": str(ports.grpc_inference), "grpc_management_port": str(ports.grpc_management)}
    for kind in ("inference", "management", "metrics"):
        address = urlsplit(properties.get(f"{kind}_address", "http://127.0.0.1"))
        found[f"{kind}_address"] = f"{address.scheme}://{address.hostname}:{getattr(ports, kind)}"
    return found
