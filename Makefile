# What a checkout can do. Every target prepares the machine itself (tests/setup.sh: packages by apt, a virtual
# environment in .venv) and asks for sudo where root is needed; `make demo` on a fresh machine is enough.

SHELL = /bin/bash
PYTHON = .venv/bin/python
SUDO = $(if $(filter 0,$(shell id -u)),,sudo)
# An ordinary user's PATH has no sbin, where nft and sysctl are.
export PATH := $(PATH):/usr/sbin:/sbin
# As root, and leaving no files of root behind in the checkout (byte code, caches).
AS_ROOT = $(SUDO) env PYTHONDONTWRITEBYTECODE=1 PYTEST_ADDOPTS="-p no:cacheprovider" PATH="$$PATH"

.PHONY: help setup compiled setup-programs setup-bench setup-packages setup-lab deb wheel man lock test-packages test-matrix lab test-long demo test lint unit netns test-vm bench bench-plots clean

help:
	@echo "make demo             70,000 daemons (listening sockets) and 3,200 names (TLS, HTTP, QUIC, DNS) behind one address, each reached and checked; in less than a minute"
	@echo "make test             linters, types, unit, property and namespace tests, and test-matrix"
	@echo "make bench [ONLY=x]   benchmarks (STEERD_BENCH_QUICK=1: only whether they work); figures and plots into tests/bench/results"
	@echo "make bench-plots      the plots again, from the figures that are there"
	@echo "make test-vm [KERNEL=x]  the tests that run on a stock kernel, under emulation"
	@echo "make test-matrix      the same on the oldest, a middle and the newest kernel; one line for each"
	@echo "make deb wheel        a Debian package, a wheel; both into build/"
	@echo "make test-packages    the package in a clean Debian with systemd: start to purge, under load"
	@echo "make lab              a gateway and two clients, by Vagrant and under emulation: every way in, restarts, upgrade, reboot"
	@echo "make man              the manual pages anew, after a change of commands or of configuration keys"
	@echo "make lock             requirements.lock anew: the libraries of a release, with hashes"
	@echo "make test-long        transfers of 1 GB through loss and reordering, a minute of reloads under load"
	@echo "make lint unit netns  parts of 'make test'"
	@echo "make clean            remove .venv and caches"

setup:
	@tests/setup.sh

setup-programs:
	@tests/setup.sh programs

setup-bench:
	@tests/setup.sh bench

setup-packages:
	@tests/setup.sh packages

setup-lab:
	@tests/setup.sh lab

deb: setup-packages
	@release/deb

wheel: setup
	@PYTHON=$(CURDIR)/$(PYTHON) release/wheel

man: setup
	.venv/bin/python -m steerd.cli.man

lock: setup
	release/lock

demo: setup
	@$(AS_ROOT) $(PYTHON) -m tests.demo

test: lint unit netns test-matrix

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	shellcheck -x release/deb release/wheel release/lock release/debian/p* nft/install.sh tests/setup.sh .ci/run tests/vm/run tests/vm/pytest tests/vm/matrix tests/vm/fetch-kernel tests/vm/guest-setup vagrant/build-box vagrant/lab vagrant/network vagrant/provision vagrant/run.sh

unit: setup
	$(PYTHON) -m pytest -q tests/unit tests/property

# So that not every process of a test, under emulation least of all, compiles what it imports: root writes no byte code.
compiled: setup
	@$(PYTHON) -m compileall -q steerd tests

netns: setup-programs compiled
	$(AS_ROOT) $(PYTHON) -m pytest -q tests/netns

test-long: setup-programs compiled
	$(AS_ROOT) env STEERD_LONG=1 $(PYTHON) -m pytest -q --timeout 3600 tests/netns/test_late_transfers.py tests/netns/test_reload.py

test-vm: compiled
	$(AS_ROOT) $(if $(KERNEL),KERNEL=$(KERNEL)) tests/vm/pytest

test-packages: setup-packages
	$(AS_ROOT) $(PYTHON) -m pytest -q tests/packages

test-matrix: compiled
	$(AS_ROOT) tests/vm/matrix

lab: setup-lab
	@$(AS_ROOT) vagrant/lab

bench: setup-bench
	@$(AS_ROOT) $(if $(STEERD_BENCH_QUICK),STEERD_BENCH_QUICK=1) $(PYTHON) -m tests.bench $(ONLY)

bench-plots: setup
	@$(PYTHON) -m tests.bench --plots

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
