"""Checks that S3PRL sees in an upstream folder exactly the model that is in it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import s3prl_upstream  # noqa: F401 - registers our upstreams
from espnet_mamba.data.audio import read_audio
from espnet_mamba.models.folders import load_layers, upstream_name
from s3prl_upstream.mamba_hubert.expert import HOP, WINDOW, checked_folder
from s3prl_upstream.rng import rng_preserved

TOLERANCE = 1e-4  # of a layer's root mean square where that is above 1, else of 1


@torch.no_grad()
def check_upstream(folder: Path, wav_paths: list[Path]) -> dict[str, Any]:
    """Compare ``S3PRLUpstream`` with the folder's own model on recordings, alone and padded in one batch.

    An SSAMBA is looked at as the recipe's stages do, at 50 Hz. Returns layers, width, rate (samples per frame),
    parameters and the largest difference, relative in layers whose root mean square is above 1. Raises ValueError when
    it exceeds 1e-4, naming the recording and the layer, when a layer holds NaN or infinity, and when the folder is not
    an upstream.
    """
    from s3prl.nn import S3PRLUpstream

    model = load_layers(checked_folder(folder)).model
    with rng_preserved():
        upstream = S3PRLUpstream(upstream_name(folder), path_or_url=str(folder)).eval()
    wavs = [torch.from_numpy(read_audio(path)) for path in wav_paths]
    lengths = torch.tensor([len(wav) for wav in wavs])
    if not wavs or int(lengths.min()) < WINDOW:
        raise ValueError(f"{folder}: give recordings of at least {WINDOW} samples to check it on")
    batched, _ = upstream(pad_sequence(wavs, batch_first=True), lengths)
    worst = 0.0
    for row, (path, wav) in enumerate(zip(wav_paths, wavs, strict=True)):
        expected, _ = model.extract_features(wav.unsqueeze(0), torch.tensor([len(wav)]))
        alone, _ = upstream(wav.unsqueeze(0), torch.tensor([len(wav)]))
        if len(expected) != len(alone):
            raise ValueError(f"{folder}: {len(alone)} layers through S3PRL, {len(expected)} in the model")
        for layer, reference in enumerate(expected):
            found = max(_distance(reference[0], alone[layer][0]), _distance(reference[0], batched[layer][row]))
            if not found <= TOLERANCE:
                raise ValueError(
                    f"{folder}: layer {layer} of {path} differs by {found:.2g} through S3PRL (limit {TOLERANCE:g}); "
                    "the model's output depends on padding or is not finite"
                )
            worst = max(worst, found)
    return {
        "num_layers": upstream.num_layers,
        "width": upstream.hidden_sizes[0],
        "rate": upstream.downsample_rates[0],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "recordings": len(wavs),
        "largest_difference": worst,
    }


def _distance(reference: Tensor, found: Tensor) -> float:
    """Return the largest difference over the model's own frames (T, D); S3PRL's are at most two more.

    A doubled residual stream grows by two per pair of blocks, and its rounding with it: such layers are scaled.
    """
    scale = max(1.0, reference.square().mean().sqrt().item())
    return (reference - found[: len(reference)]).abs().max().item() / scale


def main() -> None:
    """Check the folders of the command line."""
    parser = argparse.ArgumentParser(prog="python -m s3prl_upstream.check", description=__doc__)
    parser.add_argument("--upstream", type=Path, action="append", required=True, help="may be repeated")
    parser.add_argument("--wav", type=Path, action="append", default=[], help="recording to try; may be repeated")
    args = parser.parse_args()
    for folder in args.upstream:
        result = check_upstream(folder, args.wav)
        print(
            f"{folder}: {result['num_layers']} layers of width {result['width']}, a frame per {result['rate']} samples "
            f"({16000 / HOP:g} Hz), {result['parameters']} parameters, largest difference "
            f"{result['largest_difference']:.1e} over {result['recordings']} recordings"
        )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
