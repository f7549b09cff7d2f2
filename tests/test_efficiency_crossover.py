"""Crossings of curves whose crossing is known; the cost of streams, whose output is that of the whole recording."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from espnet_mamba.efficiency.crossover import all_crossovers, crossing_of_walls, last_crossing, macs_crossovers
from espnet_mamba.efficiency.entries import entry_of_config
from espnet_mamba.efficiency.streaming_cost import StreamRunner, can_stream, streaming_costs
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.models.sizing import stream_state

CAUSAL = HubertConfig(
    name="causal",
    conv_layers=((8, 10, 5), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 2, 2), (8, 2, 2)),
    front_end="conv_layer",
    embed_dim=16,
    num_layers=2,
    mixer="mamba",
    state_size=4,
    num_heads=2,
    head_dim=8,
    position="causal_conv",
    position_kernel=8,
    position_groups=4,
)
LENGTHS = [1.0, 10.0, 100.0, 1000.0]


def test_power_laws_cross_where_they_do():
    linear, square = [8.0 * x for x in LENGTHS], [0.2 * x**2 for x in LENGTHS]  # equal at 40
    assert last_crossing(LENGTHS, linear, square) == pytest.approx(40.0)
    assert last_crossing(LENGTHS, square, linear) is None
    assert last_crossing(LENGTHS, [x / 2 for x in linear], linear) is None  # always below
    assert last_crossing([1.0], [2.0], [1.0]) is None


def test_the_last_of_several_crossings_counts():
    assert last_crossing(LENGTHS, [2.0, 1.0, 4.0, 1.0], [1.0, 2.0, 2.0, 2.0]) == pytest.approx(100 * 10**0.5)


def test_the_interval_follows_the_spread():
    rng = np.random.default_rng(3)

    def repeats(value, spread):
        return (value * np.exp(spread * rng.standard_normal(9))).tolist()

    def curves(spread):
        linear = {x: repeats(8.0 * x, spread) for x in LENGTHS}
        return linear, {x: repeats(0.2 * x**2, spread) for x in LENGTHS}

    narrow, wide = crossing_of_walls(*curves(0.01)), crossing_of_walls(*curves(0.2))
    for found, low, high, share in (narrow, wide):
        assert low <= found <= high and low < 40.0 * 1.2 and high > 40.0 / 1.2 and share == 1.0
    assert narrow[2] - narrow[1] < 0.2 * (wide[2] - wide[1])


def test_only_common_lengths_of_one_mode_are_compared():
    slow = {x: [8.0 * x] for x in LENGTHS}
    square = {x: [0.2 * x**2] for x in LENGTHS[:3]}  # it ends at 100
    series = {("a", "eval", "one"): slow, ("b", "eval", "one"): square, ("b", "train", "one"): slow}
    (crossing,) = all_crossovers(series, "wall", True)
    assert (crossing.passes, crossing.passed, crossing.mode) == ("a", "b", "eval")
    assert str(crossing) == "a passes b at 40 s (wall, eval, batch of one)"


def test_one_call_at_each_length_gives_no_interval():
    found, low, high, share = crossing_of_walls({x: [8.0 * x] for x in LENGTHS}, {x: [0.2 * x**2] for x in LENGTHS})
    assert found == pytest.approx(40.0) and np.isnan(low) and np.isnan(high) and share == 1.0


def test_formulas_cross_where_algebra_says():
    """Attention's products are 2 T^2 D a layer: they make up a difference of d MACs a second at T^2 D L 2 / seconds."""
    plain = replace(CAUSAL, name="attending", mixer="attention", ffn_dim=16)
    other = replace(CAUSAL, name="other")
    of = {c.name: (lambda s, c=c: sum(entry_of_config(c).macs_per_second(s).values())) for c in (plain, other)}
    (crossing,) = macs_crossovers(of)
    assert crossing.passes == "other" and of["other"](crossing.seconds) == pytest.approx(
        of["attending"](crossing.seconds), rel=2e-3
    )


@pytest.mark.parametrize(
    "change",
    [{}, {"mixer": "causal_attention"}, {"mixer": "mamba2"}, {"position": "none"}, {"ffn_dim": 8}],
    ids=["mamba", "causal_attention", "mamba2", "no position", "feed-forward"],
)
def test_chunks_give_what_the_whole_gives(change):
    config = replace(CAUSAL, **change)
    model = HubertModel(config).eval()
    wavs = torch.randn(2, 16000)
    runner = StreamRunner(model, 2)
    sizes = [7, 393, 320, 640, 1000, 2000, 16000 - 4360]  # the first two complete no frame and the first one
    with torch.inference_mode():
        whole = model.extract_features(wavs)[0][-1]
    parts = torch.cat([runner(chunk) for chunk in wavs.split(sizes, dim=1)], 1)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "causal_attention"])
def test_state_is_as_large_as_the_formula_says(mixer):
    config = replace(CAUSAL, mixer=mixer)
    runner = StreamRunner(HubertModel(config).eval())
    runner(torch.randn(1, 400 + 49 * 320))  # 50 frames, 1 s
    assert runner.state_bytes() == stream_state(config).num_bytes(1.0)
    runner.assume_history(3.0)
    assert runner.state_bytes() == stream_state(config).num_bytes(3.0)


def test_costs_of_chunks_add_up_and_models_that_look_ahead_are_refused():
    threads = torch.get_num_threads()
    model = HubertModel(replace(CAUSAL, mixer="causal_attention"))
    rows = streaming_costs(model, [20.0, 100.0], [1.0, 2.0], [2])
    assert [(r["chunk_ms"], r["history_seconds"]) for r in rows] == [(20, 1), (100, 1), (20, 2), (100, 2)]
    for row in rows:
        assert row["wall_min"] <= row["wall_median"] <= row["wall_max"]
        assert row["streams_per_core"] == pytest.approx(2 * row["chunk_ms"] / 1000 / row["wall_median"])
    assert rows[2]["state_bytes"] - rows[0]["state_bytes"] == stream_state(model.config).growing["attention"]
    assert torch.get_num_threads() == threads
    for change in ({"mixer": "extbimamba"}, {"position": "conv"}, {"front_end": "conv_group"}):
        other = HubertModel(replace(CAUSAL, **change))
        assert not can_stream(other)
        with pytest.raises(ValueError, match="only causal models run in chunks"):
            StreamRunner(other)
