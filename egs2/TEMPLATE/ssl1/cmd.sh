#!/usr/bin/env bash
# Sourced by ssl.sh: where jobs run. ESPnet users know the file: train_cmd runs CPU jobs, cuda_cmd training.
#   cmd_backend=slurm ./run.sh ...   conf/slurm.conf (the recipe's, else the shared one) says what jobs ask for
cmd_backend=${cmd_backend:-local}

case ${cmd_backend} in
    local) # this machine: each stage's command as it is
        train_cmd=
        cuda_cmd=
        ;;
    slurm)
        if ! command -v sbatch > /dev/null; then
            echo "error: cmd.sh: cmd_backend=slurm, but sbatch is not on this machine; run on one that submits jobs," \
                "or use cmd_backend=local" >&2
            exit 2
        fi
        slurm_conf=conf/slurm.conf # the recipe's own, else the shared one
        # shellcheck disable=SC2154 # root is path.sh's
        [ -f "${slurm_conf}" ] || slurm_conf=${root}/conf/slurm.conf
        train_cmd="${python:-python} -m espnet_mamba.bin.run_job --backend slurm --config ${slurm_conf}"
        cuda_cmd=${train_cmd}
        ;;
    *)
        echo "error: cmd.sh: cmd_backend=${cmd_backend} is not one of: local slurm" >&2
        exit 2
        ;;
esac
export train_cmd cuda_cmd
