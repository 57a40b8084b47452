#!/bin/bash
# Prepares a Debian 12/13 or Ubuntu 24.04 machine for `make demo`, with the argument `programs` for the tests with real
# servers too, with `packages` for the Debian package and its test, with `lab` for the Vagrant lab, and with `bench` for
# the systems that `make bench` compares with: what is missing of the packages below through apt (with sudo if need be;
# no service is started or enabled), and a virtual environment in .venv. Says what it does; does nothing if nothing is
# missing. Packages and .venv stay.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
	nftables iptables iproute2 procps           # the packet path, and namespaces to try it in
	conntrack tcpdump shellcheck curl openssl mandoc systemd # tests and demo
	python3-dev python3-venv gcc libc6-dev pkg-config libnetfilter-queue-dev libnfnetlink-dev # python-netfilterqueue
)

if [ "${1:-}" = programs ]; then
	packages+=(nginx openssh-client openssh-server postgresql nghttp2-client haproxy)
	packages+=(mosquitto mosquitto-clients dnsmasq-base bind9-dnsutils kamailio sipsak ethtool ngtcp2-client)
	packages+=(wireguard-go wireguard-tools)
	packages+=(prometheus)  # for promtool
	packages+=(dbus-daemon) # for a bus of the tests' own
	packages+=(ufw) # a firewall to live beside, in namespaces
	# Ubuntu has it as a snap only, which does not run in a namespace.
	if grep -qx ID=debian /etc/os-release; then packages+=(chromium); fi
fi

if [ "${1:-}" = packages ]; then
	packages+=(dpkg-dev mmdebstrap systemd-container)
fi

if [ "${1:-}" = lab ]; then
	packages+=(dpkg-dev)
	packages+=(vagrant vagrant-libvirt libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients dnsmasq-base rsync)
	packages+=(qemu-system-x86 qemu-utils mmdebstrap fdisk extlinux syslinux-common) # a box, and what runs it
fi

if [ "${1:-}" = bench ]; then
	packages+=(haproxy nginx libnginx-mod-stream sslh)
fi

as_root() {
	if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

services=(nginx.service ssh.service ssh.socket postgresql.service haproxy.service mosquitto.service kamailio.service
	prometheus.service ufw.service sslh.service libvirtd.service libvirtd.socket libvirtd-ro.socket
	libvirtd-admin.socket libvirt-guests.service virtlockd.socket virtlogd.socket)
enabled() { systemctl is-enabled --quiet "$1" 2>/dev/null; }

missing=()
for package in "${packages[@]}"; do
	dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
	echo "setup: installing with apt: ${missing[*]}"
	unused=()
	for service in "${services[@]}"; do enabled "$service" || unused+=("$service"); done
	log=$(mktemp)
	policy=/usr/sbin/policy-rc.d
	if [ -e $policy ]; then
		trap 'rm -f "$log"' EXIT
	else
		# Debian's way to install servers without starting them: the tests start their own, in namespaces.
		trap 'rm -f "$log"; as_root rm -f "$policy"' EXIT
		printf '#!/bin/sh\nexit 101\n' | as_root install -m 755 /dev/stdin $policy
	fi
	if ! { as_root apt-get update && as_root env DEBIAN_FRONTEND=noninteractive \
		apt-get install -y --no-install-recommends "${missing[@]}"; } </dev/null >"$log" 2>&1; then
		tail -20 "$log" >&2
		echo "setup: apt could not install what is missing (its words are above)" >&2
		exit 1
	fi
	# Nor are they to run after the next boot, unless they would have done so anyway.
	for service in "${unused[@]}"; do
		if enabled "$service"; then as_root systemctl --quiet disable "$service" &>/dev/null; fi
	done
fi

# The distribution's Python, since it is the one that python3-dev and python3-venv belong to.
stamp=.venv/.prepared-for
wanted=$(cat pyproject.toml <(/usr/bin/python3 -V) | sha256sum)
if [ "$(cat $stamp 2>/dev/null)" != "$wanted" ]; then
	echo "setup: preparing the Python environment in .venv"
	# Anew if there is none that works: interrupted half-way, or made for a Python that an upgrade has replaced.
	.venv/bin/pip --version &>/dev/null || /usr/bin/python3 -m venv --clear .venv
	.venv/bin/pip install -qq --disable-pip-version-check --editable '.[test]'
	echo "$wanted" >$stamp
fi
