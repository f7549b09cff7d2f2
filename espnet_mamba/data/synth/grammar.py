"""A command language of at most 60 words whose sentences carry an intent: action, object, place, number."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

SLOTS = ("action", "object", "place", "number")
NONE = "none"
# Near neighbours on purpose (LOCK / CLOCK, LAMP / RAMP, OPEN / OVEN): unlike words would ask little of a model.
VALUES: dict[str, tuple[str, ...]] = {
    "action": ("OPEN", "CLOSE", "START", "STOP", "BRING", "CHECK", "LOCK", "WATCH", "PAINT", "MOVE"),
    "object": ("DOOR", "LAMP", "RAMP", "CLOCK", "RADIO", "HEATER", "OVEN", "CAMERA", "BOX", "CHAIR", "SHELF", "BOILER"),
    "place": ("KITCHEN", "BEDROOM", "ATTIC", "GARAGE", "GARDEN", "OFFICE", "HALLWAY", "CELLAR"),
    "number": ("ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE", "TEN"),
}
# A comma is spoken as a pause and not written in the transcript.
TEMPLATES = (
    "{action} THE {object}, PLEASE",
    "{action} THE {object} IN THE {place}",
    "PLEASE {action} {object} NUMBER {number}",
    "COULD YOU {action} THE {object} IN THE {place}",
    "IN THE {place}, {action} THE {object} NOW",
    "{action} {object} NUMBER {number} IN THE {place}",
    "GO TO THE {place} AND {action} THE {object}",
    "JUST {action} {object} {number}, THANK YOU",
    "PLEASE {action} ALL {number} IN THE {place}",
    "{number} TIMES, {action} THE {object} AGAIN",
    "COULD YOU GO TO THE {place} {number} TIMES",
    "{action} ALL OF THE {place}, PLEASE",
    "IS THE {object} IN THE {place}",
    "WHERE IS {object} NUMBER {number}, PLEASE",
    "THE {object} OF THE {place}, {action} {number} NOW",
    "PLEASE GO TO THE {place} AND {action} {object} NUMBER {number} NOW",
    "COULD YOU {action} THE {object} OF THE {place} {number} TIMES, PLEASE",
    "IN THE {place}, PLEASE {action} {object} {number} AGAIN, THANK YOU",
    "JUST GO {action} ALL {number}, AND THE {object} IN THE {place} AGAIN",
    "{action} NUMBER {number} AND THE {object} IN THE {place}",
)


@dataclass(frozen=True)
class Sentence:
    """One sentence: ``spoken`` has commas for pauses, ``text`` is the transcript, ``intent`` has a token per slot."""

    spoken: str
    text: str
    intent: tuple[str, ...]


def vocabulary() -> list[str]:
    """Return every word of the language, sorted."""
    words = {word for values in VALUES.values() for word in values}
    for template in TEMPLATES:
        words.update(word for word in template.replace(",", "").split() if not word.startswith("{"))
    return sorted(words)


def make_sentence(template: str, chosen: dict[str, str]) -> Sentence:
    """Fill a template; a slot that it does not have is ``none`` in the intent."""
    spoken = template.format(**chosen)
    intent = tuple(chosen[slot].lower() if f"{{{slot}}}" in template else NONE for slot in SLOTS)
    return Sentence(spoken, spoken.replace(",", ""), intent)


def _deck(values: tuple[str, ...], rng: random.Random) -> Iterator[str]:
    """Deal the values for ever, each once per round: every value is as frequent as the others even in a small set."""
    while True:
        yield from rng.sample(values, len(values))


def sentences(count: int, seed: str, avoid: set[str]) -> list[Sentence]:
    """Return ``count`` sentences with balanced templates and slot values, none with a text in ``avoid``."""
    rng = random.Random(seed)
    templates = _deck(TEMPLATES, rng)
    # A value is drawn from its deck only when the template has the slot: then rare templates do not unbalance it.
    decks = {slot: _deck(values, rng) for slot, values in VALUES.items()}
    made: list[Sentence] = []
    while len(made) < count:
        template = next(templates)
        chosen = {slot: next(decks[slot]) for slot in SLOTS if f"{{{slot}}}" in template}
        sentence = make_sentence(template, {**dict.fromkeys(SLOTS, NONE), **chosen})
        if sentence.text not in avoid:
            made.append(sentence)
    return made
