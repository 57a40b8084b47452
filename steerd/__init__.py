"""steerd: one public address and port, any number of daemons behind it. Decide once in user space, carry for ever in
the kernel.

**The nouns** (steerd.model). Clients connect to an *endpoint*, a public address and port (or range of ports).
Endpoints that belong together are a *service*. Inspecting a packet gives *keys*, such as `portext.dst=7` or
`http.host=a.example`. A *route* leads from keys (and perhaps a source prefix) to a *target*, an address and port that
a daemon listens on; nearly always an *alias*, a local address out of a *pool* that steerd manages.

**The life of one SYN.** It arrives for 203.0.113.10:443 and carries a port extension, 7, in an IP option. The nft
table `inet steerd` (nft/steerd.nft) knows the endpoint and sees the option: chain `divert` hands the packet to the
queue of one worker, chosen by a hash of address and port. The worker (steerd.worker) reads it (steerd.wire.packet,
steerd.wire.portext), asks the engine (steerd.core.engine), and the engine finds the best route among the keys
(steerd.core.router) or maps 7 to the seventh alias of a pool. The answer is a target id. If it is used for the first
time, the worker tells the kernel which address the id stands for (steerd.kernel.nftables). Then it writes the id into
the packet mark and lets the packet go on. Chain `steer` translates the mark to a destination (DNAT), chain `guard`
makes sure that this is what happened and clears the mark, and the packet is delivered to the alias. From here on
conntrack translates every packet of the connection, both ways, and steerd never sees it again. The daemon sees the
client's own address.

The worker also adds endpoint and extension to a map of the table, with the same mark. As long as they alone decide, the
next SYN with extension 7 is steered by the kernel and wakes nobody (steerd.core.offload, steerd.offload); any change
that could matter empties the map (steerd.main.epochs).

**The life of a first payload.** Most SYNs carry nothing to go by. At a service that inspects payloads such a SYN is
answered by the kernel itself (synproxy, a cookie, no state); the first payload of the connection is what the worker
gets. steerd.late puts it together with steerd.core.pending, has the engine decide, and lets the packet go on with its
mark: the kernel checks the cookie, opens the connection to the alias (chains `handshake`, `recall`, `steer_local`,
`verify`), and the worker's copy of the payload follows through a raw socket (steerd.kernel.inject).

**The life of a datagram.** The first datagram of a flow goes to a worker like a SYN; steerd.datagram asks the engine
with all of the flow's datagrams so far, which steerd.core.datagrams keeps. One that suffices by itself goes on with its
mark; where it takes several (a QUIC hello has two), all of them are sent through the raw socket, in order, and the
first makes the flow's conntrack entry. A DNS query says where it itself wants to go, not its flow: chain `query` hands
every one over before conntrack looks, and chain `zone` puts the decided query into the conntrack zone of its target,
so that one client's port has a flow to each daemon. When a QUIC server answers a handshake, chain `learn` notes its
connection id, and the table itself brings a client that comes from another port back to its daemon. A client that uses
another connection id as well is brought there only by a server id in it (steerd.wire.quic_lb).

**Who does what.** *wire turns bytes into facts, core turns facts into decisions, kernel turns decisions into effects
and the world into facts.* wire and core are pure: no clock, no socket, no log.

    cli/           the commands `steerd` and `steerctl`; no logic
    daemon.py      the main process (asyncio): makes the machine match the configuration and keeps it so
    main/          the parts of the main process: lock, table, aliases, workers, reload, machine (what the API is told),
                   announcer (systemd), relay (starts it), monitor (metrics for Prometheus), waker (starts sleeping
                   daemons, puts them to sleep), liveness (which of several targets listens)
    orders.py      what a worker is told when it is started
    shared.py      how files in shared memory are made and mapped
    nursery.py     the process that workers are forked from
    worker.py      one queue, one process, the hot loop
    late.py        the half of a worker that is about first payloads
    datagram.py    the half of a worker that is about datagrams
    offload.py     the half of a worker that has the kernel steer by itself what was decided before
    record.py      the half of a worker that counts and logs decisions
    config/        TOML to values; every mistake found, each with its key: a file for each section
    privileges.py  the few capabilities that are kept, each with its reason; systemd/ has the unit that grants them
    relay/         daemons that listen on a unix socket: one process, beside the workers
    client.py      for programs that want to connect to an extended port
    wire/          packet, portext, and one file for each protocol that can be inspected
    core/          engine, explain (with its sentences), router, offload, choice (of several targets), sessions, pending
                   (first payloads), datagrams, pools, leases, marks, wake (daemons that sleep), plan (have and want ->
                   what to do)
    kernel/        queue, inject (raw sockets), nftables and conntrack (netlink), ruleset (the table), sysctls, aliases,
                   handshake (what this machine says in SYN-ACKs), listeners,
                   sockets (ends a connection's), host, firewalls, capabilities, notify (systemd), processes and units
                   (daemons that are woken; launch is what such a process begins as)
    control/       registry (LMDB): what must outlive a process and what all workers read: the plan, ids (store), routes
                   (route_records, ties), leases, sessions and claims on them, drains, relays, elsewhere (endpoints);
                   states of targets and doors of daemons that sleep in shared memory; explain, flows, transfer (export
                   and import); the API and its client
    telemetry/     counters in shared memory, what metrics are called, logs; a dashboard and alert rules

Imports go one way, and tests/unit/test_imports.py checks it: daemon, worker and cli see all; kernel sees core and
model; core sees wire and model; wire sees model.

**Two kinds of process.** The main process owns the configuration, the registry, the aliases and the table. It has one
worker for each queue, forked by a nursery (steerd.nursery) that does nothing else, and again if it dies. A worker owns
nothing that must survive it. Kill any of them at any time: established connections do not notice, new ones wait for a
repeated SYN. Where daemons listen on unix sockets there is a third kind, the relay (steerd.relay), and only what it
copies depends on it.

**A daemon that sleeps** is started by the first connection to it. The worker that finds its door shut
(steerd.core.wake) holds the connection and asks the main process, whose part steerd.main.waker starts the unit or
command, sees it listen, and opens the door in shared memory (steerd.control.doors).

**When in doubt, drop.** A connection at the wrong daemon is the worst there is. So a packet that cannot be read,
matched, or translated as decided is dropped or reset, and counted under one reason (steerd.model.Reason, and the
named counters of the table).
"""
