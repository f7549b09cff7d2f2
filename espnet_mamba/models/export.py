"""Stage 7: the model that S3PRL and ESPnet load, with a card of its own numbers, and its random control."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from espnet_mamba.models.checkpoints import load_checkpoint, save_checkpoint
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.hubert import HubertModel


def export_upstream(model_dir: Path, out_dir: Path, random_dir: Path | None, seed: int) -> HubertModel:
    """Write ``out_dir`` from a trained model folder, and ``random_dir``, the same architecture with fresh weights.

    Returns:
        The exported model.
    """
    model = load_checkpoint(model_dir)
    save_checkpoint(model, out_dir, model_card(model.config, model, validation_rows(model_dir.parent)))
    if random_dir is not None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            control = HubertModel(model.config)
        card = f"# {model.config.name}, random weights\n\nThe untrained control of `{out_dir.name}`, seed {seed}.\n"
        save_checkpoint(control, random_dir, card)
    return model


def model_card(config: HubertConfig, model: HubertModel, rows: list[dict[str, float]]) -> str:
    """Return a model card in Markdown; its numbers are the run's own."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"# {config.name}",
        "",
        "A self-supervised speech model of espnet-mamba: 16 kHz audio in, one hidden state per layer at "
        f"{16000 / config.downsample_rate:g} Hz out.",
        "",
        f"- parameters: {parameters}",
        f"- layers: {config.num_layers} x {config.mixer}, width {config.embed_dim}, states {config.state_size}",
        f"- look-ahead: {model.look_ahead_ms:g} ms",
    ]
    if rows:
        best = min(rows, key=lambda row: row["loss"])
        lines += [
            f"- validation at step {best['step']}: loss {best['loss']:.4f}, "
            f"accuracy on masked frames {best['accuracy_masked']:.4f}"
        ]
    usage = ["import s3prl_upstream", "from s3prl.nn import S3PRLUpstream"]
    usage.append(f'model = S3PRLUpstream("mamba_hubert", path_or_url="path/to/{config.name}").eval()')
    return "\n".join([*lines, "", "```python", *usage, "```", ""])


def validation_rows(run_dir: Path) -> list[dict[str, float]]:
    """Return the validations that a training run has logged, in order; none where there is no log."""
    path = run_dir / "train_log.jsonl"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["split"] == "valid"]
