"""One build script for colcon (ament_python) and for pip."""

from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

NAME = "xview_loc"

ROS = [
    "ros-rclpy[fastrtps]",
    "ros-diagnostic-msgs",
    "ros-geometry-msgs",
    "ros-nav-msgs",
    "ros-sensor-msgs",
    "ros-std-srvs",
]
# Faster than PyTorch on processors: the parameter ``backend``, ``xview-loc export``.
RUNTIMES = ["onnx", "onnxruntime", "onnxscript", "openvino"]
PHOTOS = ["geopic-tag-reader"]
TEST = [*PHOTOS, "evo", "hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "pyyaml"]

setup(
    name=NAME,
    version="0.1.0",
    description="Localises a vehicle by matching its camera image to an aerial image.",
    # ``colcon build --symlink-install`` runs a link to this file, elsewhere.
    long_description=Path(__file__).resolve().with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    maintainer="xview_loc maintainers",
    maintainer_email="maintainers@xview-loc.dev",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    package_data={NAME: ["py.typed", "models/weights/*"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", glob("launch/*.launch.py")),
        (f"share/{NAME}/config", glob("config/*")),
    ],
    zip_safe=False,
    # bags/chunks.py replaces functions of mcap and rosbags: not those of versions yet to come.
    install_requires=[
        "httpx>=0.26",
        "lightning-fabric",
        "lz4",
        "matplotlib",
        "mcap>=1.6,<2",
        "numpy",
        "opencv-python-headless",
        "pmtiles",
        "pyproj",
        "rasterio>=1.4",
        "rich>=12.3",
        "rosbags>=0.11,<0.12",
        "ruamel.yaml",
        "safetensors",
        "simplejpeg",
        "torch",
        "typer>=0.12.4",
        "zstandard",
    ],
    extras_require={
        "ros": ROS,
        "photos": PHOTOS,
        "runtimes": RUNTIMES,
        "dev": [*TEST, *RUNTIMES, "mypy", "ruff"],
        "test": TEST,
    },
    entry_points={
        "console_scripts": [
            "localizer = xview_loc.nodes.localizer_node:main",
            "pair_logger = xview_loc.nodes.pair_logger_node:main",
            "xview-loc = xview_loc.cli:main",
        ],
    },
)
