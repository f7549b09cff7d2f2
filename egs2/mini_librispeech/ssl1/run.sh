#!/usr/bin/env bash
# Mini LibriSpeech, 5 hours: ExtBiMamba Small, about a day on one GPU (an estimate, see conf/pretrain).
#   ./run.sh                          all stages, fetching 0.8 GB first
#   ./run.sh --corpus_dir DIR         the same on an unpacked copy, DIR/train-clean-5/<reader>/<chapter>/*.flac
#   ./run.sh --help                   all stages and options
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

settings=(
    --corpus mini_librispeech
    --corpus_dir_is own
    --ngpu 1
    --model extbimamba_small
    --pretrain1_config mini_librispeech_it1
    --pretrain2_config mini_librispeech_it2
    --num_clusters1 100
    --num_clusters2 500
    --target_layer 6
    --kmeans_frames 1000000  # more than half of it; 1.5 GB at 384 dimensions
    --nbpe 300
)

exec ../../TEMPLATE/ssl1/ssl.sh "${settings[@]}" "$@"
