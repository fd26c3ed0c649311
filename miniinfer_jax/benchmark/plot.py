"""The roofline as a picture: the measured ceilings, and where the measured work stands below them."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from miniinfer_jax.benchmark.roofline import Ceilings


@dataclass(frozen=True)
class PlotPoint:
    """Work that was measured: its bytes and operations (the least, by the architecture) and the seconds it took."""

    label: str
    num_bytes: float
    operations: float
    seconds: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.num_bytes

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.operations / self.seconds


def check_can_plot(path: Path) -> None:
    """Raises ValueError, before anything is measured, for a file that cannot be drawn."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"the plot's file is {str(path)!r}; it must end in .png")
    if not path.parent.is_dir():
        raise ValueError(f"the plot's folder {str(path.parent)!r} does not exist; create it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install 'miniinfer-jax[plot]'")


def roof(intensity: float, ceilings: Ceilings) -> float:
    """Operations a second that the ceilings allow at so many operations a byte."""
    return min(intensity * ceilings.bytes_per_second, ceilings.operations_per_second)


def draw_roofline(path: Path, title: str, ceilings: Ceilings, points: list[PlotPoint]) -> None:
    """Writes the roofline and the points, both axes logarithmic, as a PNG."""
    from matplotlib.figure import Figure

    ridge = ceilings.operations_per_second / ceilings.bytes_per_second
    lowest = min(ridge, *(point.intensity for point in points)) / 4
    highest = max(ridge, *(point.intensity for point in points)) * 4
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    corners = [lowest, ridge, highest]
    axes.loglog(corners, [roof(corner, ceilings) for corner in corners], color="black", label="measured ceilings")
    for point in points:
        share = point.rate / roof(point.intensity, ceilings)
        axes.loglog([point.intensity], [point.rate], "o", label=f"{point.label}: {share:.1%} of the roof")
    axes.set(title=title, xlabel="operations a byte", ylabel="operations a second")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize="small")
    figure.savefig(path)
