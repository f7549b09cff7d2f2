"""Sentencepiece units of a training text, in the order of ESPnet's token lists."""

from __future__ import annotations

import io
import re
from pathlib import Path

import sentencepiece

from espnet_mamba.data.files import atomic_path, write_text


def make_tokens(texts: list[str], nbpe: int, folder: Path) -> int:
    """Write ``bpe.model`` and ``tokens.txt`` for ``texts`` into ``folder`` and return the number of tokens.

    The list is ``<blank>``, ``<unk>``, the pieces, ``<sos/eos>``: ESPnet takes the first for the CTC blank and the
    last for start and end. When the text does not yield ``nbpe`` pieces the list is shorter and a line says so.
    Raises ValueError when there is no text, or fewer pieces are asked for than the text has characters.
    """
    texts = [" ".join(text.split()) for text in texts if text.strip()]
    if not texts:
        raise ValueError("no transcript to make tokens from; check that the training set's text file is not empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=nbpe,
            model_type="unigram",
            character_coverage=1.0,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain(error, nbpe)) from error
    pieces = _pieces(model.getvalue())
    if len(pieces) + 3 < nbpe:
        print(f"tokens: the text yields {len(pieces)} pieces; the vocabulary is cut from {nbpe} to {len(pieces) + 3}")
    tokens = ["<blank>", "<unk>", *pieces, "<sos/eos>"]
    with atomic_path(folder / "bpe.model") as temporary:
        temporary.write_bytes(model.getvalue())
    write_text(folder / "tokens.txt", "\n".join(tokens) + "\n")
    return len(tokens)


def _pieces(model: bytes) -> list[str]:
    """Return the model's pieces without its own unknown, start and end symbols."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())
    return [processor.id_to_piece(i) for i in ids if not (processor.is_control(i) or processor.is_unknown(i))]


def _explain(error: RuntimeError, nbpe: int) -> str:
    needed = re.search(r"required_chars\.?\s*\D*(\d+) vs (\d+)", str(error))
    if needed:
        return f"--nbpe {nbpe} is fewer than the characters of the text; give at least {needed.group(2)}"
    return f"sentencepiece could not make {nbpe} pieces of this text: {str(error).splitlines()[0]}"
