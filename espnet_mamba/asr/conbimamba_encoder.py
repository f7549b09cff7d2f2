"""ConBiMamba as an encoder of ESPnet's ASRTask: paper 1's recogniser (docs/papers.md 3), exact in the padding."""

from __future__ import annotations

import torch
from espnet.nets.pytorch_backend.transformer.embedding import PositionalEncoding
from espnet.nets.pytorch_backend.transformer.subsampling import Conv2dSubsampling, TooShortUttError, check_short_utt
from espnet2.asr.encoder.abs_encoder import AbsEncoder
from torch import Tensor, nn

from espnet_mamba.layers.block import MacaronBlock


class ConBiMambaEncoder(AbsEncoder):
    """Subsampling by 4, ``num_blocks`` macaron blocks with ExtBiMamba (concatenated, then linear), a last layer norm.

    The published configuration still adds sinusoidal positions although it names its position type otherwise, so
    ``pos_enc_layer_type`` is ``abs_pos`` by default; ``none`` leaves them out.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int = 512,
        linear_units: int = 2048,
        num_blocks: int = 12,
        dropout_rate: float = 0.1,
        positional_dropout_rate: float = 0.1,
        input_layer: str | None = "conv2d",
        pos_enc_layer_type: str = "abs_pos",
        cnn_module_kernel: int = 31,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: int = 2,
    ) -> None:
        super().__init__()
        if pos_enc_layer_type not in ("abs_pos", "none"):
            raise ValueError(f"pos_enc_layer_type: {pos_enc_layer_type!r} is not one of: abs_pos none")
        if input_layer not in ("conv2d", None):
            raise ValueError(f"input_layer: {input_layer!r} is not one of: conv2d null")
        if input_layer is None and input_size != output_size:
            raise ValueError(f"input_layer: null takes features of width {output_size}, given {input_size}")
        self._output_size = output_size
        with_positions = pos_enc_layer_type == "abs_pos"
        position = PositionalEncoding(output_size, positional_dropout_rate) if with_positions else nn.Identity()
        if input_layer == "conv2d":
            self.embed = Conv2dSubsampling(input_size, output_size, dropout_rate, position)
        else:
            self.embed = position
        mixer = {"state_size": state_size, "conv_kernel": conv_kernel, "expand": expand, "join": "concat_linear"}
        self.encoders = nn.ModuleList(
            MacaronBlock(output_size, "extbimamba", mixer, linear_units, cnn_module_kernel, dropout_rate, dropout_rate)
            for _ in range(num_blocks)
        )
        self.after_norm = nn.LayerNorm(output_size)

    def output_size(self) -> int:
        """Return the width of the output."""
        return self._output_size

    def forward(
        self, xs_pad: Tensor, ilens: Tensor, prev_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Encode features.

        Args:
            xs_pad: ``(B, L, input_size)``.
            ilens: valid frames ``(B,)``.
            prev_states: not used; ESPnet passes it.

        Returns:
            ``(B, T, output_size)``, valid frames ``(B,)``, None.

        Raises:
            TooShortUttError: fewer frames than the subsampling needs.
        """
        if isinstance(self.embed, Conv2dSubsampling):
            short, limit = check_short_utt(self.embed, xs_pad.shape[1])
            if short:
                raise TooShortUttError(f"has {xs_pad.shape[1]} frames, needs at least {limit}", xs_pad.shape[1], limit)
            xs_pad, _ = self.embed(xs_pad, None)
            # two convolutions of 3 frames and step 2; ESPnet's own mask also counts windows that reach into the padding
            lengths = (((ilens.to(xs_pad.device) - 1) // 2 - 1) // 2).clamp(min=0)
        else:
            xs_pad, lengths = self.embed(xs_pad), ilens.to(xs_pad.device)
        padded = lengths if bool((lengths < xs_pad.shape[1]).any()) else None
        if padded is not None:
            padding = torch.arange(xs_pad.shape[1], device=xs_pad.device) >= lengths[:, None]
            xs_pad = xs_pad.masked_fill(padding[..., None], 0.0)
        for block in self.encoders:
            xs_pad, _ = block(xs_pad, padded)
        return self.after_norm(xs_pad), lengths, None
