"""Whole training steps side by side: ours, the same model with other people's scans, Transformers; and whole runs.

A step is the trainer's own: masks, forward, backward, clipping, fused AdamW, on crops of one length. A run (--runs) is
the training command on noise in FLAC, as users start it, read from its own log: with loader, workers and logging.

For example: python benchmarks/bench_train.py --threads 2 --output train.md
             python benchmarks/bench_train.py --device cuda --runs --output train_gpu.md
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from timing import Times, machine, number, peak_memory, release_memory, table, time_interleaved
from train_candidates import (
    FRAMES_PER_SECOND,
    MODELS,
    SAMPLE_RATE,
    Work,
    build_step,
    config_of,
    names_of,
    reference_scan,
    refusal,
)

from espnet_mamba.train.mfu import peak_flops, step_flops

ROOT = Path(__file__).resolve().parents[1]
STEP = "step"
AIMS = {"mamba": 0.25, "transformer": 0.35}  # MFU of Base on an H100 or H200
DEFAULT_WORK = {"cpu": ["tiny,4,5", "base,1,4"], "cuda": ["base,0,15.6", "base,0,60"]}
UTTERANCES = 96  # of a run's corpus, read again and again


def steps(work: Work, args: argparse.Namespace) -> str:
    """Time the candidates at one shape; return a table, the reasons of those left out, and the aims."""
    jobs, notes = {}, []
    for name in names_of(args.models):
        reason = refusal(name, work)
        try:
            if not reason:
                jobs[name] = build_step(name, work)
        except Exception as error:  # a peer of another version must not end the benchmark of the others
            reason = f"{type(error).__name__}: {str(error)[:120]}"
        if reason:
            notes.append(f"- {name}: left out; {reason}")
    times = time_interleaved(jobs, STEP, args.rounds, work.device, args.seconds_per_candidate)
    losses = {name: job.first_loss for name, job in jobs.items()}
    jobs.clear()
    release_memory()  # what is weighed next has a process of its own
    ours = times["mamba, ours"].median if "mamba, ours" in times else float("nan")
    rows = []
    for name, at in times.items():
        if not at.seconds:
            notes.append(f"- {name}: {at.note}")
            continue
        memory = {} if args.no_memory else peak_memory(build_step, (name, work), [STEP], args.threads, work.device)
        cells = [name, at.cell(), str(len(at.seconds)), number(work.audio / at.median), number(at.median / ours)]
        mfu = _mfu(name, work, at)
        rows.append([*cells, number(memory.get(STEP, float("nan"))), "-" if mfu is None else f"{mfu:.1%}"])
        rows[-1].append(f"{losses[name]:.4f}")
        aim = AIMS.get(name.partition(",")[0])
        if mfu is not None and aim and work.size == "base" and ("ours" in name or "fused" in name):
            notes.append(f"- aim {name}: MFU of at least {aim:.0%}: {mfu:.1%}, {'met' if mfu >= aim else 'MISSED'}")
    head = ["training step", "ms", "runs", "audio s/s", "of ours", "peak MiB", "MFU", "first loss"]
    kind = "bfloat16" if work.use_amp else "float32"
    frames = round(work.seconds * FRAMES_PER_SECOND) - 1
    title = f"\n## {work.size}: {work.batch} x {work.seconds:g} s ({frames} frames each), {kind}\n"
    return "\n".join([title, table(head, rows), "", *notes])


def _mfu(name: str, work: Work, at: Times) -> float | None:
    peak = peak_flops(work.device, work.use_amp)
    if peak is None:
        return None
    return step_flops(config_of(name, work), [work.num_samples] * work.batch) / at.median / peak


def make_corpus(folder: Path, seconds: float, count: int) -> None:
    """Write noise as FLAC, with lists, lengths and random labels, for training and validation."""
    import soundfile

    from espnet_mamba.targets.labels import write_labels

    rng, samples = np.random.default_rng(0), round(seconds * SAMPLE_RATE)
    for name, size in (("train", count), ("dev", 2)):
        (folder / name).mkdir(parents=True)
        ids = [f"{name}{i:03d}" for i in range(size)]
        for utt in ids:
            soundfile.write(folder / f"{utt}.flac", rng.normal(0, 0.1, samples), SAMPLE_RATE)
        (folder / name / "wav.scp").write_text("".join(f"{utt} {folder / utt}.flac\n" for utt in ids))
        (folder / name / "utt2num_samples").write_text("".join(f"{utt} {samples}\n" for utt in ids))
        frames = (samples - 400) // 320 + 1
        write_labels(folder / f"{name}.npy", {utt: rng.integers(0, 500, frames) for utt in ids})


def run_training(model: str, corpus: Path, out: Path, seconds: float, args: argparse.Namespace) -> list[dict]:
    """Run the training command; return its log lines without the first, in which kernels are made.

    Raises:
        RuntimeError: it failed; the end of what it said.
    """
    config = "paper2_base_it2" if args.device == "cuda" else "tiny_it2"
    bins = round(args.batch_seconds * SAMPLE_RATE)
    gpu = int(args.device == "cuda")
    words = ["--config", ROOT / f"conf/pretrain/{config}.yaml", "--model", MODELS / f"{model}.yaml", "--ngpu", gpu]
    words += ["--output_dir", out, "--num_classes", 500, "--label_rate", 50, "--batch_type", "numel"]
    words += ["--batch_bins", bins, "--max_crop_samples", round(seconds * SAMPLE_RATE), "--accum_grad", 1]
    words += ["--max_steps", args.run_steps, "--num_iters_per_epoch", args.run_steps, "--log_interval", 10]
    words += ["--save_interval_steps", args.run_steps, "--num_workers", args.workers, "--worst_batches_first", "true"]
    words += ["--use_tensorboard", "false"]
    for split, name in (("train", "train"), ("valid", "dev")):
        words += [f"--{split}_data_path_and_name_and_type", f"{corpus}/{name}/wav.scp,speech,sound"]
        words += [f"--{split}_data_path_and_name_and_type", f"{corpus}/{name}.npy,labels,frame_labels"]
        words += [f"--{split}_shape_file", f"{corpus}/{name}/utt2num_samples"]
    command = [sys.executable, "-m", "espnet_mamba.bin.hubert_train", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("; ".join(done.stderr.strip().splitlines()[-3:]))
    rows = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "train"][1:]


def runs(seconds: float, args: argparse.Namespace) -> str:
    """Start training of each model in turns, ``--run_rounds`` times; return a table of what the logs say."""
    found: dict[str, list[dict]] = {}
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        make_corpus(Path(folder) / "corpus", seconds, UTTERANCES)
        for turn in range(args.run_rounds):
            for model in args.run_models:
                out = Path(folder) / f"{model}{turn}"
                try:
                    found.setdefault(model, []).extend(run_training(model, Path(folder) / "corpus", out, seconds, args))
                except RuntimeError as error:
                    notes.append(f"- {model}: failed: {error}")
                said = out / "train.log"
                lines = said.read_text().splitlines() if said.is_file() else []
                notes += [f"- {model}: {line.partition('INFO: ')[2]}" for line in lines if "worst batches" in line][:1]
    rows = []
    for model, lines in found.items():
        if lines:
            middle = {key: _median(lines, key) for key in ("audio_rate", "mfu", "data_wait")}
            share = "-" if middle["mfu"] is None else f"{middle['mfu']:.1%}"
            rows.append([model, str(len(lines)), number(middle["audio_rate"] or 0), share])
            rows[-1] += [f"{middle['data_wait']:.2%}", f"{max(line['data_wait'] for line in lines):.2%}"]
    head = ["training run", "log lines", "audio s/s", "MFU", "data wait", "largest data wait"]
    title = f"\n## Whole runs: crops of {seconds:g} s, {args.batch_seconds:g} s a batch, {args.workers} workers\n"
    return "\n".join([title, table(head, rows), "", *dict.fromkeys(notes)])


def _median(rows: Sequence[dict], key: str) -> float | None:
    values = [row[key] for row in rows if key in row]
    return statistics.median(values) if values else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    torch.set_num_threads(args.threads)
    parts = ["# Training steps\n", machine(args.device), f"- reference scan: {reference_scan()[1]}"]
    parts.append("- a candidate gets the runs that fit into its time; the loops over frames get few, or one")
    print("\n".join(parts), flush=True)
    for work in [_work(text, args) for text in args.work]:
        parts.append(steps(work, args))
        print(parts[-1], flush=True)
    if args.runs:
        for seconds in args.run_seconds:
            parts.append(runs(seconds, args))
            print(parts[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _work(text: str, args: argparse.Namespace) -> Work:
    size, batch, seconds = text.split(",")
    filling = max(1, int(args.batch_seconds / float(seconds)))
    return Work(size, int(batch) or filling, float(seconds), args.device, args.device == "cuda")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--work", nargs="*", metavar="SIZE,B,SECONDS", help="shapes of batches; B = 0: as many as --batch_seconds hold"
    )
    parser.add_argument(
        "--models",
        nargs="*",
        default=["mamba", "transformer"],
        help="of the candidates; extbimamba is another; default: %(default)s",
    )
    parser.add_argument("--batch_seconds", type=float, help="of audio; default: 16, on cuda 175")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds_per_candidate", type=float, default=120.0, help="limit of a candidate's rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no_memory", action="store_true", help="leave out peak memory: a process per candidate")
    parser.add_argument("--runs", action="store_true", help="also whole runs of the training command")
    parser.add_argument("--run_models", nargs="*", help="default: mamba_tiny transformer_tiny, on cuda _base")
    parser.add_argument("--run_seconds", nargs="*", type=float, default=[15.6, 60.0], help="lengths of their crops")
    parser.add_argument("--run_steps", type=int, default=60)
    parser.add_argument("--run_rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=8, help="processes that read audio")
    parser.add_argument("--output", type=Path, help="also write the report there")
    args = parser.parse_args(arguments)
    args.work = DEFAULT_WORK[args.device] if args.work is None else args.work
    args.batch_seconds = args.batch_seconds or (175.0 if args.device == "cuda" else 16.0)
    size = "base" if args.device == "cuda" else "tiny"
    args.run_models = args.run_models or [f"mamba_{size}", f"transformer_{size}"]
    return args


if __name__ == "__main__":
    sys.exit(main())
