"""ESPnet's own encoders behind HuBERT's front end, as peers of the efficiency stage, at HuBERT Base's parameters.

The front end is ours, so that the encoders differ in their blocks alone; they read its 512 channels at 50 Hz.
"""

from __future__ import annotations

import torch
from espnet2.asr.encoder.abs_encoder import AbsEncoder
from espnet2.asr.encoder.conformer_encoder import ConformerEncoder
from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder
from torch import Tensor, nn

from espnet_mamba.layers.conv_frontend import ConvFrontEnd
from espnet_mamba.models.config import BASE_CONV_LAYERS

WIDTH, HEADS = 512, 8
# Inner widths that bring 12 blocks, with the front end, to within 1 % of the 94.37 M of a headless HuBERT Base.
CONFORMER_FFN, E_BRANCHFORMER_FFN = 2616, 1968


class EspnetPeer(nn.Module):
    """HuBERT's front end, a linear layer, and an encoder of ESPnet's."""

    def __init__(self, encoder: AbsEncoder) -> None:
        super().__init__()
        self.front_end = ConvFrontEnd(BASE_CONV_LAYERS)
        self.encoder = encoder

    def extract_features(self, wavs: Tensor, num_samples: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Return the last layer alone; every row of ``wavs (B, S)`` must be full."""
        x = self.front_end(wavs)
        lengths = torch.full((len(x),), x.shape[1], device=x.device)
        output, lengths, _ = self.encoder(x, lengths)
        return [output], lengths


def conformer(num_blocks: int = 12) -> EspnetPeer:
    """Return ESPnet's Conformer: relative positions, macaron feed-forward parts, convolutions over 31 frames."""
    return EspnetPeer(
        ConformerEncoder(
            BASE_CONV_LAYERS[-1][0],
            WIDTH,
            HEADS,
            CONFORMER_FFN,
            num_blocks=num_blocks,
            input_layer="linear",
            macaron_style=True,
            rel_pos_type="latest",
            use_flash_attn=False,
        )
    )


def e_branchformer(num_blocks: int = 12) -> EspnetPeer:
    """Return ESPnet's E-Branchformer: attention and a gated convolution side by side, macaron feed-forward parts."""
    return EspnetPeer(
        EBranchformerEncoder(
            BASE_CONV_LAYERS[-1][0],
            WIDTH,
            HEADS,
            cgmlp_linear_units=2048,
            num_blocks=num_blocks,
            input_layer="linear",
            rel_pos_type="latest",
            attention_layer_type="rel_selfattn",
            pos_enc_layer_type="rel_pos",
            use_ffn=True,
            macaron_ffn=True,
            linear_units=E_BRANCHFORMER_FFN,
            use_flash_attn=False,
        )
    )
