"""Simulated drives for the commands that localise them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from xview_loc.cli.console import UsageError

if TYPE_CHECKING:
    from xview_loc.estimation.localizer import Localizer
    from xview_loc.estimation.observation import Observation
    from xview_loc.models.base import CrossViewModel


@contextmanager
def simulated_drive(
    net: CrossViewModel, style: str, seed: int, frames: int, heading_known: bool
) -> Iterator[tuple[Localizer, Iterator[tuple[Observation, tuple[float, float]]]]]:
    """Open a localizer on the map of city ``seed`` and drive through the city.

    Yields the localizer and the drive's observations, one a second, each with its true (lat, lon).
    Raises UsageError on an unknown style.
    """
    from xview_loc.estimation.localizer import Localizer
    from xview_loc.estimation.observation import Observation
    from xview_loc.simulation.city import build_city
    from xview_loc.simulation.drives import DriveOptions, drive
    from xview_loc.simulation.styles import STYLES
    from xview_loc.simulation.views import PanoramaView

    if style not in STYLES:
        raise UsageError(f"unknown style {style!r}; choose from {', '.join(STYLES)}")
    city = build_city(seed, style)
    view = PanoramaView(*net.spec.ground_size)

    def observations() -> Iterator[tuple[Observation, tuple[float, float]]]:
        for frame in drive(city, frames, options=DriveOptions(rate_hz=1.0), view=view):
            if frame.image is not None:
                fix, heading = frame.fix, frame.heading if heading_known else None
                observation = Observation(
                    frame.image, fix.lat, fix.lon, fix.covariance, heading, frame.heading_std
                )
                yield observation, (frame.truth.lat, frame.truth.lon)

    prior = 0.0 if heading_known else None
    with tempfile.TemporaryDirectory() as folder:
        map_file = city.write_geotiff(Path(folder) / "city.tif")
        with Localizer.open(map_file, net, heading_prior_deg=prior) as localizer:
            yield localizer, observations()
