"""Comparison of the accuracy matrices of runs on different numbers of processes."""

from typing import Any

import pytest


def assert_same_matrix(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compare two `AccuracyMatrix.to_dict()`: what is counted in images exactly, confidences as exactly as float32 is."""
    found, wanted = dict(found), dict(wanted)
    ours, theirs = found.pop("reliability", []), wanted.pop("reliability", [])
    for name in ("ece", "ece_largest", "nll", "drift_r2"):
        assert found.pop(name, None) == pytest.approx(wanted.pop(name, None), rel=1e-3)
    assert pytest.approx(wanted.pop("drift", {}), rel=1e-3) == found.pop("drift", {})
    assert found.keys() == wanted.keys()
    different = {name: (found[name], wanted[name]) for name in found if found[name] != wanted[name]}
    assert not different, different
    for own, other in zip(ours, theirs, strict=True):
        assert (sum(own["images"]), sum(own["hits"])) == (sum(other["images"]), sum(other["hits"]))
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert sum(own["confidence"]) == pytest.approx(sum(other["confidence"]), rel=1e-3)
