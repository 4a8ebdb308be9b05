"""Imports point one way, and only the nodes and the demo know ROS (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "xview_loc"
# From the ground up: a room imports rooms of the lines above its own, never of its own line.
FLOORS = (
    "children errors files geodesy statistics images report",
    "bags camera maps",
    "rig",
    "models simulation vehicle",
    "estimation recordings",
    "datasets",
    "doctor evaluation training",
    "adaptation",
    "nodes",
    "demo",
    "cli",
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
ROS_ROOMS = {"nodes", "demo"}
ROS = {"rclpy", "launch", "launch_ros", "std_srvs", "builtin_interfaces", "rcl_interfaces"}

# Module names without the package's: "maps.store"; a room's own __init__ goes by the room's name.
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


def imported(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports."""
    names = {name.removeprefix("xview_loc.") for name in imported(path) if name.startswith("xview_loc.")}
    # "maps.store.TileStore" names the module maps.store.
    return {name if name in FILES else name.rpartition(".")[0] for name in names} & FILES.keys()


def may_import(room: str, other: str) -> bool:
    """Return True if modules of ``room`` may import modules of ``other``."""
    return other == room or FLOOR_OF[other] < FLOOR_OF[room] or FLOOR_OF[room] == FLOOR_OF[other] == 0


def test_every_room_has_a_floor() -> None:
    assert {module.partition(".")[0] for module in FILES} == FLOOR_OF.keys()


def test_imports_point_downwards() -> None:
    upwards = [
        f"{module} imports {other}"
        for module, path in FILES.items()
        for other in sorted(own_modules(path))
        if not may_import(module.partition(".")[0], other.partition(".")[0])
    ]
    assert upwards == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {module: own_modules(path) for module, path in FILES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


def test_only_nodes_and_demo_import_ros() -> None:
    strangers = [
        f"{module} imports {package}"
        for module, path in FILES.items()
        if module.partition(".")[0] not in ROS_ROOMS
        for package in sorted({name.partition(".")[0] for name in imported(path)})
        if package in ROS or package.endswith("_msgs")
    ]
    assert strangers == []
