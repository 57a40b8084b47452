"""Real servers out of Debian's packages (tests/setup.sh), each on its own alias, for tests of late steering.

Server number N listens on the alias N of the pool POOL, IPv4 and IPv6, in the gateway's namespace. Asked by its own
protocol, it says who it is and whom it sees: `answer` gives the line that nginx, sshd and PostgreSQL send. For programs
that cannot be made to say it, `connected` reads it from the sockets of their process.

Nothing of the machine's own configuration of these programs is read, and nothing outside of the test's directory is
written; PostgreSQL, which will not run as root, has a directory of its own for as long as it runs.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.netns.gateway import CLIENT4, CLIENT6, SLOWER, Gateway
from tests.netns.lab import Host, sh

POOL = """
[pools.daemons]
prefixes = ["10.64.0.0/28", "fd00:64::/124"]
"""
CLIENT = {4: CLIENT4, 6: CLIENT6}


def alias(version: int, number: int) -> str:
    """The address of a server, numbers 1 to 9."""
    return f"10.64.0.{number}" if version == 4 else f"fd00:64::{number}"


def target(number: int, port: int) -> str:
    """A server as the configuration's `target` has it, both families."""
    return f'["{alias(4, number)}:{port}", "[{alias(6, number)}]:{port}"]'


def answer(name: str, version: int, number: int, port: int, client: str | None = None) -> str:
    """What the server `name` says: its name, its own address and port, and the address of who asked."""
    return f"{name} {alias(version, number)} {port} {client or CLIENT[version]}"


class Connection(NamedTuple):
    """An established TCP connection, as a server's kernel has it."""

    local: str
    local_port: int
    peer: str


def connected(lab: Gateway, process: subprocess.Popen[str]) -> list[Connection]:
    """The established connections of a process on the gateway."""
    found = []
    for line in lab.host.sh("ss -Htnp state established").splitlines():
        _, _, local, peer, *users = line.split()
        if users and f"pid={process.pid}," in users[0]:
            address, _, port = local.rpartition(":")
            found.append(Connection(address.strip("[]"), int(port), peer.rpartition(":")[0].strip("[]")))
    return found


def socket_name(version: int, number: int, port: int) -> str:
    """A server's address and port as ss, nginx and openssl write them."""
    return f"{alias(4, number)}:{port}" if version == 4 else f"[{alias(6, number)}]:{port}"


def await_listening(lab: Gateway, process: subprocess.Popen[str], *sockets: str, host: Host | None = None) -> None:
    """Wait until a process (on the gateway, if not on another host) listens on these TCP sockets, as ss writes them."""

    def listening() -> bool:
        assert process.poll() is None, f"{process.args!r} has ended with {process.returncode}"
        lines = (host or lab.host).sh("ss -Htlnp").splitlines()
        return set(sockets) <= {line.split()[3] for line in lines if f"pid={process.pid}," in line}

    lab.wait(listening, f"{process.args!r} listens on {sockets}")


def certificate(lab: Gateway, *names: str) -> None:
    """For each name a key and a certificate of its own in `lab.directory`/NAME.pem, all certificates in all.pem."""
    for name in names:
        file = lab.directory / f"{name}.pem"
        sh(
            f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name}"
            f" -addext subjectAltName=DNS:{name} -keyout {file} -out {file}.crt 2>&1;"
            f" cat {file}.crt >> {lab.directory}/all.pem; cat {file}.crt >> {file}"
        )


