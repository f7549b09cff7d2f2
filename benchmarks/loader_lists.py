"""What batches waste, by type, and how long lists of a million utterances take to open: no audio is read here."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import number, table

ROOT = Path(__file__).resolve().parents[1]
MAX_CROP = 250_000  # samples, 15.6 s
SAMPLE_RATE, HOP, WINDOW = 16000, 320, 400
AIM_KEPT, AIM_SECONDS = 0.98, 10.0


def like_librispeech(count: int, seed: int = 0) -> np.ndarray:
    """Return made-up lengths ``(count,)`` in samples, like LibriSpeech's: 65 % near 14.7 s, a tail down to 1.3 s."""
    rng = np.random.default_rng(seed)
    long = rng.random(count) < 0.65
    seconds = np.where(long, rng.normal(14.7, 1.2, count), rng.uniform(1.3, 14.0, count))
    return (SAMPLE_RATE * np.clip(seconds, 1.3, 24.5)).astype(np.int64)


def shares(count: int, bins: int) -> str:
    """Return a table: of the audio that crops to 15.6 s leave, what each batch type reads, and what it pads."""
    from espnet2.samplers.num_elements_batch_sampler import NumElementsBatchSampler

    from espnet_mamba.layers.packing import slot_samples
    from espnet_mamba.train.bucket_batches import BucketBatches
    from espnet_mamba.train.packed_batches import packed_batches

    lengths = like_librispeech(count)
    ids = [f"u{i:07d}" for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "utt2num_samples"
        path.write_text("".join(f"{utt} {n}\n" for utt, n in zip(ids, lengths, strict=True)))
        numel = list(NumElementsBatchSampler(bins, [str(path)]))
        packed = packed_batches(path, bins, 1, 0)
    row = BucketBatches(np.array(ids, "S"), lengths, bins, 0, MAX_CROP)
    order = np.random.default_rng(0).permutation(count)
    per_batch = max(1, bins // int(lengths.mean()))
    batches = {
        "random order": [order[i : i + per_batch] for i in range(0, count, per_batch)],
        "numel (ESPnet's)": [[int(utt[1:]) for utt in batch] for batch in numel],
        "bucket": [row.indices(i) for i in range(len(row))],
    }
    rows = []
    for name, of in batches.items():
        kept, padded, full = _cropped([lengths[np.asarray(batch)] for batch in of], bins)
        rows.append([name, str(len(of)), f"{kept:.2%}", f"{padded:.2%}", f"{full:.1%}"])
    cropped = np.minimum(lengths, MAX_CROP)
    room = int(slot_samples(torch.from_numpy(cropped), HOP).sum())
    padding = f"{1 - cropped.sum() / room:.2%} in the front end, 0 behind it"
    rows.append(["packed", str(len(packed)), "100.00%", padding, f"{cropped.sum() / len(packed) / bins:.1%}"])
    met = {row[0]: float(row[2][:-1]) / 100 >= AIM_KEPT for row in rows if row[0] in ("bucket", "packed")}
    head = ["batches", "number", "kept when cropped to the shortest", "padding when padded", "full"]
    title = f"\n## What batches waste: {count} made-up lengths like LibriSpeech's, {bins / SAMPLE_RATE:g} s a batch\n"
    notes = [f"- aim {name}: at least {AIM_KEPT:.0%} kept: {'met' if met[name] else 'MISSED'}" for name in met]
    notes.append(
        f"- crops to 15.6 s come first; by themselves they leave {cropped.sum() / lengths.sum():.1%} of the audio"
    )
    return "\n".join([title, table(head, rows), "", *notes])


def _cropped(batches: Sequence[np.ndarray], bins: int) -> tuple[float, float, float]:
    """Return the share kept by cropping to whole frames of the shortest, of padding, and of ``bins`` that is used."""
    kept = offered = padded = 0
    for lengths in batches:
        usable = np.minimum(lengths, MAX_CROP)
        frames = (usable.min() - WINDOW) // HOP + 1
        kept += len(lengths) * ((frames - 1) * HOP + WINDOW)
        offered += usable.sum()
        padded += len(lengths) * usable.max()
    return kept / offered, 1 - offered / padded, kept / len(batches) / bins


def espnets_dataset(wav_scp: Path) -> Any:
    """Open audio by ESPnet's own ``sound``, which the import of our tasks replaces."""
    from espnet2.train import dataset

    replaced = dataset.DATA_TYPES["sound"]
    dataset.DATA_TYPES["sound"] = {"func": dataset.sound_loader, "kwargs": ["float_dtype"]}
    try:
        return dataset.ESPnetDataset([(str(wav_scp), "speech", "sound")])
    finally:
        dataset.DATA_TYPES["sound"] = replaced


def make_lists(folder: Path, count: int) -> None:
    """Write the lists of a made-up corpus: wav.scp, lengths, manifest, and labels as a sparse file."""
    from espnet_mamba.data.manifest import HEAD, MANIFEST

    lengths = like_librispeech(count)
    ids = [f"{i // 3000:05d}-{i // 40:06d}-{i % 40:04d}" for i in range(count)]
    audio = folder / "a_folder_with_a_name_of_usual_length/audio.flac"
    audio.parent.mkdir()
    audio.write_bytes(bytes(1000))
    (folder / "wav.scp").write_text("".join(f"{utt} {audio}\n" for utt in ids))
    (folder / "utt2num_samples").write_text("".join(f"{u} {n}\n" for u, n in zip(ids, lengths, strict=True)))
    rows = (f"{utt}\t{n}\t1000\t{'0' * 32}\n" for utt, n in zip(ids, lengths, strict=True))
    (folder / MANIFEST).write_text(HEAD + "\n" + "".join(rows))
    counts = (lengths - WINDOW) // HOP + 1
    starts = np.cumsum(counts) - counts
    rows = (f"{utt}\t{start}\t{n}\n" for utt, start, n in zip(ids, starts, counts, strict=True))
    (folder / "labels.tsv").write_text("".join(rows))
    header = {"descr": "<u2", "fortran_order": False, "shape": (int(counts.sum()),)}
    with (folder / "labels.npy").open("wb") as handle:
        np.lib.format.write_array_header_1_0(handle, header)
        handle.truncate(handle.tell() + 2 * int(counts.sum()))


def _options(folder: Path, batch_type: str) -> list[str]:
    words = ["--config", ROOT / "conf/pretrain/paper2_base_it2.yaml", "--model", ROOT / "conf/models/mamba_base.yaml"]
    words += ["--output_dir", folder / "exp", "--ngpu", 0, "--num_classes", 500, "--label_rate", 50, "--num_workers", 0]
    words += ["--batch_type", batch_type, "--train_shape_file", folder / "utt2num_samples"]
    words += ["--train_data_path_and_name_and_type", f"{folder}/wav.scp,speech,sound"]
    words += ["--train_data_path_and_name_and_type", f"{folder}/labels.npy,labels,frame_labels"]
    return [str(word) for word in words]


def _open_ours(folder: Path, batch_type: str) -> list[float]:
    """Return the seconds to open everything, and to know a batch in the middle of epoch 7."""
    from espnet2.train.distributed_utils import DistributedOption

    from espnet_mamba.train.task import HubertTask

    args = HubertTask.get_parser().parse_args(_options(folder, batch_type))
    started = time.perf_counter()
    factory = HubertTask.build_iter_factory(args, DistributedOption(), "train")
    opened = time.perf_counter()
    factory.batch(6 * factory.iters_per_epoch + factory.iters_per_epoch // 2)
    return [opened - started, time.perf_counter() - opened]


def _open_espnets(folder: Path, _batch_type: str) -> list[float]:
    """Return the same of ESPnet's sampler, data set (audio only) and iterator, which walks to the batch."""
    from espnet2.iterators.sequence_iter_factory import SequenceIterFactory
    from espnet2.samplers.num_elements_batch_sampler import NumElementsBatchSampler
    from espnet2.train.collate_fn import CommonCollateFn

    started = time.perf_counter()
    batches = list(NumElementsBatchSampler(2_800_000, [str(folder / "utt2num_samples")]))
    data = espnets_dataset(folder / "wav.scp")
    factory = SequenceIterFactory(data, batches, num_iters_per_epoch=40_000, shuffle=True, collate_fn=CommonCollateFn())
    opened = time.perf_counter()
    factory.build_iter(7)  # the batches of the whole epoch; ESPnet cannot begin in its middle
    return [opened - started, time.perf_counter() - opened]


def start_up(count: int) -> str:
    """Return a table of the seconds that opening ``count`` utterances takes, each candidate in a process of its own."""
    import espnet_mamba.train.task  # noqa: F401 -- imported once, before the forks: what is timed is reading lists

    candidates: dict[str, tuple[Callable[[Path, str], list[float]], str]] = {
        "ours, bucket": (_open_ours, "bucket"),
        "ours, packed": (_open_ours, "packed"),
        "ours, numel (ESPnet's sampler)": (_open_ours, "numel"),
        "ESPnet's own, numel, audio only": (_open_espnets, ""),
    }
    rows, lists = [], 0.0
    with tempfile.TemporaryDirectory() as name:
        make_lists(Path(name), count)
        for label, (function, batch_type) in candidates.items():
            context = multiprocessing.get_context("fork")
            with context.Pool(1) as pool:
                opened, found = pool.apply(function, (Path(name), batch_type))
            rows.append([label, number(opened), number(found), number(opened + found)])
            if label == "ours, bucket":
                lists = opened + found
    started = time.perf_counter()
    command = [sys.executable, "-m", "espnet_mamba.bin.hubert_train", "--help"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    imports = time.perf_counter() - started
    met = "met" if lists + imports < AIM_SECONDS else "MISSED"
    head = ["s", "lists opened", "batch in the middle of epoch 7", "both"]
    notes = [f"- Python's imports, for any number of utterances (the command's --help): {number(imports)} s"]
    notes.append(
        f"- aim, bucket: start and resume below {AIM_SECONDS:g} s: {number(lists + imports)} s with them, {met}"
    )
    notes.append("- opened: lengths, wav.scp, the index of labels and its check, the look for audio that changed")
    return "\n".join([f"\n## Start-up with {count} utterances\n", table(head, rows), "", *notes])
