"""`unix-fd:/path`: the daemon gets the client's TCP connection itself, as if it had accepted it.

The protocol. The daemon listens on the path with a SOCK_SEQPACKET or SOCK_STREAM socket, or is bound there with a
SOCK_DGRAM one. The relay connects once, and sends one message for each client:
- its bytes are a header of the PROXY protocol, version 2 (28 bytes for IPv4, 52 for IPv6): the client's address and
  port, and the address and port of the endpoint that the client connected to;
- with it comes one descriptor (SCM_RIGHTS): a connected TCP socket, blocking, without close-on-exec of its own.
The daemon answers nothing. It owns the connection from then on; getpeername(2) on it is the client, getsockname(2) the
alias. With SOCK_STREAM one recvmsg(2) gives at most one message, since a descriptor ends it.

A daemon that does not take its messages stops the relay from accepting for it; clients wait in the backlog. When it
closes its end, the next client makes the relay connect anew; what it had not taken is closed by the kernel.
"""

from __future__ import annotations

import errno
import socket
import struct

_SEND_TYPES = (socket.SOCK_SEQPACKET, socket.SOCK_STREAM, socket.SOCK_DGRAM)


def connect(address: str) -> socket.socket:
    """A connection to a daemon that takes descriptors, not blocking; raises OSError. `address` as connect(2) has it."""
    for kind in _SEND_TYPES:
        channel = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
        try:
            channel.connect(address)
        except OSError as error:
            channel.close()
            if error.errno == errno.EPROTOTYPE and kind != _SEND_TYPES[-1]:
                continue
            raise
        return channel
    raise AssertionError("the last kind of socket connects or raises")


def hand_over(channel: socket.socket, header: bytes, client: socket.socket) -> bool:
    """Send one message; False: the daemon takes none now. Raises OSError if it never will."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", client.fileno()))
    try:
        channel.sendmsg([header], [rights])
    except BlockingIOError:
        return False
    except OSError as error:
        # So many descriptors may be on their way between processes as one process may have open (unix(7)).
        if error.errno == errno.ETOOMANYREFS:
            return False
        raise
    return True
