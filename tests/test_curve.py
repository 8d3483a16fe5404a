"""Accuracy against time."""

import json

from pyrozoo.zoo import curve, runs


def test_points_are_in_order_and_lines_are_kept(tmp_path, monkeypatch):
    spec = runs.load_experiment("jiang2017_vade_digits_balanced")
    spec = runs.with_overrides(spec, fit={"epochs": 2}, options={"hidden": [16], "latent_dim": 2})
    monkeypatch.setattr(runs, "load_experiment", lambda name: spec)
    curve.main("any", tmp_path, "1,2")
    record = json.loads((tmp_path / "any.json").read_text())
    assert list(record["lines"]) == ["1", "2"]
    for points in record["lines"].values():
        seconds, accuracy = zip(*points, strict=True)
        assert len(points) == 3  # after the pretraining, and after each epoch
        assert list(seconds) == sorted(seconds)
        assert all(0.1 <= a <= 1 for a in accuracy)
    assert (tmp_path / "any.png").stat().st_size > 5000
    curve.main("any", tmp_path, "3,1")
    again = json.loads((tmp_path / "any.json").read_text())
    assert list(again["lines"]) == ["1", "2", "3"]
    assert again["lines"]["1"] == record["lines"]["1"]
