#!/usr/bin/env bash
# The recipe engine: HuBERT pretraining with Mamba encoders, from recorded speech to layer plots, in 13 stages.
# A recipe's run.sh calls it from its own folder. stages.tsv says what each stage needs and makes; a stage here is
# one command, which `run_stage` skips when it is done.
# shellcheck disable=SC2034 # the --skip_<group> options are read by name
set -euo pipefail

template=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "${template}/../../.." && pwd)
table=${template}/stages.tsv

# General
stage=1                # First stage to run: a number or a name.
stop_stage=report      # Last stage to run: a number or a name.
skip_data_prep=false   # Skip stages 1 and 2.
skip_train=false       # Skip stages 3 to 8.
skip_eval=false        # Skip stages 9 to 13.
ngpu=0                 # GPUs for training; 0 trains on the CPU.
nproc=1                # CPU processes per machine for pretraining (DDP); only with --ngpu 0.
num_nodes=1            # Machines for pretraining; more than one with cmd_backend=slurm.
nj=3                   # Processes of a stage; cores of each process of a Slurm job. Never changes a result.
max_jobs=0             # With cmd_backend=slurm: jobs of an array at a time; 0: no limit.
job_args=              # With cmd_backend=slurm: more options for every job, such as "--mem 16G --time 1-00:00:00".
python=python          # Interpreter.
seed=0                 # Seed of everything that draws.

# Where
corpus=                # Name in folder names; by default the recipe's, or --corpus_dir's.
corpus_dir=            # A Kaldi-style folder {train,dev,test}/{wav.scp,text,utt2spk[,phones.ctm,words.ctm]} to use instead.
corpus_dir_is=lists    # lists: such a folder, of another corpus. own: the recipe's own corpus, unpacked; names stay.
datadir=               # Raw lists; by default data, or data_<corpus> with --corpus_dir.
dumpdir=               # Checked lists; by default dump, or dump_<corpus> with --corpus_dir.
expdir=exp             # Experiments.

# Data (stages 1, 2)
minutes=25             # Minutes of speech to make, where the recipe makes its own.
bad_audio=refuse       # refuse: list every bad file and stop; skip: leave them out and list them.
shard_dir=             # Folder for the checked audio in tar shards, which NFS and Lustre like; by default files stay files.
data_args=             # More options for local/data.sh, such as "--alignments_dir DIR".

# Targets and pretraining (stages 3 to 7)
model=extbimamba_tiny  # A file of conf/models or conf/ssamba, without .yaml.
num_clusters1=100      # Classes of iteration 1 (MFCC).
num_clusters2=500      # Classes of iteration 2.
target_layer=6         # Layer of iteration 1 that iteration 2's classes come from.
kmeans_frames=500000   # Frames that k-means is fitted on.
targets_nj=1           # Jobs of stages 3 and 5: processes here, or a Slurm array. Never changes a result.
pretrain1_config=tiny_it1  # A file of conf/pretrain.
pretrain2_config=      # A file of conf/pretrain; by default tiny_it2, or ssamba_tiny for an SSAMBA model.
pretrain_args=         # More options for both, such as "--max_steps 20".
variant=               # More in the names from iteration 2 on, such as "layer9": several on one iteration 1.

# Downstream (stages 8 to 10)
asr_config=train_conformer_tiny  # A file of conf/asr.
decode_config=decode   # A file of conf/asr.
nbpe=60                # Sentencepiece tokens.
asr_args=              # More options for ESPnet's training, such as "--max_epoch 2".
superb_config=tiny     # A file of conf/superb.
superb_task=auto       # ks, ic, sid, or auto: ks where word times are known, else ic with intents, else sid.
superb_args=           # More options for the SUPERB command.

# Analysis and efficiency (stages 11, 12)
analysis_config=mini   # A file of conf/analysis.
analysis_args=         # More options for the analysis command.
efficiency_seconds="1 2 5 10 20"  # Lengths of audio to measure, in seconds.
efficiency_models=     # Names of conf/models or peers to measure beside the upstream, such as "transformer_base".
efficiency_minutes=10  # What would take longer in all is left out, and said.
efficiency_args=       # More options for the efficiency command.

