"""The spoken corpus of the mini recipe: made on the spot, the same bytes every time, phone and word times known."""

from __future__ import annotations

import hashlib
import importlib.metadata
import queue
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from espnet_mamba.data.audio import SAMPLE_RATE
from espnet_mamba.data.files import write_json
from espnet_mamba.data.folders import SYNTH_RECORD, refuse_foreign_files, replaced_folders
from espnet_mamba.data.kaldi import Segment, write_ctm, write_table
from espnet_mamba.data.synth.grammar import Sentence, sentences
from espnet_mamba.data.synth.phones import Phone
from espnet_mamba.data.synth.room import record
from espnet_mamba.data.synth.speaker import Speaker
from espnet_mamba.data.synth.voices import Voice, voices_of_sets

# Measured over the default corpus: what turns minutes into a number of utterances before any of them is spoken.
MEAN_SECONDS = 2.68
# The test set is large for its use: intervals over utterances are what decides whether pretraining helped.
SHARES = {"train": 0.78, "dev": 0.07, "test": 0.15}
PITCH_SPREAD, RATE_SPREAD = 4, 10


@dataclass(frozen=True)
class Job:
    """One utterance to speak."""

    utt_id: str
    voice: Voice
    sentence: Sentence
    seed: int


@dataclass(frozen=True)
class Spoken:
    """One utterance as it was written."""

    num_samples: int
    phones: list[Segment]
    words: list[Segment]
    digest: str


def plan(minutes: float, num_voices: int, seed: int) -> dict[str, list[Job]]:
    """Return the utterances of each set, sorted by id; no sentence of dev or test is in another set.

    ValueError when ``minutes`` or ``num_voices`` is out of range.
    """
    if not 0.5 <= minutes <= 600:
        raise ValueError(f"minutes {minutes:g}: must be 0.5 to 600")
    voices = voices_of_sets(num_voices)
    total = minutes * 60 / MEAN_SECONDS
    taken: set[str] = set()
    jobs: dict[str, list[Job]] = {}
    for name in ("test", "dev", "train"):  # the small sets choose their sentences first
        count = max(len(voices[name]), round(total * SHARES[name]))
        chosen = sentences(count, f"{seed} {name}", taken)
        taken |= {sentence.text for sentence in chosen}
        speakers = [voices[name][index % len(voices[name])] for index in range(count)]
        jobs[name] = sorted(
            (
                Job(f"{voice.speaker}-{name}{index:05d}", voice, sentence, seed)
                for index, (voice, sentence) in enumerate(zip(speakers, chosen, strict=True))
            ),
            key=lambda job: job.utt_id,
        )
    return jobs


def speak(job: Job, speaker: Speaker, path: Path) -> Spoken:
    """Speak one utterance, write it as 16-bit FLAC to ``path`` and return its length, phones, words and digest."""
    # Seeded by its own name: the same whichever helper speaks it and whatever was spoken before.
    rng = np.random.default_rng([job.seed, zlib.crc32(job.utt_id.encode())])
    pitch = job.voice.pitch + int(rng.integers(-PITCH_SPREAD, PITCH_SPREAD + 1))
    rate = job.voice.rate + int(rng.integers(-RATE_SPREAD, RATE_SPREAD + 1))
    # Lower case: espeak may read capitals as letters.
    speech = speaker.say(job.sentence.spoken.lower(), job.voice.name, pitch, rate)
    samples, phones = record(speech, rng)
    soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16", format="FLAC")
    segments = [Segment(phone.start, phone.end, phone.label) for phone in phones]
    digest = hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest()
    return Spoken(len(samples), segments, word_segments(phones, job.sentence.text.split()), digest)


