#!/bin/sh
# Entry of the installation: finds (or installs) a Python that can make virtual environments, hands over to it.
set -eu

if [ "$(id -u)" -ne 0 ]; then
    echo "setup: run as root (it installs packages and tries CRIU, both of which need it)" >&2
    exit 1
fi
cd "$(dirname "$(readlink -f "$0")")/.."

find_python() {
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
}

if ! python=$(find_python); then
    if command -v apt-get >/dev/null; then
        echo "setup: installing python3 and python3-venv ..." >&2
        export DEBIAN_FRONTEND=noninteractive
        apt-get -qq update >&2 || true
        apt-get -qq install --yes --no-install-recommends python3 python3-venv >/dev/null </dev/null || true
    fi
    if ! python=$(find_python); then
        echo "setup: needs Python 3.11 or newer with its venv module: install python3.11 and python3.11-venv" >&2
        exit 1
    fi
fi
exec "$python" -m setup.install "$@"
