"""Model folders on the Hugging Face Hub: ``from_pretrained``, ``save_pretrained``, ``push_to_hub`` by its own mixin."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download

from espnet_mamba.models.checkpoints import CARD, CONFIG, WEIGHTS, load_checkpoint, save_checkpoint
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.export import model_card
from espnet_mamba.models.hubert import HubertModel

FILES = [CONFIG, WEIGHTS, CARD]


class HubHubertModel(HubertModel, ModelHubMixin, library_name="espnet-mamba"):
    """A ``HubertModel`` that the Hub can hold. What it saves is this project's model folder.

    ``HubHubertModel.from_pretrained("exp/upstream").push_to_hub("user/name")`` publishes a folder;
    ``HubHubertModel.from_pretrained("user/name")`` fetches one. A local folder needs no network.
    """

    def __init__(self, config: HubertConfig) -> None:
        super().__init__(config)
        self.card: str | None = None  # README.md of the folder that it came from

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the three files, each replaced in one step: what else stands in the folder stays."""
        card = self.card or model_card(self.config, self, [])
        with tempfile.TemporaryDirectory(dir=save_directory) as temporary:
            folder = Path(temporary) / "model"
            save_checkpoint(self, folder, card)
            for name in FILES:
                os.replace(folder / name, save_directory / name)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **model_kwargs: Any,
    ) -> HubHubertModel:
        """Load a local folder, or download one first; in eval mode.

        Raises:
            FileNotFoundError, ValueError: see ``load_checkpoint``.
        """
        folder = model_id
        if not Path(model_id).is_dir():
            folder = snapshot_download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=FILES,
            )
        loaded = load_checkpoint(folder)
        model = cls(loaded.config)
        model.load_state_dict(loaded.state_dict())
        card = Path(folder) / CARD
        model.card = card.read_text(encoding="utf-8") if card.is_file() else None
        return model.eval()
