#!/usr/bin/env bash
# Stage 1 of this recipe: write data/train, data/dev and data/test. Edit the part marked EDIT HERE.
#
# Each of the three folders must hold these tables: UTF-8, one line per recording, first the utterance id, then a space:
#
#   wav.scp     id path            audio file: 16 kHz, mono, WAV, FLAC or Ogg; path absolute, or relative to the set's
#                                  folder, to the data folder or to this recipe; no pipes; names may hold spaces
#   text        id WORDS ...       the transcript
#   utt2spk     id speaker         who speaks; test speakers should not be in train
#   phones.ctm  id 1 start duration phone      optional; seconds, one line per phone, silence is `sil`:
#                                  gives phone purity of targets and of layers
#   words.ctm   id 1 start duration WORD       optional; seconds, one line per word of text, in its order and
#                                  spelling; pauses are left out: gives examples of single words
#   utt2intent  id action object place number  optional; one token per slot, `none` where a slot is absent:
#                                  gives the intent head
#   utt2emotion id emotion         optional; one label, also read from utt2emo: how far layers tell emotions apart
#
# An id is in all tables of its set or in none, once, has no spaces, and should begin with its speaker.
# To bring audio to 16 kHz mono: sox IN -r 16000 -c 1 -b 16 OUT.flac
# Stage 2 checks all of this and names what is wrong.
set -euo pipefail

data_dir=data
corpus_dir=
# Unused until the part below is written.
# shellcheck disable=SC2034
minutes=
# shellcheck disable=SC2034
seed=0
# shellcheck disable=SC2034
nj=2

while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        --data_dir | --corpus_dir | --minutes | --seed | --nj)
            [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" '%s' "$2"
            shift 2
            ;;
        *) echo "error: local/data.sh: unknown option $1; see local/data.sh --help" >&2; exit 2 ;;
    esac
done

# A folder {train,dev,test}/{wav.scp,text,utt2spk,...} that stands already needs no code: --corpus_dir imports it.
if [ -n "${corpus_dir}" ]; then
    exec python -m espnet_mamba.bin.import_corpus --corpus_dir "${corpus_dir}" --data_dir "${data_dir}"
fi

# EDIT HERE: remove the two lines below and write ${data_dir}/{train,dev,test}.
# Further settings of yours: ${minutes} (how much of the corpus), ${seed}, ${nj} (processes at a time).
echo "error: local/data.sh is still the skeleton: edit it (its head says what to write) or give --corpus_dir DIR" >&2
exit 2
