"""Names and messages from outside are cut and escaped wherever they are shown."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.table import Table

from xview_loc.cli.console import PlainConsole
from xview_loc.errors import LONGEST
from xview_loc.report import Page

HOSTILE = "\x1b]0;title\x07\x1b[31m[bold red]x[/] :smile: \x9b2J\u202e<script>alert(1)</script>'\""


def printed(*objects: object) -> str:
    output = io.StringIO()
    PlainConsole(file=output, force_terminal=True, width=400, highlight=False).print(*objects, soft_wrap=True)
    return output.getvalue()


def test_the_console_shows_text_as_it_is() -> None:
    """In lines and in tables; colours of our own stay."""
    table = Table(HOSTILE, "b")
    table.add_row("c", HOSTILE)
    for text in (printed(HOSTILE), printed(table)):
        assert "\\x1b]0;title\\x07\\x1b[31m[bold red]x[/] :smile: \\x9b2J\\u202e<script>" in text
        assert "\x07" not in text and "\x1b]" not in text and "\x9b" not in text and "\u202e" not in text
    assert printed("a\nb") == "a\nb\n"


def test_pages_hold_no_markup_from_outside(tmp_path: Path) -> None:
    page = Page(HOSTILE)
    page.heading(HOSTILE)
    page.text(HOSTILE)
    page.link(HOSTILE, HOSTILE)
    page.table([HOSTILE], [[HOSTILE]])
    page.write(tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not set("\x1b\x07\x9b\u202e") & set(text)


def test_diagnostics_are_cut_and_escaped() -> None:
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    from xview_loc.nodes.diagnostics import WARN, Health

    health = Health("fine")
    health.value("frame", HOSTILE + "x" * 1_000_000)
    health.condition("odom", WARN, f"in frame {HOSTILE * 100_000}")
    health.rejected("image_invalid", f"encoding {HOSTILE * 100_000}")
    status = health.report("localizer")
    for text in (status.message, *(pair.value for pair in status.values)):
        assert text.isprintable() and len(text) <= 3 * LONGEST, text


def test_a_flood_of_messages_is_no_flood_of_lines(tmp_path: Path) -> None:
    """Initial poses in another hostile frame each: a line a second, without control characters."""
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    import time

    from geometry_msgs.msg import PoseWithCovarianceStamped
    from map_fixtures import texture, write_geotiff
    from ros_harness import NodeProcess, bench, pick_domain

    map_ = write_geotiff(tmp_path / "map.tif", texture(600, 600), 48.2, 16.37, 0.5, "EPSG:32633")
    parameters = {"model": "ccvpe-small", "backend": "torch", "map": str(map_), "filter": True}
    parameters |= {"datum_lat": 48.2, "datum_lon": 16.37}
    domain = pick_domain()
    with bench(domain) as here:
        node = NodeProcess(domain, tmp_path / "log.txt", parameters, module="xview_loc.nodes.localizer_node")
        try:
            poses = here.publisher(PoseWithCovarianceStamped, "initialpose")
            here.wait(poses.get_subscription_count, what="the subscription")
            here.wait_diagnosis()
            began = time.monotonic()

            def publish() -> bool:
                message = PoseWithCovarianceStamped()
                message.header.frame_id = HOSTILE + f"{time.monotonic_ns()}" + "y" * 10_000
                poses.publish(message)
                return int(here.value("initialpose_received") or 0) >= 100

            here.wait(publish, what="the flood")
            seconds = time.monotonic() - began
            here.wait_diagnosis("initialpose", "refused")
        finally:
            assert node.stop() == 0, node.log
    lines = [line for line in node.log.splitlines() if "initial pose refused" in line]
    assert 1 <= len(lines) <= seconds + 2 and max(map(len, lines)) < LONGEST + 200
    assert "\x1b]0" not in node.log and "\x07" not in node.log and "Traceback" not in node.log
