"""What each model takes: kind and size of the ground image, and the aerial tile. Does not import torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from xview_loc.camera import Lens

# Step in which tiles are turned to the heading, degrees; what it costs: docs/performance.md.
TURN_STEP_DEG = 4.0
Normalisation = Literal["imagenet", "unit"]
# KITTI's satellite maps, m/px: Web Mercator, zoom 18, scale 2; the latitude of Karlsruhe for all of them.
KITTI_GSD = 156543.03392 * math.cos(math.radians(49.015)) / 2**18 / 2
# KITTI's left colour camera (most drives), resized from 1242 x 375 to 1024 x 256 pixels: fx, fy, cx, cy.
KITTI_INTRINSICS = (
    721.5377 * 1024 / 1242,
    721.5377 * 256 / 375,
    (609.5593 + 0.5) * 1024 / 1242 - 0.5,
    (172.854 + 0.5) * 256 / 375 - 0.5,
)


@dataclass(frozen=True)
class ModelSpec:
    """The inputs that a model expects; every checkpoint carries one.

    ``ground_size`` is (height, width) of the ground image and ``aerial_size`` the side of the square tile,
    pixels; ``gsd`` is the tile's ground sample distance, m/px. Its top edge faces ``aerial_up``: ``"north"``,
    or the vehicle's ``"left"`` for models trained on tiles turned so that the heading points right. ``bins``
    is the number of heading bins that the model scores; 0: it needs a known heading. ``normalisation`` says
    how both images are normalised: ``"imagenet"`` to ImageNet's mean and standard deviation, ``"unit"`` to
    RGB in [0, 1]. Its default is what a spec without it means: all models were trained so before it existed.
    ``elevation_deg`` are the elevations of a panorama's upper and lower edge, degrees; ``intrinsics`` the
    focal lengths and the principal point (fx, fy, cx, cy) of a pinhole image of ``ground_size``, pixels.
    """

    name: str
    camera: Literal["panorama", "pinhole"]
    ground_size: tuple[int, int]
    aerial_size: int
    gsd: float
    bins: int
    aerial_up: Literal["north", "left"] = "north"
    normalisation: Normalisation = "imagenet"
    elevation_deg: tuple[float, float] = (90.0, -90.0)
    intrinsics: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        if (self.camera == "pinhole") != (self.intrinsics is not None):
            raise ValueError(f"{self.name}: a pinhole model needs intrinsics, any other must have none")

    @property
    def lens(self) -> Lens:
        """The level camera whose images the model takes."""
        # Imported here: launch files read the nodes' parameters with a Python that may lack OpenCV.
        from xview_loc.camera import CameraModel, PanoramaCamera

        height, width = self.ground_size
        if self.intrinsics is None:
            return PanoramaCamera(width, height, *map(math.radians, self.elevation_deg))
        fx, fy, cx, cy = self.intrinsics
        return CameraModel(width, height, (fx, 0.0, cx, 0.0, fy, cy, 0.0, 0.0, 1.0))

    @property
    def tile_px(self) -> int:
        """Side of the north-up tile to cut from the map, pixels; larger than the model's if it is turned."""
        if self.aerial_up == "north":
            return self.aerial_size
        # Even, so that models of the same resolution with smaller tiles can take them, too.
        spare = math.ceil((math.sqrt(2.0) - 1.0) * self.aerial_size)
        return self.aerial_size + spare + spare % 2

    @property
    def snap_m(self) -> float:
        """Spacing of the centres of stored tiles, metres, so that several pairs share one."""
        return self.aerial_size * self.gsd / 4

    def takes_tile(self, size_px: int, gsd: float) -> bool:
        """Return True if the model's tile can be cut from a north-up one of this size and resolution."""
        spare = size_px - self.tile_px
        # A turned tile is cut from any larger one; a cropped one needs the same margin on both sides.
        cut = spare >= 0 and (self.aerial_up == "left" or spare % 2 == 0)
        return cut and math.isclose(gsd, self.gsd, rel_tol=1e-6)

    @property
    def nominal_heading(self) -> float:
        """Angle of an image of known heading, in the convention of :attr:`HeatMaps.orientation`, radians."""
        return 0.0 if self.aerial_up == "north" else math.pi / 2

    def matching_prior(self, heading_prior_deg: float | None) -> float | None:
        """Return the heading prior to match with where headings are known up to ``heading_prior_deg``.

        None, all bins, for pinhole models with bins: their authors train and evaluate them so.
        """
        return heading_prior_deg if self.camera == "panorama" or self.bins == 0 else None

    def to_json(self) -> dict[str, Any]:
        """Return the spec in plain JSON types, for a checkpoint's metadata."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelSpec:
        """Build a spec from what :meth:`to_json` returned."""
        lists = ("ground_size", "elevation_deg", "intrinsics")
        return cls(**{**data, **{name: tuple(data[name]) for name in lists if data[name] is not None}})


SPECS = {
    spec.name: spec
    for spec in (
        # VIGOR's cities range from 0.126 to 0.148 m/px once their 640 px tiles are scaled to 512 px.
        ModelSpec("ccvpe-vigor", "panorama", (320, 640), 512, 0.14, 20),
        ModelSpec("ccvpe-vigor-reflect", "panorama", (320, 640), 512, 0.14, 20),
        ModelSpec(
            "ccvpe-kitti", "pinhole", (256, 1024), 512, KITTI_GSD, 16, "left", intrinsics=KITTI_INTRINSICS
        ),
        ModelSpec("ccvpe-small", "panorama", (64, 256), 160, 0.48, 16, elevation_deg=(30.0, -60.0)),
        ModelSpec("ccvpe-rig-small", "panorama", (64, 256), 160, 0.48, 16, elevation_deg=(30.0, -60.0)),
        # A camera of 90 degrees.
        ModelSpec(
            "ccvpe-pinhole-small",
            "pinhole",
            (96, 256),
            160,
            0.48,
            16,
            "left",
            intrinsics=(128.0, 128.0, 127.5, 47.5),
        ),
        ModelSpec("ggcvt-vigor", "panorama", (320, 640), 512, 0.14, 0, normalisation="unit"),
        ModelSpec(
            "ggcvt-kitti",
            "pinhole",
            (256, 1024),
            512,
            KITTI_GSD,
            0,
            "left",
            "unit",
            intrinsics=KITTI_INTRINSICS,
        ),
        ModelSpec(
            "ggcvt-small",
            "panorama",
            (64, 256),
            192,
            0.48,
            0,
            normalisation="unit",
            elevation_deg=(30.0, -60.0),
        ),
    )
}
