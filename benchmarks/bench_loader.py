"""Reading audio for pretraining: the speed of one core, what batches waste, how long a million utterances take to open.

Speed: one process reads whole epochs, FLAC to cropped batches with labels, from files and from tar shards; beside it
ESPnet's own data set and collate function (audio only), and soundfile decoding the same bytes, below which nothing
that decodes FLAC by libsndfile can be. Recordings are joined to LibriSpeech's lengths and written as FLAC.

For example: python benchmarks/bench_loader.py --corpus_dir ../my_corpus --output loader.md
             python benchmarks/bench_loader.py --utterances 1000000 --rounds 0      # start-up alone
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from loader_lists import espnets_dataset, like_librispeech, shares, start_up
from timing import Times, machine, number, table, time_interleaved

from espnet_mamba.data.audio import SAMPLE_RATE, read_audio, read_bytes
from espnet_mamba.data.check import check_sets
from espnet_mamba.data.kaldi import read_table
from espnet_mamba.data.pack import pack_set
from espnet_mamba.data.tables import read_set

ROOT = Path(__file__).resolve().parents[1]
READ = "read"
AIM = 2000.0  # times real time and core


class Reading:
    """A candidate: what to call to read the corpus once."""

    compiles = False

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def run(self, which: str) -> Any:
        """Read everything once."""
        return self.call()


def write_corpus(folder: Path, sources: Sequence[str], minutes: float) -> float:
    """Write recordings joined to LibriSpeech's lengths as a checked set in FLAC; return its seconds of audio."""
    from espnet_mamba.targets.labels import write_labels

    raw = folder / "data/train"
    raw.mkdir(parents=True)
    samples = _joined(sources)
    labels, total = {}, 0
    for number_, length in enumerate(like_librispeech(int(minutes * 60 / 12))):
        if total > minutes * 60 * SAMPLE_RATE:
            break
        utt, wav = f"u{number_:06d}", next_samples(samples, int(length))
        soundfile.write(raw / f"{utt}.flac", wav, SAMPLE_RATE)
        labels[utt] = np.zeros((len(wav) - 400) // 320 + 1, np.uint16)
        total += len(wav)
    for name, value in (("wav.scp", "{}.flac"), ("text", "A"), ("utt2spk", "s")):
        (raw / name).write_text("".join(f"{utt} {value.format(utt)}\n" for utt in labels))
    write_labels(folder / "train.npy", labels)
    check_sets(folder / "data", folder / "files", ["train"])
    check_sets(folder / "data", folder / "packed", ["train"])
    pack_set(folder / "packed/train", folder / "shards", 10**9)
    return total / SAMPLE_RATE


def _joined(sources: Sequence[str]) -> Iterator[np.ndarray]:
    while True:
        for source in sources:
            yield read_audio(source)


def next_samples(recordings: Iterator[np.ndarray], length: int) -> np.ndarray:
    """Join the next recordings and cut them to ``length``."""
    parts: list[np.ndarray] = []
    while sum(len(part) for part in parts) < length:
        parts.append(next(recordings))
    return np.concatenate(parts)[:length]


def sources_of(args: argparse.Namespace, folder: Path) -> list[str]:
    """Return recordings to make the corpus of: a Kaldi-style corpus's, else synthetic speech made now."""
    if args.corpus_dir:
        corpus = Path(args.corpus_dir)
        tables = read_set(corpus / args.set, [corpus / args.set, corpus])
        if tables.problems or not tables.wavs:
            raise SystemExit(f"error: {corpus / args.set}: {tables.problems[0] if tables.problems else 'no wav.scp'}")
        return list(tables.wavs.values())
    from espnet_mamba.data.synth.corpus import make_corpus

    make_corpus(folder / "synth", 3.0, 8, 0, 1)
    return list(read_set(folder / "synth/train", [folder / "synth/train", folder / "synth"]).wavs.values())


def ours(folder: Path, labels: Path, bins: int, workers: int) -> Callable[[], int]:
    """Return what reads an epoch as training does."""
    from espnet_mamba.train.task import HubertTask

    words = ["--config", ROOT / "conf/pretrain/paper2_base_it2.yaml", "--model", ROOT / "conf/models/mamba_base.yaml"]
    words += ["--output_dir", folder / "exp", "--ngpu", 0, "--num_classes", 500, "--label_rate", 50]
    words += ["--batch_bins", bins, "--num_workers", workers, "--train_shape_file", folder / "utt2num_samples"]
    words += ["--train_data_path_and_name_and_type", f"{folder}/wav.scp,speech,sound"]
    words += ["--train_data_path_and_name_and_type", f"{labels},labels,frame_labels"]
    args = HubertTask.get_parser().parse_args([str(word) for word in words])
    args.num_iters_per_epoch = None  # a pass
    from espnet2.train.distributed_utils import DistributedOption

    factory = HubertTask.build_iter_factory(args, DistributedOption(), "train")
    return lambda: sum(batch["speech"].numel() for _, batch in factory.build_iter(1))


def espnets(folder: Path, bins: int) -> Callable[[], int]:
    """Return what reads an epoch by ESPnet's ``sound`` and ``CommonCollateFn``, audio only."""
    from espnet2.iterators.sequence_iter_factory import SequenceIterFactory
    from espnet2.samplers.num_elements_batch_sampler import NumElementsBatchSampler
    from espnet2.train.collate_fn import CommonCollateFn

    data = espnets_dataset(folder / "wav.scp")
    batches = list(NumElementsBatchSampler(bins, [str(folder / "utt2num_samples")]))
    factory = SequenceIterFactory(data, batches, shuffle=True, collate_fn=CommonCollateFn(float_pad_value=0.0))
    return lambda: sum(batch["speech"].numel() for _, batch in factory.build_iter(1))


def speed(args: argparse.Namespace) -> str:
    """Time the candidates in turns; return a table and whether the aim was met."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = write_corpus(folder, sources_of(args, folder), args.minutes)
        files, packed, bins = folder / "files/train", folder / "packed/train", round(args.batch_seconds * SAMPLE_RATE)
        contents = [read_bytes(path) for path in read_table(files / "wav.scp").values()]
        jobs = {
            "ours, files": ours(files, folder / "train.npy", bins, 0),
            "ours, tar shards": ours(packed, folder / "train.npy", bins, 0),
            "ESPnet's, files, audio only": espnets(files, bins),
            "soundfile alone, from memory": lambda: [soundfile.read(io.BytesIO(d), dtype="float32") for d in contents],
            "soundfile alone, from files": lambda: [
                soundfile.read(path, dtype="float32") for path in read_table(files / "wav.scp").values()
            ],
        }
        for workers in args.workers:
            jobs[f"ours, files, {workers} workers"] = ours(files, folder / "train.npy", bins, workers)
        jobs = {name: Reading(call) for name, call in jobs.items()}
        times = time_interleaved(jobs, READ, args.rounds, "cpu", seconds=600)  # type: ignore[arg-type]
        size = sum(map(len, contents))
        if args.workers:  # here, while what they read from is still there
            jobs.clear()
    own = times["ours, files"].median
    rows = [
        [name, at.cell(), str(len(at.seconds)), number(seconds / at.median), number(at.median / own)]
        for name, at in times.items()
        if at.seconds
    ]
    notes = [f"- {name}: {at.note}" for name, at in times.items() if at.note]
    notes.append(
        f"- {seconds / 60:.1f} min of audio in {len(contents)} FLAC files, {8 * size / seconds / 1e3:.0f} kbit/s"
    )
    notes.append("- times real time counts the audio that is decoded, also what is then cropped")
    notes += [_aim(name, times, seconds) for name in ("ours, files", "ours, tar shards")]
    head = ["one process reads a pass", "ms", "runs", "times real time", "of ours"]
    return "\n".join(["\n## Speed\n", table(head, rows), "", *notes])


def _aim(name: str, times: dict[str, Times], seconds: float) -> str:
    rate, floor = (seconds / times[key].median for key in (name, "soundfile alone, from memory"))
    said = "met" if rate >= AIM else f"MISSED; soundfile alone does {number(floor)}"
    return f"- aim {name}: at least {AIM:.0f} times real time per core: {number(rate)}, {said}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus_dir", help="Kaldi-style corpus to take recordings from; default: synthetic speech")
    parser.add_argument("--set", default="train", help="its set")
    parser.add_argument("--minutes", type=float, default=20.0, help="audio to read in a pass")
    parser.add_argument("--batch_seconds", type=float, default=350.0, help="audio of a batch")
    parser.add_argument("--rounds", type=int, default=9, help="passes of each candidate; 0: none")
    parser.add_argument("--workers", type=int, nargs="*", default=[], help="also ours with so many reading processes")
    parser.add_argument("--utterances", type=int, default=1_000_000, help="of the made-up list to open; 0: none")
    parser.add_argument("--share_utterances", type=int, default=100_000, help="of made-up lengths; 0: none")
    parser.add_argument("--output", help="Markdown file to write as well")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("numpy", "soundfile", "espnet"))
    text = [f"# Reading audio\n\n- command: bench_loader.py {' '.join(arguments or sys.argv[1:])}", machine("cpu")]
    text.append(f"- {packages}, libsndfile {soundfile.__libsndfile_version__}")
    if args.rounds:
        text.append(speed(args))
    if args.share_utterances:
        text.append(shares(args.share_utterances, round(args.batch_seconds * SAMPLE_RATE)))
    if args.utterances:
        text.append(start_up(args.utterances))
    print("\n".join(text))
    if args.output:
        Path(args.output).write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
