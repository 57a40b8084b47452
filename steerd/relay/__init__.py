"""The relay: daemons that listen on a unix socket instead of an alias. One process for a gateway, beside the workers.

To everything else such a daemon is a target like any other, an alias and a port. There the relay listens, and what it
accepts it brings to the daemon: `unix:/path`, by copying (steerd.relay.engine), or `unix-fd:/path`, by handing the
connection itself over (steerd.relay.handover). It takes no part in decisions, and its load holds none up.

It needs nothing but to bind and to connect, so it gives up all capabilities that the agent has (but to bind ports below
1024, if it must). Whoever kills it cuts the connections that it copies, no others; the main process starts it again
(steerd.main.relay). When the main process ends, it stops listening and carries on what it has until the last
connection has ended.
"""
