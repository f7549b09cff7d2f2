#!/usr/bin/env bash
# Sourced by ssl.sh: where jobs run. ESPnet users know the file: train_cmd runs CPU jobs, cuda_cmd training.
cmd_backend=${cmd_backend:-local}

case ${cmd_backend} in
    local)
        train_cmd=
        cuda_cmd=
        ;;
    *)
        echo "error: cmd.sh: cmd_backend=${cmd_backend} is not one of: local" >&2
        exit 2
        ;;
esac
export train_cmd cuda_cmd
