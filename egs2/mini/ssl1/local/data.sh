#!/usr/bin/env bash
# Stage 1: data/{train,dev,test}, spoken on the spot by espeak-ng, or imported from --corpus_dir.
set -euo pipefail

help_message="usage: local/data.sh [--data_dir data] [--corpus_dir DIR] [--minutes 25] [--seed 0] [--nj 2]
  --data_dir    where train, dev and test are written
  --corpus_dir  a Kaldi-style folder to import instead: {train,dev,test}/{wav.scp,text,utt2spk
                [,phones.ctm][,words.ctm][,utt2intent][,utt2emotion]}; paths in its wav.scp are relative to it, or absolute
  --minutes     speech to make, all three sets together
  --seed        another seed, other sentences and noise
  --nj          processes that speak at a time; the result does not depend on it"

data_dir=data
corpus_dir=
minutes=25
seed=0
nj=2

while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) echo "${help_message}"; exit 0 ;;
        --data_dir | --corpus_dir | --minutes | --seed | --nj)
            [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" '%s' "$2"
            shift 2
            ;;
        *) echo "error: local/data.sh: unknown option $1" >&2; echo "${help_message}" >&2; exit 2 ;;
    esac
done

if [ -n "${corpus_dir}" ]; then
    exec python -m espnet_mamba.bin.import_corpus --corpus_dir "${corpus_dir}" --data_dir "${data_dir}"
fi
exec python -m espnet_mamba.bin.synth_corpus --out_dir "${data_dir}" --minutes "${minutes}" --seed "${seed}" --nj "${nj}"
