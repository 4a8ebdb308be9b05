"""Which files, servers and variables parameters may name while a node runs: those that its start allows.

Whoever reaches the node can set parameters and call services. Only its start is its owner's word.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xview_loc.files import others_can_write, state_folder
from xview_loc.maps.base import default_cache_dir, is_file_name
from xview_loc.nodes.parameters import ParameterError

SHIPPED_WEIGHTS = Path(__file__).parents[1] / "models" / "weights"


class Permissions:
    """The rules of one node. ``start``: the values of its parameters when it was started, by name."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        self._start = dict(start)

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise ParameterError if a parameter may not be set to its value; that of the start always may."""
        for name, value in values.items():
            if value == self._start.get(name):
                continue
            if name in ("checkpoint", "shadow_checkpoint"):
                self.check_checkpoint(value)
            elif name in ("directory", "map_cache_dir"):
                folder = _folder(self._start[name])
                if not _folder(value).is_relative_to(folder):
                    raise ParameterError(f"{name} must be {folder}, as at the start, or a folder in it")
            elif name in ("map_headers", "map_api_key_env"):
                self._require_remote_maps(f"{name} must stay as at the start")
            elif name == "map" and not is_file_name(value):
                self._require_remote_maps("map may change to a file only")

    def _require_remote_maps(self, otherwise: str) -> None:
        if not self._start["allow_remote_maps"]:
            raise ParameterError(f"{otherwise}, unless the node is started with allow_remote_maps: true")

    def check_checkpoint(self, path: str) -> None:
        """Raise ParameterError if the weights of this file may not be used; "" are the shipped ones."""
        named = (self._start["checkpoint"], self._start["shadow_checkpoint"])
        if not path or os.path.abspath(path) in [os.path.abspath(own) for own in named if own]:
            return
        folders = self._checkpoint_folders()
        if not any(_real(path).is_relative_to(folder) for folder in folders):
            allowed = ", ".join(map(str, folders))
            raise ParameterError(f"{path} is in no folder that checkpoint_dirs allows: {allowed}")

    def open_to_others(self) -> list[Path]:
        """Return the folders of checkpoints that another user of the machine can write to."""
        return [f for f in self._checkpoint_folders() if os.path.isdir(f) and others_can_write(f)]

    def _checkpoint_folders(self) -> list[Path]:
        folders = [Path(folder).expanduser() for folder in self._start["checkpoint_dirs"] if folder]
        if not folders:
            first = self._start["checkpoint"]
            folders = [*([Path(first).parent] if first else []), state_folder()]
        return [_real(folder) for folder in (*folders, SHIPPED_WEIGHTS)]


def _folder(name: str) -> Path:
    return _real(Path(name).expanduser() if name else default_cache_dir())


def _real(path: str | Path) -> Path:
    # Not Path.resolve, which raises on a loop of links.
    return Path(os.path.realpath(path))
