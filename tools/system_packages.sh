#!/usr/bin/env bash
# The programs that the slow tests drive, from the packages of Debian or Ubuntu, where they are not there yet: as root.
set -euo pipefail

wanted=()
command -v chromium >/dev/null || wanted+=(chromium)
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || wanted+=(postgresql)
command -v systemd-analyze >/dev/null || wanted+=(systemd)
command -v make >/dev/null || wanted+=(make)
"${PYTHON:-python3}" -c 'import ensurepip' 2>/dev/null || wanted+=(python3-venv)
[ ${#wanted[@]} -gt 0 ] || exit 0

echo "apt-get install ${wanted[*]}"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt-get update -qq
apt-get install -qq -y --no-install-recommends "${wanted[@]}" >"$log" 2>&1 || { tail -n 40 "$log"; exit 1; }
