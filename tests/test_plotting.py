"""The one kit for figures: PNG without global state, themes, panels, an error that names the remedy."""

import io
import sys

import numpy as np
import pytest

from alora_kernels import plotting

matplotlib = pytest.importorskip("matplotlib")


def pixels(data: bytes) -> np.ndarray:
    from matplotlib.image import imread

    return imread(io.BytesIO(data), format="png")


def test_panels_are_drawn_saved_and_equal_to_the_byte(tmp_path):
    drawn = []
    for _ in range(2):
        made, axes = plotting.panels(3, 2)
        assert len(axes) == 3
        axes[0].plot([0, 1], [0, 1], color=plotting.BLUE)
        drawn.append(plotting.png(made))
    assert drawn[0] == drawn[1]
    assert plotting.save(made, tmp_path / "new" / "a.png").read_bytes() == drawn[0]
    assert pixels(drawn[0]).shape[:2] == (round(2 * 2.9 * plotting.DPI), round(2 * 4.2 * plotting.DPI))


def test_a_theme_is_the_paper_of_its_figures_and_of_no_others():
    before = dict(matplotlib.rcParams)
    corner = {}
    for name, theme in {"light": plotting.LIGHT, "dark": plotting.DARK}.items():
        with plotting.themed(theme):
            made = plotting.figure(2, 2)
            made.subplots().set_title("$ is a dollar sign")
            corner[name] = pixels(plotting.png(made))[0, 0, :3]
        expected = [int(theme["paper"][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert corner[name] == pytest.approx(expected, abs=1e-2)
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or matplotlib.pyplot.get_fignums() == []


def test_without_matplotlib_the_error_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plotting.figure(1, 1)
    with pytest.raises(ImportError, match="or do without"):
        plotting.check_matplotlib("or do without")
