"""What installs the package agrees with the code: setup.py, package.xml, requirements.txt, the image."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement

from xview_loc.doctor import PACKAGES

ROOT = Path(__file__).resolve().parent.parent
# rosdep's keys that are not python3-<name on PyPI>.
PYPI_NAMES = {"python3-opencv": "opencv-python-headless", "python3-yaml": "pyyaml"}
# Imported where they are installed; extras of setup.py.
RUNTIMES = {"onnx", "onnxruntime", "onnxscript", "openvino"}
PHOTOS = {"geopic_tag_reader"}
# Tests need them that are skipped without; rosdep has no keys for them.
PIP_ONLY = {"pytest-xdist", "evo", "geopic-tag-reader"}


def run_setup(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what a setup.py passes to setuptools."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(path))
    return given


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(ROOT)
    return run_setup(ROOT / "setup.py", monkeypatch)


def manifest() -> ElementTree.Element:
    return ElementTree.parse(ROOT / "package.xml").getroot()


def keys(tag: str) -> tuple[set[str], set[str]]:
    """Return package.xml's ROS packages, and its Python packages as PyPI names them."""
    names = [element.text or "" for element in manifest().findall(tag)]
    assert len(names) == len(set(names)), f"{tag} named twice"
    python = {name for name in names if name.startswith("python3-")}
    return set(names) - python, {PYPI_NAMES.get(n, n.removeprefix("python3-")) for n in python}


def requirements() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: requirement for requirement in found}


def imports(*folders: str) -> set[str]:
    """Return the top-level names of all modules imported at run time by the files in these folders."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            value = getattr(node.args[0], "value", None)
            if called in ("import_module", "importorskip") and isinstance(value, str):
                yield value
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    names = {name.partition(".")[0] for file in files for name in visit(ast.parse(file.read_text()))}
    own = {file.stem for file in files} | {"xview_loc", "benchmarks"}
    return names - own - sys.stdlib_module_names


def test_pip_and_rosdep_bring_what_setup_py_requires(metadata):
    required = {r.name: r for r in map(Requirement, metadata["install_requires"])}
    _, from_rosdep = keys("exec_depend")
    from_pip = requirements()
    assert from_rosdep | set(from_pip) == set(required)
    assert from_rosdep & set(from_pip) == {"numpy"}, "pip only limits the version of rosdep's NumPy"
    for name, requirement in required.items():
        if requirement.specifier:  # no key can say which version
            assert from_pip[name].specifier == requirement.specifier


def test_rosdep_brings_what_the_tests_need(metadata):
    _, from_rosdep = keys("test_depend")
    assert from_rosdep | PIP_ONLY == set(metadata["extras_require"]["test"])


def test_package_xml_names_the_ros_packages_that_are_imported():
    used = imports("xview_loc", "launch")
    used -= {module.partition(".")[0] for module in PACKAGES.values()} | RUNTIMES | PHOTOS
    declared, _ = keys("exec_depend")
    assert declared == used
    tested = imports("test") - imports("xview_loc", "launch")
    needed, _ = keys("test_depend")
    assert needed == tested - {"packaging", "setuptools", "hypothesis", "pytest", "pyexiv2", "yaml"}


def test_package_xml_describes_the_package_as_setup_py_does(metadata):
    root = manifest()
    assert [root.findtext(tag) for tag in ("name", "version", "license")] == [
        metadata[name] for name in ("name", "version", "license")
    ]
    maintainer = root.find("maintainer")
    assert maintainer is not None
    assert (maintainer.text, maintainer.get("email")) == (
        metadata["maintainer"],
        metadata["maintainer_email"],
    )


def test_the_readme_installs_requirements_txt():
    assert "pip install -r src/xview_loc/requirements.txt" in (ROOT / "README.md").read_text()


def test_torch_has_one_version():
    (pin,) = requirements()["torch"].specifier
    for file in ("Makefile", "constraints.txt"):
        assert f"torch=={pin.version}\n" in (ROOT / file).read_text(), file


def test_setup_py_runs_behind_a_link(metadata, tmp_path, monkeypatch):
    """As in ``colcon build --symlink-install``."""
    (tmp_path / "setup.py").symlink_to(ROOT / "setup.py")
    monkeypatch.chdir(tmp_path)
    linked = run_setup(tmp_path / "setup.py", monkeypatch)
    assert linked["long_description"] == metadata["long_description"]


def test_launch_files_need_nothing_from_pip():
    """ros2 launch runs with the system's Python, which does not see the virtual environment."""
    pytest.importorskip("rclpy", reason="ROS 2's Python packages are not installed")
    program = (
        "import sys, xview_loc.nodes.launching; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    from_pip = {PACKAGES[name].partition(".")[0] for name in set(requirements()) - {"numpy"}}
    assert "numpy" in loaded.split()
    assert not from_pip & set(loaded.split())


def dockerfile() -> list[str]:
    """Return the instructions."""
    text = re.sub(r"^#.*\n", "", (ROOT / "docker/Dockerfile").read_text(), flags=re.MULTILINE)
    return [line for line in text.replace("\\\n", "").splitlines() if line]


def jobs() -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]


def test_image_and_workflow_are_for_the_distributions_of_the_page():
    page = (ROOT / "docs/distributions.md").read_text()
    (sentence,) = re.findall(r"The nodes are made for (.+?)\. ", page)
    distributions = [name.lower() for name in re.findall(r"(?<!\()\b[A-Z][a-z]+", sentence)]
    assert len(distributions) == 4
    assert jobs()["distribution"]["strategy"]["matrix"] == {"ros": distributions}
    assert any(
        "--build-arg ROS_DISTRO=${{ matrix.ros }}" in s.get("run", "")
        for s in jobs()["distribution"]["steps"]
    )
    default = re.fullmatch(r"ARG ROS_DISTRO=(\w+)", dockerfile()[0])
    assert default and default[1] in distributions
    assert dockerfile()[1] == "FROM ros:${ROS_DISTRO}-ros-base"


def test_what_the_image_copies_is_there():
    sources = [name for line in dockerfile() if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert sources == ["package.xml", "requirements.txt", "."]
    assert all((ROOT / name).exists() for name in sources)


def test_the_commands_of_image_and_workflow_are_bash():
    scripts = [line.removeprefix("RUN ") for line in dockerfile() if line.startswith("RUN ")]
    scripts += [step["run"] for job in jobs().values() for step in job["steps"] if "run" in step]
    scripts.append((ROOT / "docker/launch_test.sh").read_text())
    assert len(scripts) > 6
    for script in scripts:
        checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert not checked.returncode, checked.stderr


def test_every_launch_file_is_tried():
    tried = re.findall(r"^try (\S+) ", (ROOT / "docker/launch_test.sh").read_text(), flags=re.MULTILINE)
    assert sorted(tried) == sorted(file.name for file in (ROOT / "launch").glob("*.launch.py"))
