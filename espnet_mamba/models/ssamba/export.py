"""Stage 7 for SSAMBA: the model that S3PRL loads, with a card of its own numbers, and its random control."""

from __future__ import annotations

from pathlib import Path

import torch

from espnet_mamba.models.export import validation_rows
from espnet_mamba.models.ssamba.checkpoints import load_checkpoint, save_checkpoint
from espnet_mamba.models.ssamba.model import SsambaModel


def export_upstream(model_dir: Path, out_dir: Path, random_dir: Path | None, seed: int) -> SsambaModel:
    """Write ``out_dir`` from a trained model folder, and ``random_dir``, the same architecture with fresh weights.

    Returns:
        The exported model.
    """
    model = load_checkpoint(model_dir)
    save_checkpoint(model, out_dir, model_card(model, validation_rows(model_dir.parent)))
    if random_dir is not None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            control = SsambaModel(model.config)
        card = f"# {model.config.name}, random weights\n\nThe untrained control of `{out_dir.name}`, seed {seed}.\n"
        save_checkpoint(control, random_dir, card)
    return model


def model_card(model: SsambaModel, rows: list[dict[str, float]]) -> str:
    """Return a model card in Markdown; its numbers are the run's own (``rows``: validations)."""
    config, parameters = model.config, sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"# {config.name}",
        "",
        "An SSAMBA model of espnet-mamba: 16 kHz audio in, one hidden state per pair of blocks out, "
        f"a column of patches every {config.downsample_rate / 16:g} ms.",
        "",
        f"- parameters: {parameters}",
        f"- blocks: {config.depth}, width {config.embed_dim}, states {config.state_size}, residual {config.residual}",
        "- look-ahead: the whole utterance",
    ]
    if rows:
        best = min(rows, key=lambda row: row["loss"])
        lines.append(
            f"- validation at step {best['step']}: loss {best['loss']:.4f} (InfoNCE {best['loss_info_nce']:.4f}, "
            f"squared error {best['loss_mse']:.4f}), accuracy on masked patches {best['accuracy_masked']:.4f}"
        )
    usage = ["import s3prl_upstream", "from s3prl.nn import S3PRLUpstream"]
    usage.append(f'model = S3PRLUpstream("ssamba", path_or_url="path/to/{config.name}").eval()')
    return "\n".join([*lines, "", "```python", *usage, "```", ""])