log() { echo "$(date '+%Y-%m-%dT%H:%M:%S') $*"; }
fail() { echo "error: $*" >&2; exit 2; }

option_names() { sed -n 's/^\([a-z_0-9]*\)=[^#]*# .*/\1/p' "${BASH_SOURCE[0]}"; }
stage_names() { awk -F'\t' 'NR > 1 { print $2 }' "${table}"; }

usage() {
    echo "Usage: ./run.sh [--option value] ..."
    echo
    echo "Stages (--stage and --stop_stage take a number or a name; --skip_<name> true skips one):"
    awk -F'\t' 'NR > 1 { printf "  %2d  %-11s %s\n", $1, $2, $7 }' "${table}"
    echo
    echo "Options and their defaults here:"
    local name
    for name in $(option_names); do
        printf '  --%-20s %s (default: %s)\n' "${name}" \
            "$(sed -n "s/^${name}=[^#]*# //p" "${BASH_SOURCE[0]}" | head -1)" "${!name:-none}"
    done
}

nearest() { # nearest WORD CANDIDATE...: the candidate that looks most like WORD, by shared letters
    python3 - "$@" <<'PY' 2>/dev/null || true
import difflib, sys
match = difflib.get_close_matches(sys.argv[1], sys.argv[2:], n=1)
print(f"; did you mean --{match[0]}?" if match else "")
PY
}

skipped=" "
parse_options() {
    local name value known
    known=" $(option_names | tr '\n' ' ') "
    while [ $# -gt 0 ]; do
        [[ $1 == -h || $1 == --help ]] && { usage; exit 0; }
        [[ $1 == --* ]] || fail "unexpected argument '$1'; options start with --"
        name=${1#--}
        if [[ ${name} == *=* ]]; then
            value=${name#*=} name=${name%%=*}
            shift
        else
            [ $# -ge 2 ] || fail "--${name} needs a value"
            value=$2
            shift 2
        fi
        name=${name//-/_}
        if [[ ${known} == *" ${name} "* ]]; then
            printf -v "${name}" '%s' "${value}"
        elif [[ ${name} == skip_* ]] && stage_names | grep -qx "${name#skip_}"; then
            [[ ${value} == true ]] && skipped+="${name#skip_} "
        else
            # shellcheck disable=SC2046
            fail "unknown option --${name}$(nearest "${name}" $(option_names) $(stage_names | sed 's/^/skip_/'))"
        fi
    done
}

number_of() { # number_of STAGE: its number, whether STAGE is a number or a name
    local number
    number=$(awk -F'\t' -v s="$1" 'NR > 1 && ($1 == s || $2 == s) { print $1 }' "${table}")
    [ -n "${number}" ] || fail "no stage '$1'; stages: $(awk -F'\t' 'NR > 1 { printf "%d=%s ", $1, $2 }' "${table}")"
    echo "${number}"
}

parse_options "$@"
first=$(number_of "${stage}")
last=$(number_of "${stop_stage}")

if [ -n "${corpus_dir}" ]; then
    # run.sh has changed to its own folder; a path may be meant from where the user stands
    if [ ! -d "${corpus_dir}" ] && [ -d "${OLDPWD:-.}/${corpus_dir}" ]; then corpus_dir=${OLDPWD}/${corpus_dir}; fi
    [ -d "${corpus_dir}" ] || fail "--corpus_dir ${corpus_dir}: no such folder"
    case ${corpus_dir_is} in
        own) ;;
        lists)
            corpus=$(basename "$(cd "${corpus_dir}" && pwd)")
            : "${datadir:=data_${corpus}}" "${dumpdir:=dump_${corpus}}"
            ;;
        *) fail "--corpus_dir_is ${corpus_dir_is}: not lists or own" ;;
    esac
fi
: "${corpus:=$(basename "$(dirname "${PWD}")")}" "${datadir:=data}" "${dumpdir:=dump}"

# Names that stages.tsv refers to
tag=${model}_${corpus}
conf=${root}/conf
targets1=${expdir}/targets_${corpus}_it1
pretrain1=${expdir}/pretrain_${tag}_it1
tag=${tag}${variant:+_${variant}}
tagdir=${expdir}/${tag}
targets2=${expdir}/targets_${tag}_it2
pretrain2=${expdir}/pretrain_${tag}_it2
upstream=${expdir}/upstream_${tag}
upstream_random=${expdir}/upstream_${tag}_random
asr_dir=${expdir}/asr_${tag}
superb_dir=${expdir}/superb_${tag}
analysis_dir=${expdir}/analysis_${tag}
efficiency_dir=${expdir}/efficiency_${model}

kind=hubert
model_yaml=${conf}/models/${model}.yaml
if [ ! -f "${model_yaml}" ]; then
    kind=ssamba
    model_yaml=${conf}/ssamba/${model}.yaml
    targets1='' pretrain1='' targets2='' # empty: this run has no such thing, and no stage needs it
fi
# shellcheck disable=SC2046
[ -f "${model_yaml}" ] || fail "unknown model '${model}'$(nearest "${model}" \
    $(basename -s .yaml "${conf}"/models/*.yaml "${conf}"/ssamba/*.yaml) | sed 's/--//')"
if [ "${kind}" = ssamba ]; then : "${pretrain2_config:=ssamba_tiny}"; fi
: "${pretrain2_config:=tiny_it2}"
export datadir dumpdir tagdir targets1 pretrain1 targets2 pretrain2 upstream upstream_random asr_dir superb_dir \
    analysis_dir efficiency_dir

if [ -z "${ESPNET_MAMBA_NO_SETUP:-}" ]; then
    "${root}/utils/setup_env.sh"
fi
# shellcheck source=egs2/TEMPLATE/ssl1/path.sh
. ./path.sh
# shellcheck source=egs2/TEMPLATE/ssl1/cmd.sh
. ./cmd.sh

if [ "${num_nodes}" -gt 1 ] && [ -z "${cuda_cmd}" ]; then
    fail "--num_nodes ${num_nodes}: cmd_backend=local is one machine; use cmd_backend=slurm ./run.sh ..."
fi

run_by() { # run_by "LAUNCHER" NAME COMMAND...: the stage NAME is COMMAND, run by LAUNCHER where there is one
    local launcher=$1 name=$2
    shift 2
    "${python}" -m espnet_mamba.bin.run_stage --table "${table}" --stage "${name}" --record_dir "${tagdir}/stages" \
        ${launcher:+--launcher "${launcher} --num_threads ${nj} --max_jobs ${max_jobs} ${job_args}"} -- "$@"
}
run() { run_by "${train_cmd}" "$@"; }                          # a job of one process
processes() { if [ "${ngpu}" -gt 0 ]; then echo "${ngpu}"; else echo "${nproc}"; fi; }
run_training() { # processes on machines, each with its GPU
    run_by "${cuda_cmd:+${cuda_cmd} --gpu ${ngpu} --num_nodes ${num_nodes} --tasks_per_node $(processes)}" "$@"
}
module() { echo "${python} -m espnet_mamba.bin.$1"; }

train_launcher() { # train_launcher MODULE: one process, or one of srun's, ESPnet's own spawn over GPUs, or torchrun's
    if [ -n "${cuda_cmd}" ]; then
        echo "$(module "$1") --ngpu $((ngpu > 0))$([ "${ngpu}" -gt 0 ] || echo " --dist_backend gloo")"
    elif [ "${ngpu}" -gt 1 ]; then
        echo "$(module "$1") --ngpu ${ngpu} --multiprocessing_distributed true"
    elif [ "${ngpu}" -eq 0 ] && [ "${nproc}" -gt 1 ]; then
        echo "torchrun --standalone --nproc_per_node ${nproc} -m espnet_mamba.bin.$1 --ngpu 0 --dist_backend gloo"
    else
        echo "$(module "$1") --ngpu ${ngpu}"
    fi
}

pretrain() { # pretrain STAGE CONFIG TARGETS OUTPUT LABEL_RATE NUM_CLASSES
    local raw=${dumpdir}/raw
    # shellcheck disable=SC2046,SC2086
    run_training "$1" $(train_launcher hubert_train) --config "${conf}/pretrain/$2.yaml" --model "${model_yaml}" \
        --output_dir "$4" --label_rate "$5" --num_classes "$6" --seed "${seed}" \
        --train_data_path_and_name_and_type "${raw}/train/wav.scp,speech,sound" \
        --train_data_path_and_name_and_type "$3/train.npy,labels,frame_labels" \
        --valid_data_path_and_name_and_type "${raw}/dev/wav.scp,speech,sound" \
        --valid_data_path_and_name_and_type "$3/dev.npy,labels,frame_labels" \
        --train_shape_file "${raw}/train/utt2num_samples" --valid_shape_file "${raw}/dev/utt2num_samples" \
        ${pretrain_args}
}

pretrain_ssamba() { # its one iteration: no labels
    local raw=${dumpdir}/raw
    # shellcheck disable=SC2046,SC2086
    run_training pretrain2 $(train_launcher ssamba_train) --config "${conf}/pretrain/${pretrain2_config}.yaml" \
        --model "${model_yaml}" --output_dir "${pretrain2}" --seed "${seed}" \
        --train_data_path_and_name_and_type "${raw}/train/wav.scp,speech,sound" \
        --valid_data_path_and_name_and_type "${raw}/dev/wav.scp,speech,sound" \
        --train_shape_file "${raw}/train/utt2num_samples" --valid_shape_file "${raw}/dev/utt2num_samples" \
        ${pretrain_args}
}

device() { if [ "${ngpu}" -gt 0 ]; then echo cuda; else echo cpu; fi; }
systems() { echo "--system pretrained=${upstream} --system random=${upstream_random} --system fbank=$1"; }

stage_data() {
    # shellcheck disable=SC2086
    run data local/data.sh --data_dir "${datadir}" --minutes "${minutes}" --seed "${seed}" --nj "${nj}" \
        ${corpus_dir:+--corpus_dir "${corpus_dir}"} ${data_args}
}
stage_check() {
    run check "${python}" -m espnet_mamba.bin.check_data --data_dir "${datadir}" --dump_dir "${dumpdir}/raw" \
        --sets train dev test --bad_audio "${bad_audio}" --nj "${nj}" \
        ${shard_dir:+--shard_dir "${shard_dir}"}
}
targets() { # targets STAGE LAUNCHER OPTION...: labels by one job, or by targets_nj jobs that share the corpus
    local name=$1 launcher=$2 threads=${nj} at_a_time=${max_jobs}
    shift 2
    set -- "${python}" -m espnet_mamba.bin.make_targets --dump_dir "${dumpdir}/raw" --max_frames "${kmeans_frames}" \
        --seed "${seed}" "$@"
    if [ "${targets_nj}" -eq 1 ]; then
        run_by "${launcher}" "${name}" "$@" --num_threads "${nj}"
        return
    fi
    if [ -z "${launcher}" ]; then # processes of one thread each, as many at a time as there are cores or GPUs
        launcher="${python} -m espnet_mamba.bin.run_job --backend local" threads=1
        if [ "${max_jobs}" -eq 0 ] && [[ " $* " == *" --device cuda "* ]]; then at_a_time=${ngpu}; fi
    fi
    run_by "" "${name}" "$@" --num_threads "${threads}" --nj "${targets_nj}" \
        --launcher "${launcher} --num_threads ${threads} --max_jobs ${at_a_time} ${job_args}"
}
stage_targets1() {
    targets targets1 "${train_cmd}" --out_dir "${targets1}" --features mfcc100 --num_clusters "${num_clusters1}"
}
stage_pretrain1() {
    pretrain pretrain1 "${pretrain1_config}" "${targets1}" "${pretrain1}" 100 "${num_clusters1}"
}
stage_targets2() { # on one GPU a job, if there are any
    targets targets2 "${cuda_cmd:+${cuda_cmd} --gpu $((ngpu > 0))}" --out_dir "${targets2}" \
        --features "${pretrain1}/valid.loss.best" --layer "${target_layer}" --num_clusters "${num_clusters2}" \
        --device "$(device)"
}
stage_pretrain2() {
    if [ "${kind}" = ssamba ]; then
        pretrain_ssamba
        return
    fi
    pretrain pretrain2 "${pretrain2_config}" "${targets2}" "${pretrain2}" 50 "${num_clusters2}"
}
stage_upstream() {
    run upstream "${python}" -m espnet_mamba.bin.export_upstream --model_dir "${pretrain2}/valid.loss.best" \
        --out_dir "${upstream}" --random_dir "${upstream_random}" --check_set "${dumpdir}/raw/dev" --seed "${seed}"
}
stage_asr_train() {
    # shellcheck disable=SC2046,SC2086
    run asr_train "${python}" -m espnet_mamba.bin.asr_train --config "${conf}/asr/${asr_config}.yaml" \
        --dump_dir "${dumpdir}/raw" --out_dir "${asr_dir}" $(systems logmel) --nbpe "${nbpe}" --nj "${nj}" ${asr_args}
}
stage_asr_decode() {
    run asr_decode "${python}" -m espnet_mamba.bin.asr_decode --config "${conf}/asr/${decode_config}.yaml" \
        --dump_dir "${dumpdir}/raw" --asr_dir "${asr_dir}" --nj "${nj}"
}
stage_superb() {
    # shellcheck disable=SC2046,SC2086
    run superb "${python}" -m espnet_mamba.bin.superb --config "${conf}/superb/${superb_config}.yaml" \
        --task "${superb_task}" --dump_dir "${dumpdir}/raw" --out_dir "${superb_dir}" $(systems fbank) \
        --nj "${nj}" ${superb_args}
}
stage_analysis() {
    # shellcheck disable=SC2046,SC2086
    run analysis "${python}" -m espnet_mamba.bin.analyse --config "${conf}/analysis/${analysis_config}.yaml" \
        --dump_dir "${dumpdir}/raw" --train_set dev --test_set test --out_dir "${analysis_dir}" $(systems logmel) \
        --seed "${seed}" ${analysis_args}
}
stage_efficiency() {
    # shellcheck disable=SC2086
    run efficiency "${python}" -m espnet_mamba.bin.efficiency --upstream "${upstream}" --out_dir "${efficiency_dir}" \
        --seconds ${efficiency_seconds} --minutes "${efficiency_minutes}" \
        ${efficiency_models:+--models ${efficiency_models}} ${efficiency_args}
}
stage_report() {
    run report "${python}" -m espnet_mamba.bin.report --tag "${tag}" --out_dir "${tagdir}" \
        --stages_dir "${tagdir}/stages" --targets ${targets1:+"${targets1}"} ${targets2:+"${targets2}"} \
        --pretrain ${pretrain1:+"${pretrain1}"} "${pretrain2}" --asr_dir "${asr_dir}" --superb_dir "${superb_dir}" \
        --analysis_dir "${analysis_dir}" --efficiency_dir "${efficiency_dir}" \
        --config "${model_yaml}" ${pretrain1:+"${conf}/pretrain/${pretrain1_config}.yaml"} \
        "${conf}/pretrain/${pretrain2_config}.yaml" "${conf}/asr/${asr_config}.yaml"
}

while IFS=$'\t' read -r number name group _; do
    if [ "${number}" -lt "${first}" ] || [ "${number}" -gt "${last}" ]; then continue; fi
    group_skip=skip_${group}
    if [[ ${skipped} == *" ${name} "* || ${!group_skip} == true ]]; then
        log "stage ${number} (${name}): skipped, as asked"
        continue
    fi
    if [ "${kind}" = ssamba ] && [[ " targets1 pretrain1 targets2 " == *" ${name} "* ]]; then
        echo "stage ${number} (${name}): not needed, since SSAMBA predicts patches and has no targets; skipped"
        continue
    fi
    "stage_${name}" < /dev/null
done < <(tail -n +2 "${table}")
log "stages ${first} to ${last} are done; results: ${tagdir}"
