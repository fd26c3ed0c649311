"""The roofline's picture, and what is refused before anything is measured."""

import importlib.util

import pytest

from miniinfer_jax.benchmark.plot import PlotPoint, check_can_plot, draw_roofline, roof
from miniinfer_jax.benchmark.roofline import Ceilings

CEILINGS = Ceilings(bytes_per_second=4e12, operations_per_second=800e12)


def test_the_roof_has_two_sides():
    assert roof(1, CEILINGS) == 4e12 and roof(200, CEILINGS) == roof(1000, CEILINGS) == 800e12


def test_a_png_is_drawn(tmp_path):
    path = tmp_path / "roofline.png"
    check_can_plot(path)
    draw_roofline(path, "a model", CEILINGS, [PlotPoint("decode", 1e9, 2e9, 1e-3), PlotPoint("prefill", 1e9, 1e12, 1)])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"must end in \.png"):
        check_can_plot(tmp_path / "roofline.svg")
    with pytest.raises(ValueError, match="create it first"):
        check_can_plot(tmp_path / "absent" / "roofline.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'miniinfer-jax\[plot\]'"):
        check_can_plot(tmp_path / "roofline.png")
