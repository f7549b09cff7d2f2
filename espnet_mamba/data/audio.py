"""Reading 16 kHz mono audio, refused by name when it is anything else. S: samples at 16 kHz."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE = 16000


class AudioError(ValueError):
    """An audio file that cannot be used; the text names the file, the value, the limit and the remedy."""

    def __init__(self, path: str | Path, reason: str, value: str, limit: str, remedy: str) -> None:
        super().__init__(f"{path}: {value} ({limit}); {remedy}")
        self.path = str(path)
        self.reason = reason
        self.value = value
        self.limit = limit
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[AudioError], tuple[str, str, str, str, str]]:
        # Exceptions pickle by their message alone; this one must come back whole from a worker process.
        return type(self), (self.path, self.reason, self.value, self.limit, self.remedy)


def read_audio(path: str | Path) -> np.ndarray:
    """Read a whole 16 kHz mono file as float32 of shape (S,); integer formats are scaled to [-1, 1).

    Raises AudioError when it is missing, empty, unreadable, truncated, at another rate or not mono.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioError(path, "missing", "no such file", "it must exist", "correct wav.scp or restore the file")
    if path.stat().st_size == 0:
        raise AudioError(path, "zero_bytes", "0 bytes", "an audio header at least", "copy the file again")
    promised = 0
    try:
        with soundfile.SoundFile(path) as handle:
            _check_format(path, handle.samplerate, handle.channels)
            promised = max(_length_in_header(path, handle.frames), _length_in_wav_header(path))
            samples = handle.read(dtype="float32")
    except (soundfile.LibsndfileError, RuntimeError) as error:
        text = str(error).split(": ")[-1].strip(" .")
        if promised:
            raise _truncated(path, f"decoding stops before the end: {text}", promised) from error
        raise AudioError(
            path, "unreadable", f"cannot be decoded: {text}", "WAV, FLAC, Ogg or Opus", "copy or convert the file again"
        ) from error
    if len(samples) < promised:
        raise _truncated(path, f"{len(samples)} samples decoded", promised)
    return samples


def _truncated(path: Path, value: str, promised: int) -> AudioError:
    return AudioError(path, "truncated", value, f"its header says {promised} samples", "copy the file again")


def _length_in_header(path: Path, frames: int) -> int:
    """Return libsndfile's length in samples; a FLAC stream written without one cannot be read by it."""
    if frames < 2**40:
        return frames
    value = "its header holds no length"
    raise AudioError(path, "unreadable", value, "a finished file", "encode it again: sox IN OUT.flac")


def _check_format(path: Path, rate: int, channels: int) -> None:
    """Raise AudioError unless the file is 16 kHz mono."""
    convert = "convert it: sox IN -r 16000 -c 1 OUT.flac"
    if rate != SAMPLE_RATE:
        raise AudioError(path, "sample_rate", f"{rate} Hz", f"{SAMPLE_RATE} Hz", convert)
    if channels != 1:
        raise AudioError(path, "channels", f"{channels} channels", "1 channel", convert)


def _length_in_wav_header(path: Path) -> int:
    """Return the samples a canonical WAV header promises, 0 when there is no such promise.

    libsndfile silently shortens a cut WAV file to what is there, so the header's own count is read here.
    """
    with open(path, "rb") as handle:
        if handle.read(4) != b"RIFF" or handle.seek(8) != 8 or handle.read(4) != b"WAVE":
            return 0
        block_align = 0
        while len(header := handle.read(8)) == 8:
            name, size = header[:4], int.from_bytes(header[4:], "little")
            if name == b"fmt ":
                body = handle.read(size)
                # Only PCM (1), float (3) and extensible (0xFFFE) hold one sample per channel in each block.
                if int.from_bytes(body[:2], "little") not in (1, 3, 0xFFFE):
                    return 0
                block_align = int.from_bytes(body[12:14], "little")
            elif name == b"data":
                # Streamed WAV (ffmpeg, sox to a pipe) leaves 0 or a huge size here: no promise.
                return 0 if size >= 0x7FFFF000 or not block_align else size // block_align
            else:
                handle.seek(size + size % 2, 1)
    return 0
