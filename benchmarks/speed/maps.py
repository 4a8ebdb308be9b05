"""Measure the milliseconds to cut a 512 px aerial tile at 0.14 m/px, from every kind of map.

benchmarks/speed/maps.py [--places 8] [--json FILE]

``opened``: from a map just opened. ``again``: the same tile a second time from the same map. ``kept``: from
the tile store, as for consecutive frames.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from xview_loc.maps import open_map
from xview_loc.maps.base import MapOptions
from xview_loc.maps.store import TileStore
from xview_loc.simulation.city import build_city

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "test"))
from map_fixtures import TileServer, write_mbtiles, write_pmtiles

SIZE, GSD = 512, 0.14


def ms(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def measure(source: str, places: list[tuple[float, float]], cache: Path | None) -> dict[str, float]:
    """Return medians over the places."""
    times: dict[str, list[float]] = {"opened": [], "again": [], "kept": []}
    for index, (lat, lon) in enumerate(places):
        folder = cache and cache / str(index)
        with open_map(source, MapOptions(cache_dir=folder, deadline_s=60.0)) as aerial:
            times["opened"].append(ms(lambda m=aerial, p=(lat, lon): m.tile(*p, SIZE, GSD)))
            times["again"].append(ms(lambda m=aerial, p=(lat, lon): m.tile(*p, SIZE, GSD)))
            store = TileStore(aerial, SIZE, GSD)
            store.around(lat, lon)
            times["kept"].append(ms(lambda s=store, p=(lat, lon): s.around(*p)))
            store.close()
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--places", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        city = build_city(7, "source", size_m=420.0)
        tif = city.write_geotiff(folder / "city.tif")
        step = 200.0 / arguments.places
        places = [city.to_latlon(-100.0 + step * k, 60.0 - step * k / 2) for k in range(arguments.places)]
        results["GeoTIFF"] = measure(str(tif), places, None)
        results["MBTiles"] = measure(str(write_mbtiles(folder / "a.mbtiles", tif, (19, 20))), places, None)
        results["PMTiles"] = measure(str(write_pmtiles(folder / "a.pmtiles", tif, (19, 20))), places, None)
        with TileServer(tif, max_zoom=20) as server:
            results["XYZ, empty disk cache"] = measure(server.url, places, folder / "cache")
            results["XYZ, full disk cache"] = measure(server.url, places, folder / "cache")
    table = Table("map", "opened", "again", "kept", title=f"{SIZE} px at {GSD} m/px, ms")
    for source, row in results.items():
        table.add_row(source, *(f"{row[k]:.2f}" for k in ("opened", "again", "kept")))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
