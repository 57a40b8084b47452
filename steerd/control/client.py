"""A client of the API (control.api), for steerctl."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from steerd.errors import ForbiddenError, NoAnswerError, SteerdError

_TIMEOUT_SECONDS = 60.0
_PIECE = 1 << 18
_PREDICATES = ("Is ", "Has ", "Must ", "Cannot ")


def socket_path(run_dir: str) -> Path:
    """Where the API of the daemon with this run_dir listens."""
    return Path(run_dir) / "api.sock"


def read_only_socket_path(run_dir: str) -> Path:
    """Where it listens for those who may only look, if the configuration wants it."""
    return Path(run_dir) / "api-ro.sock"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("steerd", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def request(
    run_dir: str,
    method: str,
    *path: str,
    query: dict[str, str] | None = None,
    body: object = None,
    timeout: float = _TIMEOUT_SECONDS,
) -> Any:
    """What the API answers to `method` on /v1/ and the parts of a path, from JSON (None where it answers nothing).
    `body` is sent as JSON, or as it is if it is bytes. `timeout`: seconds, for each part of the answer.

    Raises SteerdError with the API's own sentence, or one about the daemon that does not answer.
    """
    content = body if isinstance(body, bytes) or body is None else json.dumps(body)
    with _asked(run_dir, method, path, query, content, timeout) as response:
        answer = response.read()
        return json.loads(answer) if answer else None


def download(run_dir: str, *path: str, query: dict[str, str] | None = None) -> Iterator[bytes]:
    """What the API answers to GET on /v1/ and the parts of a path, in pieces as they come. Raises as `request` does."""
    with _asked(run_dir, "GET", path, query, None, _TIMEOUT_SECONDS) as response:
        while piece := response.read1(_PIECE):
            yield piece
        # read1 says nothing of an answer that was cut short.
        if response.chunked and not response.isclosed():
            raise http.client.IncompleteRead(b"")


def _door(run_dir: str, method: str) -> Path:
    """The socket to ask at: the read-only one for who may not use the other, and wants to look."""
    path, read_only = socket_path(run_dir), read_only_socket_path(run_dir)
    may_look_only = path.exists() and not os.access(path, os.W_OK) and os.access(read_only, os.W_OK)
    return read_only if method == "GET" and may_look_only else path


def _sentence(problem: dict[str, Any]) -> str:
    """What is wrong, with its subject: some messages say only what a field is, has, or must be."""
    field, message = problem["field"], str(problem["message"])
    return f"{field}: {message}" if field and message.startswith(_PREDICATES) else message


@contextmanager
def _asked(
    run_dir: str,
    method: str,
    path: tuple[str, ...],
    query: dict[str, str] | None,
    body: str | bytes | None,
    timeout: float,
) -> Iterator[http.client.HTTPResponse]:
    """The answer, if it is a good one; whatever goes wrong while it is read is a SteerdError as well."""
    where = _door(run_dir, method)
    url = "/v1/" + "/".join(quote(part, safe="") for part in path)
    if query:
        url += f"?{urlencode(query)}"
    connection = _UnixConnection(where, timeout)
    try:
        connection.request(method, url, body)
        response = connection.getresponse()
        if response.status >= 300:
            kind = ForbiddenError if response.status == HTTPStatus.FORBIDDEN else SteerdError
            raise kind(_sentence(json.loads(response.read())))
        yield response
    except PermissionError:
        raise ForbiddenError(f"{where} may not be used by you; be root, or in the group steerd.") from None
    except TimeoutError:
        raise NoAnswerError(f"{where} did not answer in {timeout:g} s: the daemon hangs, or has much to do.") from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise NoAnswerError(f"nobody answers at {where}: is steerd running?") from None
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise SteerdError(f"{where} gave no answer that can be understood: {error}") from error
    finally:
        connection.close()
