#!/usr/bin/env bash
# Sourced by ssl.sh: the project's environment, and what every command runs under.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
venv=${ESPNET_MAMBA_VENV:-${root}/.venv}
export PATH=${venv}/bin:${PATH}
export PYTHONPATH=${root}${PYTHONPATH:+:${PYTHONPATH}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(getconf _NPROCESSORS_ONLN)}
# libgomp threads that wait sleep after a thousand turns: as fast on an idle machine (57 s of audio per second either way
# in pretraining on 2 cores), and not many times slower on a busy one.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
export THP_MEM_ALLOC_ENABLE=1 # torch: large pages for large tensors, up to half the time of a long scan
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
