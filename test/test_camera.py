"""Decoding, distortion, and the ground input."""

import array
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from xview_loc.camera import CameraError, CameraModel, reduce_width
from xview_loc.images import ENCODINGS, ImageError, decode_compressed, decode_image
from xview_loc.models.base import IMAGENET_MEAN, IMAGENET_STD
from xview_loc.models.inputs import ground_image, prepare_ground
from xview_loc.models.specs import ModelSpec
from xview_loc.rig import MountedCamera, Rig

PHOTOGRAPHS = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "ground"
PANORAMA = ModelSpec("stub", "panorama", (32, 64), 64, 0.5, 8)
PINHOLE = ModelSpec(
    "stub", "pinhole", (32, 64), 64, 0.5, 8, aerial_up="left", intrinsics=(30.0, 30.0, 31.5, 15.5)
)
COLOUR = (200, 90, 30)


def smooth_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), 3.0)
    return np.clip(128 + 40 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def raw(rgb: np.ndarray, encoding: str, padding: int = 0, big_endian: bool = False) -> tuple[int, bytes]:
    """(step, data) of ``rgb`` in ``encoding``, with ``padding`` bytes of rubbish after each row."""
    name = {"8UC1": "mono8", "8UC3": "bgr8", "8UC4": "bgra8"}.get(encoding, encoding)
    if name.startswith("bayer_"):
        pixels = np.zeros(rgb.shape[:2], np.uint8)
        for i, letter in enumerate(name[6:10]):
            channel = "rgb".index(letter)
            pixels[i // 2 :: 2, i % 2 :: 2] = rgb[i // 2 :: 2, i % 2 :: 2, channel]
    elif name[:2] in ("yu", "uy", "nv"):
        pixels = yuv(rgb, name)
    else:
        order = {"rgb": [0, 1, 2], "bgr": [2, 1, 0], "rgba": [0, 1, 2, 0], "bgra": [2, 1, 0, 0], "mono": [0]}
        pixels = rgb[..., order[name.rstrip("168")]]
    rows = pixels.reshape(len(pixels), -1)
    if name.endswith("16"):
        # The lower byte is rubbish.
        rows = ((rows.astype(np.uint16) << 8) + 201).astype(">u2" if big_endian else "<u2").view(np.uint8)
    padded = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
    return padded.shape[1], padded.tobytes()


def yuv(rgb: np.ndarray, encoding: str) -> np.ndarray:
    """Video levels of BT.601; two pixels, or two by two, share their colour."""
    r, g, b = (rgb[..., k] / 255.0 for k in range(3))
    y = 16 + 65.481 * r + 128.553 * g + 24.966 * b
    u = 128 - 37.797 * r - 74.203 * g + 112.0 * b
    v = 128 + 112.0 * r - 93.786 * g - 18.214 * b
    y, u, v = (np.round(x).astype(np.uint8) for x in (y, u, v))
    if encoding.startswith("nv"):
        pair = (u, v) if encoding == "nv12" else (v, u)
        return np.vstack([y, np.stack([x[::2, ::2] for x in pair], -1).reshape(len(y) // 2, -1)])
    cells = {"y": y[:, ::2], "Y": y[:, 1::2], "u": u[:, ::2], "v": v[:, ::2]}
    order = "uyvY" if encoding in ("yuv422", "uyvy") else "yuYv"
    return np.stack([cells[letter] for letter in order], -1)


@pytest.mark.parametrize(("padding", "big_endian"), [(0, False), (6, True)])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_gives_the_same_colours(encoding: str, padding: int, big_endian: bool) -> None:
    rgb = np.full((8, 12, 3), COLOUR, np.uint8)
    rgb[:, 6:] = (20, 140, 220)
    step, data = raw(rgb, encoding, padding, big_endian)
    decoded = decode_image(encoding, 8, 12, step, data, big_endian)
    expected = np.repeat(rgb[..., :1], 3, axis=2) if encoding in ("mono8", "mono16", "8UC1") else rgb
    if encoding.startswith("bayer"):
        # Interpolated: colours are right away from the edge between the two halves.
        np.testing.assert_array_equal(decoded[1:-1, 1:4], expected[1:-1, 1:4])
        np.testing.assert_array_equal(decoded[1:-1, 8:11], expected[1:-1, 8:11])
    else:
        # Colours in YUV are rounded.
        rounding = 3 if encoding[:2] in ("yu", "uy", "nv") else 0
        assert decoded.shape == expected.shape
        assert np.abs(decoded.astype(int) - expected).max() <= rounding


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, lambda d: array.array("B", d)])
def test_any_buffer_is_taken_without_a_copy(wrap) -> None:
    rgb = smooth_image(4, 6)
    data = wrap(rgb.tobytes())
    decoded = decode_image("rgb8", 4, 6, 18, data)
    np.testing.assert_array_equal(decoded, rgb)
    assert np.shares_memory(decoded, np.frombuffer(data, np.uint8))


def test_a_padded_buffer_is_taken() -> None:
    """UVC cameras of 424 x 240 pixels, in whole pages."""
    data = bytes([90]) * (424 * 2 * 240) + bytes(1280)
    assert decode_image("yuyv", 240, 424, 848, data).shape == (240, 424, 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("yuv9", 2, 2, 4, bytes(8)), "'yuv9' is not supported"),
        (("yuv422", 2, 3, 6, bytes(12)), "halves the colour"),
        (("nv12", 3, 2, 2, bytes(9)), "halves the colour"),
        (("nv12", 2, 2, 2, bytes(4)), "3 rows of 2 bytes"),
        (("rgb16", 2, 2, 6, bytes(24)), "step is 6"),
        (("mono8", 2, 200, 600, bytes(1200)), "far more than 200 mono8 pixels"),
        (("rgb8", 2, 2, 5, bytes(10)), "step is 5"),
        (("rgb8", 2, 2, 6, bytes(11)), "11 bytes"),
        (("mono8", 16, 100, 100, bytes(2000)), "16 rows of 100 bytes"),
        (("rgb8", 0, 2, 6, b""), "empty"),
        (("bayer_rggb8", 1, 1, 1, b"\0"), "too small"),
        (("rgb8", 2, 2, 6, "not bytes"), "buffer"),
    ],
)
def test_wrong_raw_images_are_refused_in_one_line(arguments, says: str) -> None:
    with pytest.raises(ImageError, match=says) as caught:
        decode_image(*arguments)
    assert "\n" not in str(caught.value)


def encoded(image: np.ndarray, extension: str, *options: int) -> bytes:
    ok, data = cv2.imencode(extension, image[..., ::-1], list(options))
    assert ok
    return data.tobytes()


@pytest.mark.parametrize(
    ("extension", "options"),
    [
        (".png", ()),
        (".jpg", (cv2.IMWRITE_JPEG_QUALITY, 98)),
        (".jpg", (cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_QUALITY, 98)),
        (".jpg", (cv2.IMWRITE_JPEG_RST_INTERVAL, 2, cv2.IMWRITE_JPEG_QUALITY, 98)),
    ],
)
def test_compressed_images_decode_and_truncated_ones_do_not(extension: str, options: tuple[int, ...]) -> None:
    image = smooth_image(48, 64)
    data = encoded(image, extension, *options)
    decoded = decode_compressed(data)
    assert np.abs(decoded.astype(int) - image).mean() < 3
    assert np.abs(decode_compressed(data + b"\0" * 7).astype(int) - image).mean() < 3  # drivers pad
    for length in (1, 2, 3, 10, len(data) // 4, len(data) // 2, len(data) - 20, len(data) - 2, len(data) - 1):
        with pytest.raises(ImageError):
            decode_compressed(data[:length])


def test_a_thumbnail_does_not_hide_that_the_image_is_truncated() -> None:
    data, thumbnail = encoded(smooth_image(48, 64), ".jpg"), encoded(smooth_image(16, 16), ".jpg")
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    whole = data[:2] + segment + data[2:]
    assert decode_compressed(whole).shape == (48, 64, 3)
    with pytest.raises(ImageError, match="truncated"):
        decode_compressed(whole[: len(segment) + len(data) // 2])
    with pytest.raises(ImageError, match="truncated"):
        decode_compressed(data[:2] + segment)


def test_a_damaged_png_is_refused() -> None:
    data = bytearray(encoded(smooth_image(48, 64), ".png"))
    data[len(data) // 2] ^= 0x10
    with pytest.raises(ImageError, match="damaged"):
        decode_compressed(bytes(data))


@pytest.mark.parametrize("data", [b"", b"GIF89a....", b"\xff\xd8", b"\xff\xd8\xff\xd9", 12])
def test_what_is_no_image_is_refused(data) -> None:
    with pytest.raises(ImageError):
        decode_compressed(data)


def test_grey_and_alpha_files_give_rgb() -> None:
    image = smooth_image(20, 30)
    ok, grey = cv2.imencode(".png", image[..., 0])
    assert ok
    np.testing.assert_array_equal(decode_compressed(grey), np.repeat(image[..., :1], 3, axis=2))
    ok, alpha = cv2.imencode(".png", np.dstack([image[..., ::-1], np.full((20, 30), 9, np.uint8)]))
    assert ok
    np.testing.assert_array_equal(decode_compressed(alpha.tobytes()), image)


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="no folder of photographs beside the repository")
def test_real_photographs_decode_and_truncated_ones_do_not() -> None:
    for path in sorted(PHOTOGRAPHS.glob("*.jpg")):
        data = path.read_bytes()
        expected = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        np.testing.assert_array_equal(decode_compressed(data), expected[..., ::-1])
        for share in (0.05, 0.5, 0.99):
            with pytest.raises(ImageError, match="truncated"):
                decode_compressed(data[: int(share * len(data))])


K = (60.0, 0.0, 63.5, 0.0, 62.0, 47.5, 0.0, 0.0, 1.0)


def test_camera_model_takes_a_matrix_and_is_hashable() -> None:
    camera = CameraModel(128, 96, np.array(K).reshape(3, 3), [])
    assert camera == CameraModel(128, 96, K) and hash(camera) == hash(CameraModel(128, 96, K))
    assert not camera.distorts
    np.testing.assert_array_equal(camera.matrix, np.array(K).reshape(3, 3))


@pytest.mark.parametrize(
    "arguments",
    [
        (0, 96, K),
        (128, 96, (0.0,) * 9),
        (128, 96, K[:8]),
        (128, 96, (float("nan"), *K[1:])),
        (128, 96, K, (0.1,) * 3),
        (128, 96, K, (float("inf"), 0, 0, 0)),
        (128, 96, K, (), "thin_prism"),
        (128, 96, K, (0.1,) * 5, "equidistant"),
    ],
)
def test_unusable_calibrations_are_refused(arguments) -> None:
    with pytest.raises(CameraError):
        CameraModel(*arguments)


@pytest.mark.parametrize(
    ("model", "distortion"),
    [
        ("plumb_bob", (-0.25, 0.08, 0.002, -0.001, 0.01)),
        ("rational_polynomial", (0.3, 0.1, 0.001, -0.002, 0.01, 0.5, 0.12, 0.02)),
        ("equidistant", (0.02, -0.01, 0.003, 0.0)),
        ("equidistant", ()),
    ],
)
def test_undistorted_pixels_are_where_a_pinhole_would_have_them(model: str, distortion) -> None:
    camera = CameraModel(128, 96, K, distortion, model)
    assert camera.distorts
    true_pixels = np.array([[63.5, 47.5], [80.0, 40.0], [40.0, 60.0], [52.0, 30.0]])
    rays = np.column_stack([(true_pixels[:, 0] - K[2]) / K[0], (true_pixels[:, 1] - K[5]) / K[4]])
    if model == "equidistant":
        seen = cv2.fisheye.distortPoints(rays[:, None], camera.matrix, np.array(distortion or (0.0,) * 4))
    else:
        points = np.column_stack([rays, np.ones(len(rays))])
        seen, _ = cv2.projectPoints(points, np.zeros(3), np.zeros(3), camera.matrix, np.array(distortion))
    rows, cols = np.mgrid[:96, :128]
    for (x, y), (true_x, true_y) in zip(seen.reshape(-1, 2), true_pixels, strict=True):
        spot = np.exp(-((cols - x) ** 2 + (rows - y) ** 2) / (2 * 2.0**2))
        image = np.repeat((spot * 255).astype(np.uint8)[..., None], 3, 2)
        straight = Rig({"": MountedCamera(camera)}).view({"": image}, CameraModel(128, 96, K))[0][..., 0]
        weight = straight.astype(float) * (straight > 60)
        found = (weight * cols).sum() / weight.sum(), (weight * rows).sum() / weight.sum()
        assert found == pytest.approx((true_x, true_y), abs=0.25)


def test_scaled_intrinsics_project_onto_the_resized_image() -> None:
    camera = CameraModel(128, 96, K)
    point = np.array([0.3, -0.2, 1.0])
    x, y, _ = camera.matrix @ point
    x2, y2, _ = camera.scaled_matrix(64, 24) @ point
    # The resized image's edges are the original's.
    assert (x2 + 0.5) / 64 == pytest.approx((x + 0.5) / 128)
    assert (y2 + 0.5) / 24 == pytest.approx((y + 0.5) / 96)


def pixels_of(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.dtype == torch.float32 and tensor.shape[:2] == (1, 3)
    mean, std = IMAGENET_MEAN[:, None, None], IMAGENET_STD[:, None, None]
    return ((tensor[0] * std + mean) * 255).permute(1, 2, 0).numpy()


def test_a_reduced_image_keeps_its_calibration() -> None:
    camera = CameraModel(640, 480, (400.0, 0, 330.3, 0, 420.0, 235.1, 0, 0, 1), (0.1, 0.0, 0.0, 0.0))
    cols = np.broadcast_to(np.linspace(0, 255, 640), (480, 640)).astype(np.uint8)
    image = np.repeat(cols[..., None], 3, axis=2)
    reduced, scaled = reduce_width(image, camera, 160)
    assert reduced.shape == (120, 160, 3) and scaled is not None
    assert (scaled.width, scaled.height, scaled.k[0], scaled.k[4]) == (160, 120, 100.0, 105.0)
    assert scaled.distortion == camera.distortion
    # The grey at the principal point is the same.
    at = [np.interp(c.k[2], np.arange(c.width), i[0, :, 0]) for c, i in ((camera, image), (scaled, reduced))]
    assert at[0] == pytest.approx(at[1], abs=1.0)
    for width in (0, 640, 5000):
        assert reduce_width(image, camera, width)[0] is image


def test_panoramas_are_normalised_and_resized_only_when_the_heading_is_unknown() -> None:
    image = smooth_image(32, 64)
    tensor = prepare_ground(image, PANORAMA, heading=None, camera=None)
    np.testing.assert_allclose(pixels_of(tensor), image, atol=1e-2)
    large = cv2.resize(image, (256, 128), interpolation=cv2.INTER_NEAREST)
    tensor = prepare_ground(large, PANORAMA, heading=None, camera=None)
    np.testing.assert_allclose(pixels_of(tensor), image, atol=1e-2)


@pytest.mark.parametrize("width", [64, 90, 512])
@pytest.mark.parametrize("heading_deg", [-170.0, -33.0, 0.0, 45.0, 90.0, 123.4])
@pytest.mark.parametrize("mount_yaw_deg", [0.0, -70.0])
def test_turned_panorama_faces_north(width: int, heading_deg: float, mount_yaw_deg: float) -> None:
    # A landmark at a known azimuth must end up in the column of that azimuth, clockwise from the middle.
    yaw = math.radians(100.0)
    centre_yaw = math.radians(heading_deg + mount_yaw_deg)
    turn = (centre_yaw - yaw) / (2 * math.pi)  # clockwise from the centre column
    position = (0.5 + turn) % 1.0 * width - 0.5
    distance = (np.arange(width) - position + width / 2) % width - width / 2
    spot = 255 * np.exp(-((distance * 64 / width) ** 2) / (2 * 2.0**2))
    image = np.repeat(np.repeat(spot.astype(np.uint8)[None, :, None], 32, 0), 3, 2)
    turned = ground_image(
        image, PANORAMA, heading=math.radians(heading_deg), camera=None, mount_yaw=math.radians(mount_yaw_deg)
    )
    profile = turned[16, :, 0]
    angle = np.arange(64) * (2 * math.pi / 64)
    found = np.angle((profile * np.exp(1j * angle)).sum()) / (2 * math.pi) * 64
    azimuth = math.pi / 2 - yaw
    expected = 31.5 + azimuth / (2 * math.pi) * 64
    error = (found - expected + 32) % 64 - 32
    assert abs(error) <= 0.51


def test_pinhole_images_are_warped_to_the_models_lens_and_their_size_is_checked() -> None:
    camera = CameraModel(128, 96, K, (-0.2, 0.05, 0, 0))
    rays = np.array([[0.0, 0.0, 1.0], [0.5, 0.2, 1.0], [-0.6, -0.3, 1.0]])
    pixels, seen = camera.project(rays)
    assert seen.all()
    rows, cols = np.mgrid[:96, :128]
    for (x, y), ray in zip(pixels, rays, strict=True):
        spot = 255 * np.exp(-((cols - x) ** 2 + (rows - y) ** 2) / (2 * 3.0**2))
        image = np.repeat(spot.astype(np.uint8)[..., None], 3, 2)
        shown = pixels_of(prepare_ground(image, PINHOLE, heading=1.0, camera=camera))[..., 0]
        row, col = np.mgrid[:32, :64]
        weight = shown * (shown > 60) * (np.abs(shown - 124) > 0.5)
        found = (weight * col).sum() / weight.sum(), (weight * row).sum() / weight.sum()
        assert found == pytest.approx((30 * ray[0] + 31.5, 30 * ray[1] + 15.5), abs=0.3)
    image = smooth_image(32, 64)
    own = PINHOLE.lens
    assert isinstance(own, CameraModel)
    np.testing.assert_allclose(
        pixels_of(prepare_ground(image, PINHOLE, heading=1.0, camera=own)), image, atol=1e-2
    )
    with pytest.raises(ImageError, match="64 x 48"):
        prepare_ground(smooth_image(48, 64), PINHOLE, heading=1.0, camera=camera)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)]
)
def test_only_rgb_bytes_are_taken(image: np.ndarray) -> None:
    with pytest.raises(ImageError):
        prepare_ground(image, PANORAMA, heading=None, camera=None)
