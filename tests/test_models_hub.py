"""The Hub's mixin over our model folder, offline."""

import huggingface_hub.hub_mixin
import pytest
import torch

from espnet_mamba.models import hub
from espnet_mamba.models.checkpoints import load_checkpoint, save_checkpoint
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.hub import FILES, HubHubertModel
from espnet_mamba.models.hubert import HubertModel

CONVS = ((8, 10, 5),) + ((8, 3, 2),) * 4 + ((8, 2, 2),) * 2
CONFIG = HubertConfig("tiny", conv_layers=CONVS, embed_dim=16, num_layers=1, state_size=4, position_kernel=8)
WAVS = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(HubertModel(CONFIG), tmp_path / "model", "# my card\n")
    return tmp_path / "model"


def states(model):
    with torch.no_grad():
        return torch.stack(model.eval().extract_features(WAVS)[0])


def test_local_folder_both_ways(folder, tmp_path):
    model = HubHubertModel.from_pretrained(folder)
    assert not model.training and model.config == CONFIG
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    model.save_pretrained(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*FILES, "notes.txt"])
    assert (tmp_path / "out/README.md").read_text() == "# my card\n"
    plain, again = load_checkpoint(tmp_path / "out"), HubHubertModel.from_pretrained(tmp_path / "out")
    assert torch.equal(states(plain), states(model)) and torch.equal(states(again), states(model))
    fresh = HubHubertModel(CONFIG)
    fresh.save_pretrained(tmp_path / "fresh")
    assert "# tiny" in (tmp_path / "fresh/README.md").read_text()
    assert torch.equal(states(load_checkpoint(tmp_path / "fresh")), states(fresh))


def test_push_sends_the_three_files(folder, monkeypatch):
    sent = {}

    class Api:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, repo_id, **options):
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **options):
            sent.update(repo=repo_id, files=sorted(p.name for p in folder_path.iterdir()))
            sent["states"] = states(load_checkpoint(folder_path))
            return "done"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    model = HubHubertModel.from_pretrained(folder)
    assert model.push_to_hub("someone/tiny", token="t") == "done"
    assert (sent["repo"], sent["token"], sent["files"]) == ("someone/tiny", "t", sorted(FILES))
    assert torch.equal(sent["states"], states(model))


def test_name_on_the_hub_fetches_the_three_files(folder, monkeypatch):
    asked = []

    def fetch(repo_id, **options):
        asked.append((repo_id, options["revision"], options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", lambda **_: str(folder / "config.json"))
    model = HubHubertModel.from_pretrained("someone/tiny", revision="v1")
    assert asked == [("someone/tiny", "v1", FILES)]
    assert torch.equal(states(model), states(load_checkpoint(folder)))


def test_another_kind_of_folder_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="another kind of model"):
        HubHubertModel.from_pretrained(folder)
