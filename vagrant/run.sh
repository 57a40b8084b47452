#!/bin/bash
# Brings the lab up, runs tests/lab on its first client, and destroys it: run.sh [--keep] [PYTEST-ARG...]
#
#   --keep    leave the machines running: `vagrant ssh gateway`, and again run.sh, which then only tests
#   LAB_DEB   the package to install, from `make deb`; if not given, the gateway builds its own from this checkout
#   LAB_BOX, LAB_DRIVER, VAGRANT_DEFAULT_PROVIDER   as README.md says
#
# Exit status: pytest's. Interrupted, it destroys the machines, too.
set -euo pipefail
cd "$(dirname "$0")"

keep=no
if [ "${1:-}" = --keep ]; then keep=yes; shift; fi

LAB_DIR=${LAB_DIR:-$PWD/.lab}
export LAB_DIR
mkdir -p "$LAB_DIR"
[ -e "$LAB_DIR/key" ] || ssh-keygen -q -t ed25519 -N '' -C steerd-lab -f "$LAB_DIR/key"
rm -f "$LAB_DIR/steerd.deb"
[ -z "${LAB_DEB:-}" ] || cp "$LAB_DEB" "$LAB_DIR/steerd.deb"

# shellcheck disable=SC2317 # it is called, by the trap
destroy() { [ "$keep" = yes ] || vagrant destroy --force; }
trap destroy EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

vagrant up
echo "run.sh: all machines are up and provisioned"
arguments=''
[ $# = 0 ] || arguments=$(printf ' %q' "$@")
status=0
vagrant ssh client -- sudo env STEERD_LAB=1 LAB_EMULATED="$([ "${LAB_DRIVER:-}" = qemu ] && echo 1)" \
	bash -c "'cd /vagrant && exec /opt/lab/bin/python -m pytest -v -p no:cacheprovider tests/lab$arguments'" || status=$?
exit $status
