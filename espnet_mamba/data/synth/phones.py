"""From espeak's phoneme events to phone segments: a tidy set of labels, and closures given to their stops."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from espnet_mamba.data.alignment import SILENCE
from espnet_mamba.data.synth.speaker import Speech
from espnet_mamba.data.synth.words import NO_WORD, words_of_phones

# ARPAbet where it has a letter; AAR AOR EHR are the vowels of START, NORTH and SQUARE, rhotic or not by dialect.
PHONES: dict[str, str] = {
    **{"a": "AE", "aa": "AE", "0": "AA", "A:": "AA", "O:": "AO", "O2": "AO", "O": "AO", "V": "AH", "E": "EH"},
    **{"@": "AX", "@2": "AX", "@-": "AX", "@5": "AX", "a#": "AX", "3:": "ER", "VR": "ER", "3": "AXR", "@L": "EL"},
    **{"I": "IH", "I2": "IH", "i:": "IY", "i": "IY", "U": "UH", "u:": "UW", "A@": "AAR", "o@": "AOR", "O@": "AOR"},
    **{"e@": "EHR", "aI": "AY", "aI2": "AY", "aU": "AW", "eI": "EY", "OI": "OY", "oU": "OW"},
    **{"p": "P", "b": "B", "t": "T", "t2": "T", "t[": "T", "t#": "DX", "d": "D", "k": "K", "g": "G"},
    **{"tS": "CH", "dZ": "JH", "f": "F", "v": "V", "T": "TH", "D": "DH", "s": "S", "z": "Z", "S": "SH", "Z": "ZH"},
    **{"h": "HH", "m": "M", "n": "N", "N": "NG", "l": "L", "r": "R", "r-": "R", "w": "W", "w#": "W", "j": "Y"},
}
STRESS_MARKS = "',%="
# Marks without a sound of their own: they belong to the phone before them.
SOUNDLESS = frozenset({";", "|", "_|", "||", "-"})
# Quieter than this is silence in espeak's 16-bit output; its closures are exact zeros, fading ends are not.
QUIET = 12
# A silence longer than this before a phone is a pause, not a closure.
LONGEST_CLOSURE_SECONDS = 0.08


class Phone(NamedTuple):
    """A phone in seconds; ``word`` is the index of its word in the text, NO_WORD for ``sil``."""

    start: float
    end: float
    label: str
    word: int


def phone_segments(speech: Speech) -> list[Phone]:
    """Return segments that cover the whole of ``speech`` without gap or overlap, pauses as ``sil``.

    espeak reports a phone where its sound begins, so that the silent closure of a stop (about 40 to 50 ms) would
    count as the end of the phone before it: each boundary is moved back to where that silence begins. ValueError
    names a mnemonic that PHONES does not have, or a word without phones of its own.
    """
    starts, labels, words = [0], [SILENCE], [NO_WORD]
    for (sample, mnemonic, _), word in zip(speech.phones, words_of_phones(speech), strict=True):
        name = mnemonic.lstrip(STRESS_MARKS)
        if name in SOUNDLESS:
            continue
        label = SILENCE if name.startswith("_") or not name else PHONES.get(name)
        if label is None:
            raise ValueError(f"espeak phone {mnemonic!r} has no label; add it to PHONES in {__name__}")
        if label != SILENCE and labels[-1] != SILENCE:
            sample -= closure_samples(speech, starts[-1], sample)
        starts.append(min(sample, len(speech.samples)))
        labels.append(label)
        words.append(word)
    ends = [*starts[1:], len(speech.samples)]
    segments = [
        Phone(start / speech.rate, end / speech.rate, label, NO_WORD if label == SILENCE else word)
        for start, end, label, word in zip(starts, ends, labels, words, strict=True)
        if end > start
    ]
    return _join_silences(segments)


def closure_samples(speech: Speech, earliest: int, start: int) -> int:
    """Return how many samples of silence stand before ``start``, none of them before ``earliest``."""
    before = np.abs(speech.samples[earliest:start].astype(np.int32)) > QUIET
    silent = len(before) - (int(np.flatnonzero(before)[-1]) + 1) if before.any() else 0
    return silent if silent <= LONGEST_CLOSURE_SECONDS * speech.rate else 0


def _join_silences(segments: list[Phone]) -> list[Phone]:
    joined: list[Phone] = []
    for segment in segments:
        if joined and joined[-1].label == segment.label == SILENCE:
            joined[-1] = joined[-1]._replace(end=segment.end)
        else:
            joined.append(segment)
    return joined
