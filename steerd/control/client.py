"""A client of the API (control.api), for steerctl."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from steerd.errors import SteerdError

_TIMEOUT_SECONDS = 60.0


def socket_path(run_dir: str) -> Path:
    """Where the API of the daemon with this run_dir listens."""
    return Path(run_dir) / "api.sock"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("steerd", timeout=_TIMEOUT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def request(run_dir: str, method: str, *path: str, query: dict[str, str] | None = None, body: object = None) -> Any:
    """What the API answers to `method` on /v1/ and the parts of a path, from JSON (None where it answers nothing).

    Raises SteerdError with the API's own sentence, or one about the daemon that does not answer.
    """
    where = socket_path(run_dir)
    url = "/v1/" + "/".join(quote(part, safe="") for part in path)
    if query:
        url += f"?{urlencode(query)}"
    connection = _UnixConnection(where)
    try:
        connection.request(method, url, None if body is None else json.dumps(body))
        response = connection.getresponse()
        content = response.read()
        answer: Any = json.loads(content) if content else None
        if response.status >= 300:
            raise SteerdError(answer["message"])
    except PermissionError:
        raise SteerdError(f"{where} may not be used by you; be root, or in the group steerd.") from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise SteerdError(f"nobody answers at {where}: is steerd running?") from None
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise SteerdError(f"{where} gave no answer that can be understood: {error}") from error
    finally:
        connection.close()
    return answer
