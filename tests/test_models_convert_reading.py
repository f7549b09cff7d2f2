"""Files of strangers: tensors and settings are read, code is not run."""

import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch

from espnet_mamba.models.convert.fairseq import model_settings, parse_conv_layers
from espnet_mamba.models.convert.reading import StandIn, plain, read_tensor_file

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3)}


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refused(path):
    with pytest.raises(ValueError, match=str(path)) as error:
        read_tensor_file(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_malicious_checkpoint_is_refused_and_does_not_run(tmp_path, zipped):
    path, trap = tmp_path / "a.pt", tmp_path / "ran"
    torch.save({"model": TENSORS, "cfg": Payload(trap)}, path, _use_new_zipfile_serialization=zipped)
    assert "refused: its pickle asks for posix.mkdir" in refused(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # it was a real one


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_bare_pickle_is_refused_and_does_not_run(tmp_path, protocol):
    path, trap = tmp_path / "a.pt", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Payload(trap), protocol))
    refused(path)
    assert not trap.exists()
    pickle.loads(path.read_bytes())
    assert trap.exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "builtins.getattr", "fairsequel.x", "torch.hub.load"])
def test_names_that_are_no_settings_are_refused(tmp_path, name):
    """A pickle may ask for any name without calling it; only those of settings are replaced."""
    module, _, function = name.rpartition(".")
    path = tmp_path / "a.pt"
    torch.save(TENSORS, path)
    rewrite_pickle(path, f"c{module}\n{function}\n.".encode())
    assert name.removeprefix("builtins.") in refused(path)


def rewrite_pickle(path, code):
    """Put another pickle into a file of torch.save."""
    with torch.serialization._open_zipfile_writer(str(path)) as archive:
        archive.write_record("data.pkl", code, len(code))
        archive.write_record("version", b"3\n", 2)


def test_names_of_settings_do_nothing(tmp_path, monkeypatch):
    ran = []

    def explode(*args):
        ran.append(args)

    module = types.ModuleType("fairseq.evil")
    explode.__module__, explode.__qualname__, module.explode = "fairseq.evil", "explode", explode
    for name in ("fairseq", "fairseq.evil"):
        monkeypatch.setitem(sys.modules, name, module)

    class Evil:
        def __reduce__(self):
            return explode, ("now",)

    allowed = torch.serialization.get_safe_globals()
    torch.save({"model": TENSORS, "cfg": Evil()}, tmp_path / "a.pt")
    contents = read_tensor_file(tmp_path / "a.pt")
    assert not ran and isinstance(contents["cfg"], StandIn) and plain(contents["cfg"]) is None
    assert torch.equal(contents["model"]["weight"], TENSORS["weight"])
    assert torch.serialization.get_safe_globals() == allowed  # nothing stays allowed
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert ran


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_settings_become_plain_values(tmp_path, zipped):
    omegaconf = pytest.importorskip("omegaconf")
    values = {"model": {"layers": [1, 2], "name": "hubert", "rate": 0.1, "none": None, "flag": True}, "task": {}}
    loop = {}
    loop["self"] = loop
    meters = {"best": np.float64(3.0), "all": np.zeros(3)}
    contents = {"cfg": omegaconf.OmegaConf.create(values), "lr": {1: 2.0}, "loop": loop, **meters}
    torch.save(contents, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    contents = read_tensor_file(tmp_path / "a.pt")
    assert plain(contents["best"]) is None and list(plain(contents["loop"])) == ["self"]
    assert plain(contents["cfg"]) == values and plain(contents["lr"]) == {}
    assert model_settings(contents) == values["model"] and model_settings({"cfg": None, "args": None}) == {}


def test_damaged_files_are_one_line(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"model": TENSORS}, path)
    whole = path.read_bytes()
    for end in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:end])
        refused(path)


def test_conv_layers_are_parsed_not_evaluated():
    assert parse_conv_layers("[(512,10,5)] + [(512,3,2)] * 2", "x") == [(512, 10, 5), (512, 3, 2), (512, 3, 2)]
    for text in ("__import__('os')", "[(1,2)]", "[(1,2,3)] * 10**9", "[" * 500, "3", "", "[(1,2,'x')]"):
        with pytest.raises(ValueError, match="x: conv_feature_layers: .* is not a list of layers"):
            parse_conv_layers(text, "x")
