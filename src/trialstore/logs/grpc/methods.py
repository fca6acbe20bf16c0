"""The calls of a service, for both sides, from its descriptor alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message_factory import GetMessageClass
import grpc

from trialstore.logs.grpc.generated import log_pb2, optuna_pb2

LOG_SERVICE: Any = log_pb2.DESCRIPTOR.services_by_name["LogService"]
STORAGE_SERVICE: Any = optuna_pb2.DESCRIPTOR.services_by_name["StorageService"]

Call = Callable[..., Any]


def calls(channel: grpc.Channel, service: Any) -> dict[str, Call]:
    """What a client calls, by name of the method."""
    found: dict[str, Call] = {}
    for method in service.methods:
        make = channel.unary_stream if method.server_streaming else channel.unary_unary
        found[method.name] = make(
            f"/{service.full_name}/{method.name}",
            request_serializer=GetMessageClass(method.input_type).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
    return found


def handler(servicer: Any, service: Any) -> grpc.GenericRpcHandler:
    """What a server answers with: the methods of ``servicer`` of the same names."""
    handlers = {}
    for method in service.methods:
        make = (
            grpc.unary_stream_rpc_method_handler
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        handlers[method.name] = make(
            getattr(servicer, method.name),
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def bearer(token: str) -> str:
    """What shows a token in a call's metadata.

    Raises:
        ValueError: Nobody could show it: gRPC sends no call with such metadata.
    """
    if not (token.isascii() and token.isprintable()):
        raise ValueError("A token must be printable ASCII, since it is sent in an HTTP header.")
    return f"Bearer {token}"
