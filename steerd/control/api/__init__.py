"""The API of the main process: HTTP and JSON on a unix socket, RUN_DIR/api.sock (mode 0660, group `steerd` if there is
one), under /v1. `curl --unix-socket /run/steerd/api.sock http://steerd/v1/services/tv/sessions`.

**One table says it all** (table.OPERATIONS): of each operation its method, path, parameters, body, answers and a
sentence. server.py makes aiohttp's routes of it, and document.py the OpenAPI document that GET /v1/openapi.json gives,
so the two cannot differ.

**A resource is a file**: the structs that its operations take and give, a function for each, and `OPERATIONS`. To add
one: such a file (leases.py is the pattern), and a line in table.py. A function that waits for the disk or walks over
much is an ordinary one, and is called in a thread; a coroutine function is called in the event loop. What it needs of
the daemon or the kernel, beside the registry, is a method of context.Machine.

Lists come in pages of at most MAX_PAGE; `after` is the `next` of the page before. An answer to PUT or DELETE is given
when the change is on the disk.

Everything but success is {"code", "field", "message"}: a word for programs, what of the request is wrong (or null), and
a sentence. operation.CODES has the codes.
"""

from steerd.control.api.context import Context, Machine
from steerd.control.api.operation import MAX_PAGE
from steerd.control.api.server import GROUP, Api

__all__ = ["GROUP", "MAX_PAGE", "Api", "Context", "Machine"]
