# shellcheck shell=bash
# What run and fetch-kernel share. To be sourced; sets nothing but these functions and PATH.

PATH=$PATH:/usr/sbin:/sbin # depmod and modprobe live there, and a root shell made by `su` does not look there

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
  say "$*"
  exit 125
}

# install_missing COMMAND=PACKAGE...: installs the packages whose command is not there yet.
install_missing() {
  local pair packages=()
  for pair; do
    command -v "${pair%%=*}" >/dev/null || packages+=("${pair#*=}")
  done
  [ ${#packages[@]} -gt 0 ] || return 0
  [ "$(id -u)" = 0 ] || die "these packages are missing and only root may install them: ${packages[*]}"
  say "installing ${packages[*]}"
  local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
  local log
  # a source that cannot be reached (a third party's, say) does not matter if the packages come from another
  log=$("${apt[@]}" update 2>&1) || true
  log+=$("${apt[@]}" install -y --no-install-recommends "${packages[@]}" 2>&1) || {
    printf '%s\n' "$log" >&2
    die "apt-get could not install: ${packages[*]}"
  }
}
