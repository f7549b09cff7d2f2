"""The batch script of an array: it runs the command, passes signals on, and leaves the exit status in a file.

The file, not Slurm, says how a job ended: ``sacct`` needs an accounting database, and ``squeue`` forgets.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from espnet_mamba.recipe.jobs import Jobs, Resources, exports

MAX_RESTARTS = 100  # a job that is interrupted more often makes no progress

# Each process of a job over several: torch's env:// names. Where Slurm shows each its own GPU only, that is number 0.
RANK = r"""export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
case ${CUDA_VISIBLE_DEVICES:-,} in *,*) ;; *) LOCAL_RANK=0 ;; esac
exec "$@" """

# A node's name need not resolve, nor be split at a hyphen: Slurm is asked for the address that it uses itself.
MASTER = r"""first=$(scontrol show hostnames "${SLURM_JOB_NODELIST}" | head -n 1)
address=$(scontrol show node -o "${first}" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=${address:-${first}} MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
"""

BODY = r"""
rm -f "${rc}"
echo "# started $(date '+%Y-%m-%dT%H:%M:%S') on ${SLURM_JOB_NODELIST}, job ${SLURM_JOB_ID}, restart ${restarts}"
interrupted=
trap 'caught=yes interrupted=USR1; kill -USR1 "${child}" 2> /dev/null' USR1
trap 'caught=yes interrupted=TERM; kill -TERM "${child}" 2> /dev/null' TERM
run_command &
child=$!
while :; do # a signal ends a wait, not the child
    caught=
    wait "${child}"
    status=$?
    [ -z "${caught}" ] && break
done
echo "# ended $(date '+%Y-%m-%dT%H:%M:%S') with exit status ${status}${interrupted:+ after SIG${interrupted}}"

all_done() { for file in "${done_files[@]}"; do [ -e "${file}" ] || return 1; done; }
nodes_answer() { [ "${tasks}" -eq 1 ] || timeout 60 srun --overlap --ntasks-per-node=1 true > /dev/null 2>&1; }
if [ "${status}" -ne 0 ] || ! all_done; then
    again=
    if [ -n "${interrupted}" ]; then again="it was interrupted by SIG${interrupted}"
    elif [ "${status}" -eq 0 ] && [ "${tasks}" -gt 1 ]; then again="it stopped before its end"
    elif [ -n "${resumable}" ] && ! nodes_answer; then again="a node does not answer"
    fi
    state=$(scontrol show job -o "${SLURM_JOB_ID}" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
    # any other state: Slurm itself is about to requeue the job, or it was cancelled
    [ -n "${interrupted}" ] && [ "${state}" != RUNNING ] && exit "${status}"
    if [ -n "${again}" ] && [ -n "${resumable}" ] && [ "${restarts}" -lt MAX_RESTARTS ]; then
        echo "# requeued, since ${again}"
        scontrol requeue "${SLURM_JOB_ID}" && exit "${status}"
    fi
fi
echo "${status}" > "${rc}.tmp" && mv "${rc}.tmp" "${rc}"
exit "${status}"
"""


def rc_path(jobs: Jobs, number: int | str) -> Path:
    """Return the file that holds a job's exit status once it has ended."""
    return jobs.log.parent / "q" / f"{jobs.name}.{number}.rc"


def batch_script(jobs: Jobs, resources: Resources, folder: Path) -> str:
    """Return the script that sbatch is given; commands run in ``folder``."""
    srun = ["srun", "--export=ALL", "--kill-on-bad-exit=1", f"--ntasks={resources.tasks}"]
    srun += [f"--ntasks-per-node={resources.tasks_per_node}", "bash", "-c", RANK, "task"]
    launch = shlex.join(srun) + " " if resources.tasks > 1 else ""
    done = " ".join(shlex.quote(str(path)) for path in jobs.done)
    lines = [
        "#!/usr/bin/env bash",
        f"cd {shlex.quote(str(folder))} || exit 1",
        exports() + "number=${SLURM_ARRAY_TASK_ID:-1} restarts=${SLURM_RESTART_COUNT:-0}",
        f"rc={_with_number(str(rc_path(jobs, 'JOB')), 'JOB')}",
        f"tasks={resources.tasks} resumable={'yes' if jobs.resumable else ''}",
        f"done_files=({done if jobs.resumable else ''})",
        "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
        MASTER if resources.tasks > 1 else "",
        f"run_command() {{ exec {launch}{' '.join(_with_number(word, jobs.variable) for word in jobs.command)}; }}",
    ]
    return "\n".join(lines) + BODY.replace("MAX_RESTARTS", str(MAX_RESTARTS))


def _with_number(word: str, variable: str) -> str:
    """Quote a word for the shell, with the job's number for each ``variable`` in it."""
    parts = word.split(variable) if variable else [word]
    return '"${number}"'.join(shlex.quote(part) if part or len(parts) == 1 else "" for part in parts)