def word_segments(phones: Sequence[Phone], words: Sequence[str]) -> list[Segment]:
    """Return each of ``words`` from the start of its first phone to the end of its last; ValueError if it has none."""
    segments = []
    for index, word in enumerate(words):
        own = [phone for phone in phones if phone.word == index]
        if not own:
            raise ValueError(f"word {index + 1}, {word}, of {' '.join(words)!r} was spoken without a phone")
        segments.append(Segment(own[0].start, own[-1].end, word))
    return segments


def make_corpus(out_dir: str | Path, minutes: float = 25.0, num_voices: int = 20, seed: int = 0, nj: int = 1) -> None:
    """Write ``out_dir/{train,dev,test}`` with wav/, wav.scp, text, utt2spk, utt2intent, phones.ctm, words.ctm
    and synth.json.

    The result depends on ``minutes``, ``num_voices`` and ``seed``, not on ``nj``. ValueError when espeak cannot speak
    or a set folder holds files of the user's; ``out_dir`` is then as it was.
    """
    out_dir = Path(out_dir).resolve()
    jobs = plan(minutes, num_voices, seed)
    for name in jobs:
        refuse_foreign_files(out_dir / name)
    with replaced_folders(out_dir, list(jobs)) as folders, ExitStack() as stack:
        idle: queue.Queue[Speaker] = queue.Queue()
        for _ in range(max(1, nj)):
            idle.put(stack.enter_context(Speaker()))

        def run(name: str, job: Job) -> Spoken:
            speaker = idle.get()
            try:
                return speak(job, speaker, folders[name] / "wav" / f"{job.utt_id}.flac")
            finally:
                idle.put(speaker)

        order = [(name, job) for name in jobs for job in jobs[name]]
        for name in jobs:
            (folders[name] / "wav").mkdir()
        pool = stack.enter_context(ThreadPoolExecutor(max(1, nj)))
        results = pool.map(lambda item: run(*item), order)
        progress = tqdm(results, total=len(order), desc="speaking", unit="utt", mininterval=5)
        spoken = {job.utt_id: one for (_, job), one in zip(order, progress, strict=True)}
        settings = {"minutes": minutes, "num_voices": num_voices, "seed": seed}
        for name in jobs:
            _write_tables(jobs[name], spoken, folders[name], out_dir / name, settings)
    for name in SHARES:
        print(_summary(name, jobs[name], spoken))


def _write_tables(
    jobs: list[Job], spoken: dict[str, Spoken], folder: Path, place: Path, settings: dict[str, float | int]
) -> None:
    """Write the tables of one set into ``folder``, which will be renamed to ``place``, and the record of its making."""
    write_table(folder / "wav.scp", {job.utt_id: str(place / "wav" / f"{job.utt_id}.flac") for job in jobs})
    write_table(folder / "text", {job.utt_id: job.sentence.text for job in jobs})
    write_table(folder / "utt2spk", {job.utt_id: job.voice.speaker for job in jobs})
    write_table(folder / "utt2intent", {job.utt_id: " ".join(job.sentence.intent) for job in jobs})
    write_ctm(folder / "phones.ctm", {job.utt_id: spoken[job.utt_id].phones for job in jobs})
    write_ctm(folder / "words.ctm", {job.utt_id: spoken[job.utt_id].words for job in jobs})
    digest = hashlib.sha256("".join(spoken[job.utt_id].digest for job in jobs).encode()).hexdigest()
    versions = {"espeakng-loader": importlib.metadata.version("espeakng-loader")}
    write_json(folder / SYNTH_RECORD, {**settings, "versions": versions, "samples_sha256": digest})


def _summary(name: str, jobs: list[Job], spoken: dict[str, Spoken]) -> str:
    seconds = [spoken[job.utt_id].num_samples / SAMPLE_RATE for job in jobs]
    voices = len({job.voice.speaker for job in jobs})
    return (
        f"{name}: {len(jobs)} utterances, {sum(seconds) / 60:.1f} min, {voices} voices, "
        f"seconds min {min(seconds):.2f} mean {sum(seconds) / len(seconds):.2f} max {max(seconds):.2f}"
    )
