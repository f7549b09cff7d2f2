"""Other people's HuBERTs in, ours out: fairseq, Hugging Face, torchaudio."""

from espnet_mamba.models.convert.conversion import Conversion, convert

__all__ = ["Conversion", "convert"]
