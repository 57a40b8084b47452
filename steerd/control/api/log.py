"""What is logged, changed while everything runs."""

from __future__ import annotations

from steerd.control.api.context import Context, LogSettings
from steerd.control.api.operation import Answer, AnyOperation, Nothing, Operation, Request


def get_log(context: Context, _request: Request[Nothing, Nothing, Nothing]) -> Answer:
    return Answer(200, context.machine.log_settings())


def put_log(context: Context, request: Request[Nothing, Nothing, LogSettings]) -> Answer:
    context.machine.put_log_settings(request.body)
    return Answer(200, context.machine.log_settings())


OPERATIONS: tuple[AnyOperation, ...] = (
    Operation(
        "getLog",
        "GET",
        "/v1/log",
        "What is logged.",
        handle=get_log,
        parameters=Nothing,
        query=Nothing,
        body=Nothing,
        answers={200: LogSettings},
    ),
    Operation(
        "putLog",
        "PUT",
        "/v1/log",
        "Log this from now on, until the daemon ends, or a reload changes what the configuration says of it.",
        handle=put_log,
        parameters=Nothing,
        query=Nothing,
        body=LogSettings,
        answers={200: LogSettings},
    ),
)
