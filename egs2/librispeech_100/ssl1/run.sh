#!/usr/bin/env bash
# LibriSpeech's 100 hours: ExtBiMamba Small, about a day on one GPU (an estimate, see conf/pretrain).
#   ./run.sh                          all stages, fetching 7 GB first
#   ./run.sh --corpus_dir DIR         the same on an unpacked copy, DIR/train-clean-100/<reader>/<chapter>/*.flac
#   ./run.sh --help                   all stages and options
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

settings=(
    --corpus librispeech_100
    --corpus_dir_is own
    --ngpu 1
    --model extbimamba_small
    --pretrain1_config librispeech_100_it1
    --pretrain2_config librispeech_100_it2
    --num_clusters1 100
    --num_clusters2 500
    --target_layer 6
    --kmeans_frames 2000000  # 3 GB at 384 dimensions
    --nbpe 1000
)

exec ../../TEMPLATE/ssl1/ssl.sh "${settings[@]}" "$@"
