#!/usr/bin/env bash
# LibriSpeech, 960 hours: by default paper 2's Mamba Base. ../README.md has the commands of both papers' models.
#   ./run.sh                          all stages, fetching about 61 GB first
#   ./run.sh --corpus_dir DIR         the same on an unpacked copy, DIR/train-clean-100/<reader>/<chapter>/*.flac
#   ./run.sh --help                   all stages and options
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

settings=(
    --corpus librispeech
    --corpus_dir_is own
    --ngpu 1
    --model mamba_base_paper
    --pretrain1_config paper2_base_it1
    --pretrain2_config paper2_base_it2
    --num_clusters1 100
    --num_clusters2 500
    --target_layer 6
    --kmeans_frames 2000000  # 6 GB at 768 dimensions; paper 2: all, then a tenth of the hours (17 million)
    --nbpe 5000
)

exec ../../TEMPLATE/ssl1/ssl.sh "${settings[@]}" "$@"
