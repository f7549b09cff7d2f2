#!/usr/bin/env bash
# Stage 1: data/{train,dev,test} of Mini LibriSpeech: from --corpus_dir, an unpacked copy, or fetched from
# OpenSLR into downloads/.
# The test set is LibriSpeech's test-clean, since the mini form has none.
# utt2spk names the reader, since that is one person to the speaker tasks and probes (--speaker chapter: Kaldi's way).
# Options given here again go before these; all are listed by local/data.sh --help.
set -euo pipefail

exec python -m espnet_mamba.bin.prepare_librispeech \
    --train_parts train-clean-5 \
    --dev_parts dev-clean-2 \
    --test_parts test-clean "$@"
