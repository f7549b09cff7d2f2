"""The voices: an English dialect, a vocal tract (espeak variant), a pitch and a rate; no two share a vocal tract."""

from __future__ import annotations

from dataclasses import dataclass

# Variants without echo and breath noise: in those a stop's closure is exact silence, which phone times rely on.
# Neighbours in the list differ in dialect and sex, so that every split has both.
_TABLE = (
    ("en-us", "m3", 50, 158),
    ("en", "Annie", 55, 150),
    ("en-gb-scotland", "m7", 45, 165),
    ("en-029", "linda", 50, 160),
    ("en-us", "m6", 40, 148),
    ("en-gb-x-rp", "m4", 55, 168),
    ("en-us", "belinda", 60, 152),
    ("en-gb-x-gbclan", "max", 45, 160),
    ("en-us-nyc", "anika", 40, 136),
    ("en", "f1", 52, 156),
    ("en-gb-x-gbcwmd", "m8", 60, 150),
    ("en-029", "adam", 50, 170),
    ("en-us", "steph", 45, 146),
    ("en-gb-x-rp", "edward", 58, 160),
    ("en-gb-scotland", "Mike", 60, 154),
    ("en-us-nyc", "m1", 55, 162),
    ("en", "rob", 42, 150),
    ("en-us", "aunty", 40, 164),
    ("en-gb-x-gbclan", "Alex", 52, 144),
    ("en-gb-x-rp", "Andrea", 45, 134),
    ("en", "m5", 48, 156),
    ("en-us-nyc", "david", 62, 148),
    ("en-gb-x-gbcwmd", "victor", 50, 166),
    ("en-us", "benjamin", 55, 150),
)
MAX_VOICES = len(_TABLE)
MIN_VOICES = 5


@dataclass(frozen=True)
class Voice:
    """One speaker; ``pitch`` is espeak's 0..100, ``rate`` words a minute."""

    speaker: str
    name: str
    pitch: int
    rate: int


def voices_of_sets(num_voices: int) -> dict[str, list[Voice]]:
    """Split the first ``num_voices`` voices into train, dev and test: of ten, seven, one and two.

    ValueError when the number is not in MIN_VOICES..MAX_VOICES.
    """
    if not MIN_VOICES <= num_voices <= MAX_VOICES:
        raise ValueError(f"num_voices {num_voices}: must be {MIN_VOICES} to {MAX_VOICES}")
    sets: dict[str, list[Voice]] = {"train": [], "dev": [], "test": []}
    for index, (dialect, variant, pitch, rate) in enumerate(_TABLE[:num_voices]):
        name = {3: "dev", 4: "test", 9: "test"}.get(index % 10, "train")
        sets[name].append(Voice(f"v{index + 1:02d}", f"{dialect}+{variant}", pitch, rate))
    return sets
