"""A stranger on /tf: many frames, long names, endless stamps and loops cost no more than a bounded buffer."""

from __future__ import annotations

import pytest

from xview_loc.vehicle.transforms import (
    LONGEST_NAME,
    MOST_FRAMES,
    MOST_POSES,
    Transform,
    TransformBuffer,
    TransformError,
)

POSE = Transform.planar(1.0, 0.0, 0.0)


def test_frames_without_end_are_refused_and_known_ones_go_on() -> None:
    buffer = TransformBuffer()
    buffer.add(0, "base_link", "camera", POSE, static=True)
    for k in range(1, MOST_FRAMES):
        buffer.add(k, "map", f"frame {k}", POSE)
    for k in range(3):
        with pytest.raises(TransformError, match=f"more than {MOST_FRAMES} frames"):
            buffer.add(k, "map", f"another {k}", POSE)
    buffer.add(10**9, "map", "frame 1", POSE)
    assert buffer.lookup("base_link", "camera").translation.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("parent", [True, False])
def test_long_names_are_refused_in_one_short_line(parent: bool) -> None:
    long = "x" * (LONGEST_NAME + 1)
    with pytest.raises(TransformError, match="characters") as caught:
        TransformBuffer().add(0, *((long, "a") if parent else ("a", long)), POSE)
    assert len(str(caught.value)) < 100


def test_poses_that_never_grow_old_push_the_first_ones_out() -> None:
    buffer = TransformBuffer()
    for ns in range(MOST_POSES + 5):
        buffer.add(ns, "odom", "base_link", POSE)
    assert buffer.lookup("odom", "base_link", 5) is not None
    with pytest.raises(TransformError, match="begins"):
        buffer.lookup("odom", "base_link", 4)


def test_the_longest_chain_and_the_longest_loop_end() -> None:
    buffer = TransformBuffer()
    for k in range(MOST_FRAMES - 1):
        buffer.add(0, f"f{k}", f"f{k + 1}", POSE, static=True)
    assert buffer.lookup("f0", f"f{MOST_FRAMES - 1}").translation[0] == pytest.approx(MOST_FRAMES - 1)
    buffer.add(0, f"f{MOST_FRAMES - 1}", "f0", POSE, static=True)
    with pytest.raises(TransformError, match="loop"):
        buffer.lookup("f0", "f5")
