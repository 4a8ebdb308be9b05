"""Keys, passwords and headers: none in messages and logs, none to a server that was not named."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
from map_fixtures import TileServer, texture, write_geotiff

from xview_loc.maps import open_map
from xview_loc.maps.base import MapOpenError, MapOptions, MapUnavailableError, redact

LAT, LON = 48.2, 16.37
KEY = 'k3y with/every+thing"ä%'


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A server on the loopback interface; its root."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self)

        def do_HEAD(self) -> None:
            answer(self)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def redirecting(to: str) -> Iterator[tuple[str, list[str]]]:
    """A server that redirects every path to ``to`` + path; its root, and the paths asked for."""
    paths: list[str] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        paths.append(handler.path)
        redirect(handler, to + handler.path)

    with serving(answer) as root:
        yield root, paths


def redirect(handler: BaseHTTPRequestHandler, to: str) -> None:
    handler.send_response(302)
    handler.send_header("Location", to)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def options(folder: Path, **more: object) -> MapOptions:
    return MapOptions(cache_dir=folder / "cache", deadline_s=60.0, max_zoom=18, **more)


def test_a_redirection_to_another_server_is_not_followed(tmp_path: Path) -> None:
    chosen = options(tmp_path, api_key=KEY, headers={"Authorization": "Bearer h3ader"})
    with TileServer(None) as theirs, redirecting(theirs.root) as (root, paths):
        web = open_map(root + "/{z}/{x}/{y}.png?k={key}", chosen)
        with web, pytest.raises(MapUnavailableError) as caught:
            web.tile(LAT, LON, 128, 0.5)
        assert f"redirected to {theirs.root}, which is not followed" in str(caught.value)
        assert theirs.requests == 0 and paths
        # It is not asked again and again.
        assert len(paths) == len(set(paths))
    assert not any(word in str(caught.value) for word in (KEY, quote(KEY), "h3ader"))


def test_a_redirection_on_the_same_server_is_followed_but_not_for_ever(tmp_path: Path) -> None:
    with (
        redirecting("/again") as (root, paths),
        open_map(root + "/{z}/{x}/{y}.png", options(tmp_path)) as web,
    ):
        with pytest.raises(MapUnavailableError, match="redirected without end"):
            web.tile(LAT, LON, 64, 0.5)
        assert any(path.startswith("/again/again/") for path in paths)

    class Moved(TileServer):
        def _answer(self, handler: BaseHTTPRequestHandler) -> None:
            if handler.path.startswith("/new/"):
                handler.path = handler.path.removeprefix("/new")
                super()._answer(handler)
                return
            redirect(handler, "/new" + handler.path)

    with Moved(None) as server, open_map(server.url, options(tmp_path)) as web:
        assert web.tile(LAT, LON, 64, 0.5).valid_fraction == 1.0


def test_gdal_sends_no_password_to_another_server(tmp_path: Path) -> None:
    seen: list[dict[str, str]] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        seen.append(dict(handler.headers.items()))
        handler.send_error(404)

    with serving(answer) as theirs, redirecting(theirs) as (root, paths):
        source = root.replace("://", "://me:pa55word@") + "/map.tif?token=t0ken"
        with pytest.raises(MapOpenError) as caught:
            open_map(source, options(tmp_path))
        assert paths
    assert seen and not any("authorization" in map(str.lower, headers) for headers in seen)
    assert not any(word in str(caught.value) for word in ("pa55word", "t0ken"))


def test_keys_in_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def read(server: TileServer, folder: str) -> None:
        url = server.root + "/s3cretpathk3y0123/{key}/{z}/{x}/{y}.png?token=t0ken&key={key}"
        with open_map(url, options(tmp_path / folder, api_key=KEY)) as web:
            web.tile(LAT, LON, 64, 0.5)

    with TileServer(None) as server:
        # What a program gets that shows messages at INFO: no line for every tile.
        caplog.set_level(logging.INFO)
        read(server, "a")
        assert server.requests and "HTTP Request" not in caplog.text
        caplog.clear()
        for library in ("httpx", "httpcore"):
            caplog.set_level(logging.DEBUG, library)
        read(server, "b")
    assert "HTTP Request" in caplog.text
    secrets = (KEY, quote(KEY), quote(KEY, safe=""), "t0ken", "s3cretpathk3y0123", "k3y%20with", "every")
    assert not any(word in caplog.text for word in secrets)


@pytest.mark.parametrize(
    ("source", "secrets"),
    [
        ("/vsicurl/http://me:pa55@127.0.0.1:9/a.tif", ["pa55"]),
        ("/vsicurl/http://127.0.0.1:9/a.tif?sig=abcd", ["abcd"]),
        ("/vsicurl?max_retry=0&url=http%3A%2F%2Fme%3Apa55%40127.0.0.1%3A9%2Fa.tif", ["pa55"]),
        ("/vsizip//vsicurl/http://me:pa55@127.0.0.1:9/a.zip/a.tif", ["pa55"]),
        ("PG:host=127.0.0.1 port=9 user=me password=pa55 dbname=a", ["pa55"]),
        ("PG:postgresql://me:pa55@127.0.0.1:9/a", ["pa55"]),
        ('WMS:http://127.0.0.1:9/?apikey="pa55 w0rd"', ["pa55"]),
        ("<GDAL_WMS><UserPwd>me:pa55</UserPwd></GDAL_WMS>", ["pa55"]),
        ("OCI:me/pa55@db:TABLE", ["pa55"]),
        ("http://127.0.0.1:9/v1/0a1b2c3d4e5f6071/a.tif", ["0a1b2c3d4e5f6071"]),
        ("http://127.0.0.1:9/token/abcdef/a.tif", ["abcdef"]),
        ("http://127.0.0.1:9/pk.eyJ1IjoiZm9v.aBc1/a.tif", ["eyJ1IjoiZm9v"]),
    ],
)
def test_keys_in_the_names_of_maps_that_do_not_open(
    source: str, secrets: list[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(MapOpenError) as caught:
        open_map(source, options(tmp_path))
    for word in secrets:
        assert word not in str(caught.value) and word not in redact(source)
        assert word not in caplog.text
    assert len(str(caught.value).splitlines()) == 1


def test_names_stay_readable() -> None:
    for name in (
        "/data/vienna_2021_orthophoto_20cm.tif",
        "https://maps.example/vienna_2021_orthophoto_20cm.tif",
        "https://maps.example/wmts/{z}/{x}/{y}.png",
        "the key is wrong: ask for another",
    ):
        assert redact(name) == name
    assert redact("https://h/{z}/{x}/{y}?k=1", [""]) == "https://h/{z}/{x}/{y}?***"


def test_a_raster_that_fails_later_shows_no_key(tmp_path: Path) -> None:
    """The file is served, and then the server is gone."""
    tif = write_geotiff(tmp_path / "a.tif", texture(600, 600), LAT, LON, 0.5, "EPSG:32633", tiled=True)
    data = tif.read_bytes()
    gone = threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if gone.is_set():
            handler.send_error(500)
            return
        start, stop = 0, len(data)
        if asked := handler.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(data))
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        else:
            handler.send_response(200)
        handler.send_header("Accept-Ranges", "bytes")
        handler.send_header("Content-Length", str(stop - start))
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(data[start:stop])

    with serving(answer) as root:
        web = open_map(root.replace("://", "://me:pa55@") + "/a.tif?token=t0ken", options(tmp_path))
        gone.set()
        with web, pytest.raises(MapUnavailableError) as caught:
            web.tile(LAT + 0.001, LON, 128, 0.5)
    assert "pa55" not in str(caught.value) and "t0ken" not in str(caught.value)
