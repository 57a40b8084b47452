"""Why a connection goes where it goes (control.explain), by what is in force now."""

from __future__ import annotations

import contextlib

from msgspec import Struct

from steerd.control import explain
from steerd.control.api.context import Context
from steerd.control.api.operation import Answer, AnyOperation, Nothing, Operation, Request
from steerd.control.explain import ExplanationView, Question
from steerd.core.explain import MAX_LOOKED_AT, Explainer
from steerd.errors import RequestError


class Explained(Struct, frozen=True):
    """The answers: one for each connection, flow or datagram."""

    note: str
    explanations: list[ExplanationView]


def explain_question(context: Context, request: Request[Nothing, Nothing, Question]) -> Answer:
    asked = explain.check(request.body)
    if asked.to is None and not asked.bytes:
        raise RequestError("invalid", "to", "Is missing: either it or hex says what to explain.")
    arrived = list(explain.first_packets(explain.packets_of(asked))) if asked.to is None else []
    config = context.config
    with contextlib.closing(context.registry.reader()) as reader:
        known = explain.known_by(reader, config, context.machine.target_state)
        explainer = Explainer(known, MAX_LOOKED_AT)
        told = [explain.view(each) for each in explain.explanations(explainer, asked, arrived, known.plan.numbers)]
    if not told:
        raise RequestError(
            "invalid",
            "hex",
            "Nothing here decides anything: there is no SYN, first payload or datagram to an endpoint.",
        )
    return Answer(200, Explained("By what is in force now.", told))


OPERATIONS: tuple[AnyOperation, ...] = (
    Operation(
        "explain",
        "POST",
        "/v1/explain",
        "Say step by step what would become of a connection, by what is in force.",
        handle=explain_question,
        parameters=Nothing,
        query=Nothing,
        body=Question,
        answers={200: Explained},
        at_once=1,
    ),
)
