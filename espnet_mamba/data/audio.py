"""Reading 16 kHz mono audio, refused by name when it is anything else. S: samples at 16 kHz.

A location is the path of a file, or ``shard.tar:offset:length`` (``tar_shards.py``): whatever reads audio comes here.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile

from espnet_mamba.data.errors import AudioError
from espnet_mamba.data.tar_shards import parse_member, read_member

SAMPLE_RATE = 16000


def read_audio(location: str | Path) -> np.ndarray:
    """Read a whole 16 kHz mono recording as float32 of shape (S,); integer formats are scaled to [-1, 1).

    Raises AudioError when it is missing, empty, unreadable, truncated, at another rate or not mono.
    """
    return decode_audio(read_bytes(location), location)


def read_bytes(location: str | Path) -> bytes:
    """Return what is stored at a location; AudioError when it is missing, empty or unreadable.

    In one piece, since each request of a decoder's own would be a round trip to a file server.
    """
    member = parse_member(str(location))
    if member is not None:
        data = read_member(member)
    else:
        try:
            with open(location, "rb", buffering=0) as handle:
                data = handle.readall()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            remedy = "correct wav.scp or restore the file"
            raise AudioError(location, "missing", "no such file", "it must exist", remedy) from error
        except OSError as error:
            value = f"cannot be read: {error.strerror or error}"
            raise AudioError(
                location, "unreadable", value, "a readable file", "mend its permissions or disk"
            ) from error
    if not data:
        raise AudioError(location, "zero_bytes", "0 bytes", "an audio header at least", "copy the file again")
    return data


def decode_audio(data: bytes, location: str | Path) -> np.ndarray:
    """Decode what was read at ``location`` to float32 of shape (S,); raises as ``read_audio``."""
    promised = 0
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as handle:
            _check_format(location, handle.samplerate, handle.channels)
            promised = max(_length_in_header(location, handle.frames), _length_in_wav_header(data))
            samples = handle.read(dtype="float32")
    except (soundfile.LibsndfileError, RuntimeError) as error:
        text = str(error).split(": ")[-1].strip(" .")
        if promised:
            raise _truncated(location, f"decoding stops before the end: {text}", promised) from error
        remedy = "copy or convert the file again"
        raise AudioError(
            location, "unreadable", f"cannot be decoded: {text}", "WAV, FLAC, Ogg or Opus", remedy
        ) from error
    if len(samples) < promised:
        raise _truncated(location, f"{len(samples)} samples decoded", promised)
    return samples


def _truncated(path: str | Path, value: str, promised: int) -> AudioError:
    return AudioError(path, "truncated", value, f"its header says {promised} samples", "copy the file again")


def _length_in_header(path: str | Path, frames: int) -> int:
    """Return libsndfile's length in samples; a FLAC stream written without one cannot be read by it."""
    if frames < 2**40:
        return frames
    value = "its header holds no length"
    raise AudioError(path, "unreadable", value, "a finished file", "encode it again: sox IN OUT.flac")


def _check_format(path: str | Path, rate: int, channels: int) -> None:
    """Raise AudioError unless the file is 16 kHz mono."""
    convert = "convert it: sox IN -r 16000 -c 1 OUT.flac"
    if rate != SAMPLE_RATE:
        raise AudioError(path, "sample_rate", f"{rate} Hz", f"{SAMPLE_RATE} Hz", convert)
    if channels != 1:
        raise AudioError(path, "channels", f"{channels} channels", "1 channel", convert)


def _length_in_wav_header(data: bytes) -> int:
    """Return the samples a canonical WAV header promises, 0 when there is no such promise.

    libsndfile silently shortens a cut WAV file to what is there, so the header's own count is read here.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return 0
    block_align, place = 0, 12
    while len(header := data[place : place + 8]) == 8:
        name, size = header[:4], int.from_bytes(header[4:], "little")
        place += 8
        if name == b"fmt ":
            # Only PCM (1), float (3) and extensible (0xFFFE) hold one sample per channel in each block.
            if int.from_bytes(data[place : place + 2], "little") not in (1, 3, 0xFFFE):
                return 0
            block_align = int.from_bytes(data[place + 12 : place + 14], "little")
        elif name == b"data":
            # Streamed WAV (ffmpeg, sox to a pipe) leaves 0 or a huge size here: no promise.
            return 0 if size >= 0x7FFFF000 or not block_align else size // block_align
        place += size + size % 2
    return 0