def nginx(
    lab: Gateway, name: str, number: int, port: int, *, how: str = "", client: str = "$remote_addr"
) -> subprocess.Popen[str]:
    """An nginx that answers every request with its `answer` line. `how`: "ssl" (with NAME.pem), "http2",
    "proxy_protocol" or nothing; `client`: its variables for whom it sees."""
    prefix = lab.directory / f"nginx-{name}-{number}-{port}"
    prefix.mkdir()
    secret = f"ssl_certificate {lab.directory}/{name}.pem; ssl_certificate_key {lab.directory}/{name}.pem;"
    temporary = " ".join(f"{what}_temp_path {what};" for what in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (prefix / "nginx.conf").write_text(
        f"""
        daemon off;
        master_process off;
        pid nginx.pid;
        events {{ }}
        http {{
            access_log off;
            {temporary}
            server {{
                listen {socket_name(4, number, port)} {how};
                listen {socket_name(6, number, port)} {how};
                {secret if "ssl" in how else ""}
                default_type text/plain;
                location / {{ return 200 "{name} $server_addr $server_port {client}\\n"; }}
            }}
        }}
        """
    )
    process = lab.spawn(lab.host, "nginx", "-p", f"{prefix}", "-e", "stderr", "-c", "nginx.conf")
    await_listening(lab, process, socket_name(4, number, port), socket_name(6, number, port))
    return process


def s_server(lab: Gateway, name: str, version: int, number: int, port: int) -> subprocess.Popen[str]:
    """An `openssl s_server` with the certificate NAME.pem. It knows one address, and sends back every line reversed."""
    address = socket_name(version, number, port)
    process = lab.spawn(
        lab.host, "openssl", "s_server", "-accept", address, "-cert", f"{lab.directory}/{name}.pem", "-rev", "-quiet"
    )
    await_listening(lab, process, address)
    return process


def sshd(lab: Gateway, name: str, number: int, port: int) -> subprocess.Popen[str]:
    """An sshd with a host key of its own that lets root in with the key `lab.directory`/id, says `answer` and then
    sends back what it is sent."""
    directory = lab.directory / f"sshd-{name}"
    directory.mkdir()
    key = lab.directory / "id"
    for file in (directory / "host_key", key):
        if not file.exists():
            sh(f"ssh-keygen -q -t ed25519 -N '' -f {file}")
    public = " ".join((directory / "host_key.pub").read_text().split()[:2])
    with (lab.directory / "known_hosts").open("a") as known:
        known.write(f"{name} {public}\n")
    says = directory / "says"
    says.write_text(f'#!/bin/sh\nset -- $SSH_CONNECTION\necho "{name} $3 $4 $1"\nexec cat\n')
    says.chmod(0o755)
    (directory / "shadow").write_text("root:*:19000::::::\n")
    (directory / "config").write_text(
        f"ListenAddress {alias(4, number)}\nListenAddress {alias(6, number)}\nPort {port}\n"
        f"HostKey {directory}/host_key\nPidFile none\nUsePAM no\nPermitRootLogin prohibit-password\nStrictModes no\n"
        f"AuthorizedKeysFile {key}.pub\nForceCommand {says}\n"
    )
    # sshd wants /run/sshd, and no login for a root whose password is locked, as many machines have it. What is mounted
    # here is seen by this process alone: `ip netns exec` gives it a mount namespace of its own.
    process = lab.spawn(
        lab.host, "sh", "-ec",
        f"mount -t tmpfs tmpfs /run; mkdir /run/sshd; mount --bind {directory}/shadow /etc/shadow;"
        f" exec /usr/sbin/sshd -D -e -f {directory}/config",
    )  # fmt: skip
    await_listening(lab, process, socket_name(4, number, port), socket_name(6, number, port))
    return process


@contextmanager
def postgres(lab: Gateway, name: str, number: int, port: int) -> Iterator[None]:
    """A PostgreSQL server (cluster_name `name`) with TLS (certificate NAME.pem) that trusts everybody, until the block
    ends. Besides `postgres` it has one database and one user, both called `name`."""
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    directory = Path(tempfile.mkdtemp(prefix="steerd-test-postgres-"))
    data, file = directory / "data", directory / "server.pem"
    process = None
    try:
        shutil.copy(lab.directory / f"{name}.pem", file)
        shutil.chown(directory, "postgres", "postgres")
        shutil.chown(file, "postgres", "postgres")
        file.chmod(0o600)
        sh(f"cd {directory}; runuser -u postgres -- {programs}/initdb --no-sync --auth trust -D {data} 2>&1")
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n")
        settings = {
            "cluster_name": name, "listen_addresses": f"{alias(4, number)},{alias(6, number)}", "port": port,
            "unix_socket_directories": directory, "fsync": "off", "shared_buffers": "4MB", "max_wal_senders": 0,
            "wal_level": "minimal", "autovacuum": "off", "log_min_messages": "fatal",
            "ssl": "on", "ssl_cert_file": file, "ssl_key_file": file,
        }  # fmt: skip
        process = lab.spawn(
            lab.host, "setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups",
            f"{programs}/postgres", "-D", f"{data}", *(f"--{key}={value}" for key, value in settings.items()),
        )  # fmt: skip
        await_listening(lab, process, socket_name(4, number, port), socket_name(6, number, port))
        create = f'-c \'create user "{name}"\' -c \'create database "{name}" owner "{name}"\''
        sh(f"psql -Xq -v ON_ERROR_STOP=1 -h {directory} -p {port} -U postgres {create}")
        yield
    finally:
        if process is not None:
            # Killed outright it would leave shared memory behind.
            process.send_signal(signal.SIGINT)
            process.wait(30 * SLOWER)
        shutil.rmtree(directory)


def postgres_version() -> int:
    """The major version of psql."""
    said = re.search(r" (\d+)", sh("psql --version"))
    assert said
    return int(said[1])
