"""gRPC calls to TorchServe, without generated code: the two messages of its inference.proto, built here."""

from __future__ import annotations

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from launcher import RunningServer

PACKAGE = "org.pytorch.serve.grpc.inference"
SERVICE = f"/{PACKAGE}.InferenceAPIsService"


def predict(server: RunningServer, fields: dict[str, bytes], model: str = "digits", key: str | None = None) -> bytes:
    """The body of the answer. Raises grpc.RpcError."""
    request, response = _messages()
    with grpc.insecure_channel(f"127.0.0.1:{server.ports.grpc_inference}") as channel:
        call = channel.unary_unary(f"{SERVICE}/Predictions", request.SerializeToString, response.FromString)
        metadata = [("authorization", f"Bearer {key or server.key()}")]
        return call(request(model_name=model, input=fields), metadata=metadata, timeout=30).prediction


def stream(server: RunningServer, fields: dict[str, bytes], model: str = "digits") -> list[bytes]:
    """The bodies that StreamPredictions answers. Raises grpc.RpcError."""
    request, response = _messages()
    with grpc.insecure_channel(f"127.0.0.1:{server.ports.grpc_inference}") as channel:
        call = channel.unary_stream(f"{SERVICE}/StreamPredictions", request.SerializeToString, response.FromString)
        metadata = [("authorization", f"Bearer {server.key()}")]
        replies = call(request(model_name=model, input=fields), metadata=metadata, timeout=30)
        return [reply.prediction for reply in replies]


def stream_both_ways(
    server: RunningServer, requests: list[dict[str, bytes]], sequence: str = "", model: str = "digits"
) -> list[tuple[bytes, bytes]]:
    """Body and status, as it is encoded, of each reply of StreamPredictions2. Raises grpc.RpcError."""
    request, response = _messages()
    with grpc.insecure_channel(f"127.0.0.1:{server.ports.grpc_inference}") as channel:
        call = channel.stream_stream(f"{SERVICE}/StreamPredictions2", request.SerializeToString, response.FromString)
        metadata = [("authorization", f"Bearer {server.key()}")]
        sent = [request(model_name=model, input=fields, sequence_id=sequence) for fields in requests]
        return [(reply.prediction, reply.status) for reply in call(iter(sent), metadata=metadata, timeout=30)]


def _messages():  # type: ignore[no-untyped-def]
    text, body, message = 9, 12, 11  # types of a field
    file = descriptor_pb2.FileDescriptorProto(name="inference.proto", package=PACKAGE, syntax="proto3")
    request = file.message_type.add(name="PredictionsRequest")
    request.field.add(name="model_name", number=1, type=text, label=1)
    entry = request.nested_type.add(name="InputEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=text, label=1)
    entry.field.add(name="value", number=2, type=body, label=1)
    type_name = f".{PACKAGE}.PredictionsRequest.InputEntry"
    request.field.add(name="input", number=3, type=message, label=3, type_name=type_name)
    request.field.add(name="sequence_id", number=4, type=text, label=1)
    response = file.message_type.add(name="PredictionResponse")
    response.field.add(name="prediction", number=1, type=body, label=1)
    response.field.add(name="status", number=3, type=body, label=1)  # a google.rpc.Status
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return (
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        for name in ("PredictionsRequest", "PredictionResponse")
    )
