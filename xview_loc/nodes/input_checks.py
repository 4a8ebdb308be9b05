"""Shows on /diagnostics where a vehicle's inputs contradict each other, or images are missing."""

from __future__ import annotations

from typing import Any

from xview_loc.nodes.diagnostics import WARN, Health
from xview_loc.vehicle.course import CourseHeadings
from xview_loc.vehicle.heading_check import HeadingCheck, OffsetCheck
from xview_loc.vehicle.lost_images import LostImages
from xview_loc.vehicle.motion_check import MotionCheck
from xview_loc.vehicle.odometry import Odometry
from xview_loc.vehicle.still_image import StillImage
from xview_loc.vehicle.synchronisation import GnssFix, HeadingSample


class InputChecks:
    """Checks images, fixes, headings and odometry, all of them good ones. For the executor's thread."""

    def __init__(self, odometry: Odometry, course: CourseHeadings | None, health: Health, log: Any) -> None:
        """``course``: to compare headings with."""
        self._odometry, self._course, self._health, self._log = odometry, course, health, log
        self._shown: set[str] = set()
        self.restart()

    @property
    def heading_fault(self) -> str:
        """What is wrong with the headings; "" for nothing."""
        return str(self._heading.fault or self._offset.fault or "")

    def image_fault(self, camera: str) -> str:
        """Return what is wrong with the images of a camera, "" of a single one; "" for nothing."""
        return self._still[camera].fault if camera in self._still else ""

    @property
    def odometry_fault(self) -> str:
        """How odometry and fixes contradict each other; "" if they do not."""
        return self._motion.odom_disagrees

    def restart(self) -> None:
        """Forget everything, and clear the conditions."""
        self._heading, self._motion = HeadingCheck(self._odometry), MotionCheck(self._odometry)
        self._offset, self._heading_ns = OffsetCheck(), 0
        # By camera.
        self._images: dict[str, LostImages] = {}
        self._still: dict[str, StillImage] = {}
        self._show()

    def add_heading(self, heading: HeadingSample) -> None:
        """Take a measured heading."""
        self._heading.add_heading(heading)
        if self._course is None:
            return
        if self._course.contradicted:
            self._offset = OffsetCheck()
        reckoned = self._course.at(heading.stamp_ns)
        motion = self._odometry.between(self._heading_ns, heading.stamp_ns)
        self._heading_ns = heading.stamp_ns
        if reckoned is not None and motion is not None:
            self._offset.add(heading, reckoned, motion.length)

    def add_fix(self, fix: GnssFix) -> None:
        """Take a fix, and set or clear the conditions."""
        self._motion.add(fix)
        for still in self._still.values():
            still.add_fix(fix)
        self._heading.add_fix(fix)
        self._show()

    def add_image(self, stamp_ns: int, message: bytes, camera: str = "") -> None:
        """Take an image message's CDR bytes, and set or clear the conditions; count those missing before."""
        self._still.setdefault(camera, StillImage(self._odometry)).add_image(stamp_ns, message)
        if missing := self._images.setdefault(camera, LostImages()).add(stamp_ns):
            self._health.count("images_lost", missing)
        self._show()

    def lose_images(self, count: int, camera: str = "") -> None:
        """Take a number of images that DDS lost, count them, and set or clear the condition."""
        self._health.count("images_lost_by_dds", count)
        self._images.setdefault(camera, LostImages()).lose(count)
        self._show()

    def _show(self) -> None:
        problems = {
            "odom_still": self._motion.odom_still,
            "fix_still": self._motion.fix_still,
            "odom_disagrees": self.odometry_fault,
            "heading_disagrees": self.heading_fault,
            "images_lost": _named(
                {n: images.lost_by_dds or images.fault for n, images in self._images.items()}
            ),
            "image_still": _named({n: still.fault for n, still in self._still.items()}),
        }
        for key, text in problems.items():
            if not text:
                self._health.clear(key)
                self._shown.discard(key)
                continue
            self._health.condition(key, WARN, text)
            # Figures change all the time.
            if key not in self._shown:
                self._shown.add(key)
                self._log.warning(text)


def _named(faults: dict[str, str]) -> str:
    """Return the first camera's fault, with the camera's name if it has one; "" if there is none."""
    return next((f"camera {name}: {text}" if name else text for name, text in faults.items() if text), "")
