#!/usr/bin/env bash
# The embedded default: a small spoken corpus made on the spot, the whole path in minutes on two CPU cores.
#   ./run.sh                          all stages
#   ./run.sh --stage pretrain2 --stop_stage upstream
#   ./run.sh --corpus_dir DIR         the same stages on a corpus of your own (Kaldi-style folder)
#   ./run.sh --help                   all stages and options
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

settings=(
    --corpus mini
    --model extbimamba_tiny
    --num_clusters1 100
    --num_clusters2 200   # 20 minutes have too few frames for the papers' 500
    --target_layer 2
    --kmeans_frames 100000
    --nbpe 60
)

exec ../../TEMPLATE/ssl1/ssl.sh "${settings[@]}" "$@"
