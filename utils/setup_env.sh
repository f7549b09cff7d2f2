#!/usr/bin/env bash
# Make or reuse the environment: .venv beside this folder, or the one that ESPNET_MAMBA_VENV names, from
# requirements.lock. Needs Python 3.10-3.12 and PyPI; no root, GPU or compiler. A second call takes well under a second.
#   utils/setup_env.sh            set up
#   utils/setup_env.sh --force    install again, whatever stands
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${ESPNET_MAMBA_VENV:-${root}/.venv}
lock=${root}/requirements.lock
marker=${venv}/.espnet_mamba_lock

case ${1:-} in
    -h | --help) sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --force) rm -f "${marker}" ;;
    "") ;;
    *) echo "error: setup_env.sh: unknown option $1" >&2; exit 2 ;;
esac

if [ -x "${venv}/bin/python" ] && cmp -s "${marker}" "${lock}"; then
    exit 0
fi

find_python() { # the first interpreter that the pinned packages support
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.10 python3 python; do
        [ -n "${candidate}" ] || continue
        if "${candidate}" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2> /dev/null; then
            echo "${candidate}"
            return
        fi
    done
    echo "error: no Python 3.10, 3.11 or 3.12 found; install one, or name it: PYTHON=/path/to/python3.11 $0" >&2
    exit 2
}

if [ ! -x "${venv}/bin/python" ]; then
    interpreter=$(find_python)
    echo "setup: new environment ${venv} with $("${interpreter}" --version)"
    "${interpreter}" -m venv "${venv}"
fi
echo "setup: installing the pinned packages of requirements.lock (about 7 GB unpacked, some minutes)"
export PIP_DISABLE_PIP_VERSION_CHECK=1
# The lock is complete, so nothing is resolved; packages without a wheel are pure Python and build with these two.
"${venv}/bin/python" -m pip install -q --no-deps "setuptools==73.0.1" "wheel==0.45.1"
"${venv}/bin/python" -m pip install -q --no-deps --no-build-isolation -r "${lock}"
"${venv}/bin/python" -m pip install -q --no-deps --no-build-isolation -e "${root}"
cp "${lock}" "${marker}"
echo "setup: done"
