"""Word and character error rates, with the kinds of error and intervals over utterances."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer
import numpy as np

from espnet_mamba.asr import bootstrap
from espnet_mamba.data.files import write_json, write_text


@dataclass(frozen=True)
class ErrorCounts:
    """Counts per utterance, each (U,): what the hypotheses did to the references."""

    substitutions: np.ndarray
    insertions: np.ndarray
    deletions: np.ndarray
    totals: np.ndarray  # words (or characters) of the reference

    @property
    def errors(self) -> np.ndarray:
        """All errors per utterance (U,)."""
        return self.substitutions + self.insertions + self.deletions


def word_errors(references: list[str], hypotheses: list[str]) -> ErrorCounts:
    """Count the word errors of each pair by a Levenshtein alignment; an empty text is no words."""
    return _count([text.split() for text in references], [text.split() for text in hypotheses])


def char_errors(references: list[str], hypotheses: list[str]) -> ErrorCounts:
    """Count the character errors of each pair; one space between words counts as a character."""
    return _count([_characters(text) for text in references], [_characters(text) for text in hypotheses])


def _characters(text: str) -> list[str]:
    return list(" ".join(text.split()))


def _count(references: list[list[str]], hypotheses: list[list[str]]) -> ErrorCounts:
    rows = [_count_pair(ref, hyp) for ref, hyp in zip(references, hypotheses, strict=True)]
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    return ErrorCounts(*table.T)


def _count_pair(reference: list[str], hypothesis: list[str]) -> tuple[int, int, int, int]:
    """Return substitutions, insertions, deletions and the reference's length; jiwer refuses empty references."""
    if not reference:
        return 0, len(hypothesis), 0, 0
    # A private character per symbol, joined by spaces, lets one aligner serve words and characters (spaces included).
    table = {symbol: chr(0xF0000 + i) for i, symbol in enumerate(dict.fromkeys([*reference, *hypothesis]))}
    output = jiwer.process_words(" ".join(map(table.get, reference)), " ".join(map(table.get, hypothesis)))
    return output.substitutions, output.insertions, output.deletions, len(reference)


def score(system: str, references: dict[str, str], hypotheses: dict[str, str], seed: int = 0) -> dict[str, Any]:
    """Return what ``score.json`` holds; an utterance without a hypothesis counts with all its words deleted.

    Raises ValueError that names a hypothesis without a reference, and for an empty set of references.
    """
    refs, hyps = paired_texts(references, hypotheses)
    words, chars = word_errors(refs, hyps), char_errors(refs, hyps)
    wer = bootstrap.rate(words.errors, words.totals, seed)
    cer = bootstrap.rate(chars.errors, chars.totals, seed)
    return {
        "system": system,
        "wer": wer.value,
        "wer_low": wer.low,
        "wer_high": wer.high,
        "substitutions": int(words.substitutions.sum()),
        "insertions": int(words.insertions.sum()),
        "deletions": int(words.deletions.sum()),
        "num_words": int(words.totals.sum()),
        "cer": cer.value,
        "cer_low": cer.low,
        "cer_high": cer.high,
        "num_utts": len(refs),
        "num_empty": sum(not text.strip() for text in hyps),
    }


def paired_texts(references: dict[str, str], hypotheses: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return references and hypotheses in the references' order, an absent hypothesis as an empty text."""
    unknown = [utt for utt in hypotheses if utt not in references]
    if unknown:
        raise ValueError(f"{unknown[0]}: hypothesis without a reference ({len(unknown)} such); score the decoded set")
    if not references:
        raise ValueError("no reference to score against; check that the test set has a text file with lines in it")
    return list(references.values()), [hypotheses.get(utt, "") for utt in references]


def compare(
    references: dict[str, str], systems: dict[str, dict[str, str]], against: str, seed: int = 0
) -> dict[str, Any]:
    """Return what ``comparison.json`` holds: each system's WER less that of ``against``, paired over utterances.

    ``systems`` maps a system's name to its hypotheses by utterance. A negative difference is fewer errors than
    ``against`` makes. ``difference`` repeats the entry of the system ``pretrained``.
    """
    counts = {name: word_errors(*paired_texts(references, hyps)) for name, hyps in systems.items()}
    base = counts[against]
    differences = {
        name: bootstrap.difference(found.errors, base.errors, found.totals, seed).as_dict()
        for name, found in counts.items()
        if name != against
    }
    result: dict[str, Any] = {"metric": "wer", "against": against, "differences": differences}
    if "pretrained" in differences:
        result["difference"] = differences["pretrained"]
    return result


def write_results(folder: Path, references: dict[str, str], hypotheses: dict[str, str], result: dict[str, Any]) -> None:
    """Write ``score.json`` and ``errors.tsv`` (one line per utterance, the worst first) into a system's folder."""
    refs, hyps = paired_texts(references, hypotheses)
    words = word_errors(refs, hyps)
    order = sorted(range(len(refs)), key=lambda i: (-int(words.errors[i]), i))
    ids = list(references)
    lines = [f"{ids[i]}\t{words.errors[i]}\t{words.totals[i]}\t{refs[i]}\t{hyps[i]}" for i in order]
    write_text(folder / "errors.tsv", "\n".join(["utterance\terrors\twords\treference\thypothesis", *lines]) + "\n")
    write_json(folder / "score.json", result)


def table(results: list[dict[str, Any]]) -> str:
    """Return the scores of several systems as a text table, rates in percent with their 95 % intervals."""
    lines = [f"{'system':<12} {'WER %':>22} {'sub':>6} {'ins':>6} {'del':>6} {'words':>7} {'CER %':>22} {'empty':>6}"]
    for row in results:
        lines.append(
            f"{row['system']:<12} {_percent(row, 'wer'):>22} {row['substitutions']:>6} {row['insertions']:>6} "
            f"{row['deletions']:>6} {row['num_words']:>7} {_percent(row, 'cer'):>22} {row['num_empty']:>6}"
        )
    return "\n".join(lines)


def _percent(row: dict[str, Any], name: str) -> str:
    return f"{100 * row[name]:.1f} [{100 * row[name + '_low']:.1f}, {100 * row[name + '_high']:.1f}]"
