"""From espeak's phones to words: which phone belongs to which word of the text, also where espeak joins two."""

from __future__ import annotations

import re

from espnet_mamba.data.synth.speaker import Speech

NO_WORD = -1
_WORD = re.compile(r"[^\s,]+")
# espeak's dictionary has IN THE and OF THE as one entry each, all its phones at the place of the first word. The second
# word starts with the last of these mnemonics; it is unstressed, so that they have no mark.
_ONSETS = {"the": ("D", "d")}


def words_of_phones(speech: Speech) -> list[int]:
    """Return for each phone of ``speech`` the index of its word in the text, NO_WORD where it is in none (pauses).

    ValueError names a word that espeak joined to the one before it and that cannot be told from it.
    """
    found = list(_WORD.finditer(speech.text))
    index_at = {match.start(): index for index, match in enumerate(found)}
    numbers = [index_at.get(place, NO_WORD) for _, _, place in speech.phones]
    for index in sorted(set(range(len(found))) - set(numbers)):
        word = found[index].group()
        joined = [at for at, number in enumerate(numbers) if number == index - 1]
        onsets = [at for at in joined[1:] if speech.phones[at][1] in _ONSETS.get(word, ())]
        if not onsets:
            raise ValueError(
                f"{speech.text!r}: espeak has no phones for {word!r} alone; add it to _ONSETS in {__name__}"
            )
        numbers[onsets[-1] : joined[-1] + 1] = [index] * (joined[-1] + 1 - onsets[-1])
    return numbers
