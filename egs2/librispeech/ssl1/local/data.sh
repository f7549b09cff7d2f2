#!/usr/bin/env bash
# Stage 1: data/{train,dev,test} of LibriSpeech, 960 hours: from --corpus_dir, an unpacked copy, or fetched from
# OpenSLR into downloads/.
# utt2spk names the reader, since that is one person to the speaker tasks and probes (--speaker chapter: Kaldi's way).
# Options given here again go before these; all are listed by local/data.sh --help.
set -euo pipefail

exec python -m espnet_mamba.bin.prepare_librispeech \
    --train_parts train-clean-100 train-clean-360 train-other-500 \
    --dev_parts dev-clean dev-other \
    --test_parts test-clean "$@"
