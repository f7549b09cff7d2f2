#!/usr/bin/env bash
# Sourced by ssl.sh: the project's environment, and what every command runs under.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
venv=${ESPNET_MAMBA_VENV:-${root}/.venv}
export PATH=${venv}/bin:${PATH}
export PYTHONPATH=${root}${PYTHONPATH:+:${PYTHONPATH}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(getconf _NPROCESSORS_ONLN)}
export THP_MEM_ALLOC_ENABLE=1 # torch: large pages for large tensors, up to half the time of a long scan
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
