"""The loop of a model for pinhole cameras, from an ordinary recording of a front camera."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from adaptation_fixtures import tiny_models, xview_loc
from rosbags.highlevel import AnyReader

from xview_loc.bags.ros_types import STORE
from xview_loc.bags.writer import BagWriter
from xview_loc.datasets.pairs import PairDataset
from xview_loc.geodesy import wrap_angle
from xview_loc.models import create_model
from xview_loc.models.checkpoint import load_checkpoint, save_checkpoint
from xview_loc.models.specs import SPECS
from xview_loc.recordings.pair_reader import PairBag

MODEL = "ccvpe-pinhole-small"
FRAMES = 70
NS = 1_000_000_000
# Topics of the rig's only camera, and those of an ordinary recording.
RENAMED = {
    "/front/image/compressed": "/image",
    "/front/camera_info": "/camera_info",
    "/fix": "/fix",
    "/imu": "/imu",
    "/odom": "/odom",
    "/truth/fix": "/truth/fix",
}


@pytest.fixture(scope="module", autouse=True)
def _tiny_models() -> Iterator[None]:
    with tiny_models():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drive with a front camera on a vehicle that tilts, as ``drive``, and its pairs as ``pairs/drive``."""
    folder = tmp_path_factory.mktemp("pinhole")
    words: list[object] = ["--style", "target", "--city", 3, "--size", 500, "--frames", FRAMES, "--rate", 1]
    xview_loc("simulate", folder / "rig", *words, "--rig", "one", "--height", 96)
    with AnyReader([folder / "rig" / "drive"], default_typestore=STORE) as reader:
        kept = [c for c in reader.connections if c.topic in RENAMED]
        writer = BagWriter(folder / "drive", {RENAMED[c.topic]: c.msgtype for c in kept})
        with closing(writer):
            for connection, stamp, data in reader.messages(connections=kept):
                writer.write(RENAMED[connection.topic], stamp, data)
    words = ["--map", folder / "rig" / "city.tif", "--model", MODEL, "--imu", "/imu"]
    done = xview_loc("pairs", folder / "drive", "--out", folder / "pairs", *words)
    assert "without" not in done
    return folder


def test_tiles_are_large_enough_to_be_turned(folder: Path) -> None:
    bag = PairBag(folder / "pairs" / "drive")
    assert bag.tile_sizes() == {(228, 0.48)} and bag.session()["model"] == MODEL
    pairs = PairDataset([bag.folder], SPECS[MODEL])
    turns = np.array([float(pairs[k]["turn"]) for k in range(len(pairs))])
    headings = np.array([bag[k].heading for k in range(len(pairs))])
    assert np.abs(turns - headings).max() < 1e-6 and np.ptp(turns) > 1.0


