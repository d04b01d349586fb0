"""The benchmark of gradients: every mask, checked before it is timed."""

import dataclasses

import pytest


def test_gradients_of_every_mask_are_timed(monkeypatch, capsys):
    pytest.importorskip("scipy", reason="the sparse pattern is ordered by scipy")
    import masked_gradients as bench

    monkeypatch.setattr(bench.measure, "read_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(bench.measure, "multiply_rate", lambda dtype, device: 1e11)
    monkeypatch.setitem(bench.PLANS, "cpu", dataclasses.replace(bench.PLANS["cpu"], size=192))
    result = bench.run("cpu", (192,), with_flex=True, seconds=0)
    assert [row["pattern"] for row in result["rows"]] == 2 * list(bench.PATTERNS)
    causal = result["rows"][0]
    assert {"pyspec", "base", "sdpa", "sdpa causal"} <= set(causal["ms"]) and "flex" not in causal["ms"]
    assert causal["floor_ms"] == pytest.approx(10 * 8 * 64 * (192 * 193 / 2) / 1e8)
    assert len(result["targets"]) == 6
    assert "no backward on a CPU" in capsys.readouterr().out