@pytest.mark.parametrize(("name", "way"), [("ccvpe", "drives"), ("ccvpe", "paper"), ("ggcvt", "drives")])
def test_a_student_is_trained(folder: Path, tmp_path: Path, name: str, way: str) -> None:
    torch.manual_seed(0)
    model = create_model(f"{name}-pinhole-tiny")
    save_checkpoint(model, tmp_path / "teacher.safetensors")
    words: list[object] = ["--model", model.spec.name, "--checkpoint", tmp_path / "teacher.safetensors"]
    words += ["--accelerator", "cpu", "--epochs", 1, "--batch-size", 8, "--held-out", 0.2, "--sigma", 2]
    words += ["--truth", folder / "drive", "--truth-topic", "/truth/fix"]
    words += ["--recipe", way]
    printed = xview_loc("adapt", folder / "pairs" / "drive", "--out", tmp_path / "out", *words)
    assert "verdict" in printed and "along" in printed and "across" in printed
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["unreadable"] == 0 and ("smoothing" in metrics) == (way == "drives")
    for errors in metrics["true_errors"].values():
        along, across = errors["longitudinal_mean"], errors["lateral_mean"]
        assert max(along, across) <= errors["mean"] <= along + across
    assert "along mean" in (tmp_path / "out" / "report.html").read_text()
    student = load_checkpoint(tmp_path / "out" / "student.safetensors").model
    pairs = zip(student.parameters(), model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_a_vehicle_without_a_compass(folder: Path, tmp_path: Path) -> None:
    """Odometry and fixes give the headings that tiles are turned to."""
    words: list[object] = ["--map", folder / "rig" / "city.tif", "--model", MODEL, "--imu", "/imu"]
    xview_loc("pairs", folder / "drive", "--out", tmp_path / "pairs", *words, "--heading", "none")
    bare = tmp_path / "pairs" / "drive"
    printed = xview_loc("pairs", "info", bare)
    assert re.search(r"headings +0 measured, \d+ from odometry and fixes \(\+-\d\.\d deg\)", printed)
    found = {}
    for bag in (folder / "pairs" / "drive", bare):
        pairs = PairDataset([bag], SPECS[MODEL])
        found[bag] = dict(zip(pairs.track().stamp_ns, (float(p["turn"]) for p in pairs), strict=True))
    measured, reckoned = found.values()
    off = [abs(wrap_angle(turn - measured[stamp])) for stamp, turn in reckoned.items() if stamp in measured]
    assert len(off) > FRAMES / 2 and math.degrees(max(off)) < 15.0 and math.degrees(np.mean(off)) < 4.0
    save_checkpoint(create_model("ccvpe-pinhole-tiny"), tmp_path / "teacher.safetensors")
    words = ["--model", "ccvpe-pinhole-tiny", "--checkpoint", tmp_path / "teacher.safetensors"]
    words += ["--accelerator", "cpu", "--epochs", 1, "--batch-size", 8, "--held-out", 0.2, "--sigma", 2]
    printed = xview_loc("adapt", bare, "--out", tmp_path / "out", *words, "--recipe", "drives")
    assert "from odometry and fixes" in printed and "verdict" in printed
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["unreadable"] == 0


@pytest.mark.slow
def test_the_ablation_says_both_directions(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_checkpoint(create_model("ccvpe-pinhole-tiny"), tmp_path / "teacher.safetensors")
    words: list[object] = ["--model", "ccvpe-pinhole-tiny", "--checkpoint", tmp_path / "teacher.safetensors"]
    words += ["--accelerator", "cpu", "--epochs", 1, "--batch-size", 16, "--held-out", 0.4, "--sigma", 2]
    words += ["--truth", folder / "drive", "--truth-topic", "/truth/fix"]
    printed = xview_loc("ablate", folder / "pairs" / "drive", "--out", tmp_path / "out", *words)
    assert "along" in printed
    rows = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert all(row["errors"]["lateral_median"] > 0.0 for row in rows)
    assert "along mean" in (tmp_path / "out" / "ablation.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_student_is_swapped_in_while_the_recording_plays(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    from builtin_interfaces.msg import Time
    from geometry_msgs.msg import PoseWithCovarianceStamped
    from ros_harness import NodeProcess, bench, environment, pick_domain
    from rosgraph_msgs.msg import Clock

    words: list[object] = ["--model", MODEL, "--recipe", "drives", "--sigma", 2]
    words += ["--epochs", 1, "--batch-size", 8]
    words += ["--accelerator", "cpu", "--held-out", 0.2]
    xview_loc("adapt", folder / "pairs" / "drive", "--out", tmp_path / "out", *words)
    student = tmp_path / "out" / "student.safetensors"
    digest = hashlib.sha256(student.read_bytes()).hexdigest()[:12]
    parameters: dict[str, object] = {"model": MODEL, "map": str(folder / "rig" / "city.tif")}
    parameters |= {"tilt_source": "imu", "qos_reliability": "reliable", "use_sim_time": True}
    parameters |= {"image_transport": "compressed", "torch_threads": 1}
    parameters |= {"checkpoint_dirs": [str(tmp_path)]}
    domain = pick_domain()
    words = ["-r", "heading:=/imu"]
    module = "xview_loc.nodes.localizer_node"
    node = NodeProcess(domain, tmp_path / "node.txt", parameters, *words, module=module)
    try:
        with bench(domain) as here, AnyReader([folder / "drive"], default_typestore=STORE) as reader:
            poses = here.listen(PoseWithCovarianceStamped, "/localizer/pose")
            clock = here.publisher(Clock, "/clock")
            outputs = {}
            for connection in reader.connections:
                package, _, kind = connection.msgtype.split("/")
                message_type = getattr(import_module(f"{package}.msg"), kind)
                outputs[connection.topic] = here.publisher(message_type, connection.topic)
            inputs = ("/image", "/camera_info", "/fix", "/imu")
            here.wait(lambda: all(outputs[t].get_subscription_count() for t in inputs), what="the inputs")
            messages = reader.messages()

            def localise(frames: int) -> None:
                """Play on until so many more frames are localised."""
                end = len(poses) + frames
                while len(poses) < end:
                    connection, stamp, data = next(messages)
                    clock.publish(Clock(clock=Time(sec=stamp // NS, nanosec=stamp % NS)))
                    outputs[connection.topic].publish(data)
                    # The image is the last message of a frame. DDS may lose the first frames.
                    if connection.topic == "/image":
                        count = len(poses)
                        with suppress(AssertionError):
                            here.wait(lambda: len(poses) > count, 10.0)  # noqa: B023

            localise(5)
            command = [sys.executable, "-m", "xview_loc.cli", "deploy", str(student)]
            pipe = subprocess.PIPE
            deploying = subprocess.Popen(command, env=environment(domain), stdout=pipe, text=True)
            here.wait(lambda: deploying.poll() is not None, what="the student")
            assert deploying.returncode == 0, node.log
            here.wait(lambda: digest in here.value("checkpoint"), what="the student's weights")
            localise(5)
    finally:
        assert node.stop() == 0, node.log
    assert "Traceback" not in node.log
