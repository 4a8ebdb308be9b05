"""Rasters that reach for other files and servers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from map_fixtures import TileServer, texture, write_geotiff

from xview_loc.maps import open_map
from xview_loc.maps.base import MapOpenError, MapOptions

LAT, LON = 48.2, 16.37
SIDE = 400
WMS = (
    "<GDAL_WMS><Service name='TMS'><ServerUrl>{root}/${{z}}/${{x}}/${{y}}.png</ServerUrl></Service>"
    "<DataWindow><UpperLeftX>-20037508.34</UpperLeftX><UpperLeftY>20037508.34</UpperLeftY>"
    "<LowerRightX>20037508.34</LowerRightX><LowerRightY>-20037508.34</LowerRightY><TileLevel>18</TileLevel>"
    "<TileCountX>1</TileCountX><TileCountY>1</TileCountY><YOrigin>top</YOrigin></DataWindow>"
    "<Projection>EPSG:3857</Projection><BlockSizeX>256</BlockSizeX><BlockSizeY>256</BlockSizeY>"
    "<BandsCount>3</BandsCount></GDAL_WMS>"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The map's folder, with two images in it and one beside it."""
    inside = tmp_path / "map"
    (inside / "tiles").mkdir(parents=True)
    for path in (inside / "a.tif", inside / "tiles" / "b.tif", tmp_path / "outside.tif"):
        write_geotiff(path, texture(SIDE, SIDE), LAT, LON, 0.5, "EPSG:32633")
    (inside / "secret.bin").write_bytes(b"root:x:0:0:" * 50_000)
    (inside / "link.tif").symlink_to(tmp_path / "outside.tif")
    os.mkfifo(inside / "pipe.tif")
    return inside


def source(name: str, relative: int = 1) -> str:
    return (
        f"<SimpleSource><SourceFilename relativeToVRT='{relative}'>{name}</SourceFilename>"
        "<SourceBand>1</SourceBand></SimpleSource>"
    )


def mosaic(path: Path, inner: str, attributes: str = "") -> Path:
    """A VRT of the place of the images, with ``inner`` in its band."""
    path.write_text(
        f"<VRTDataset rasterXSize='{SIDE}' rasterYSize='{SIDE}'><SRS>EPSG:32633</SRS>"
        "<GeoTransform>601673, 0.5, 0, 5339596, 0, -0.5</GeoTransform>"
        f"<VRTRasterBand dataType='Byte' band='1' {attributes}>{inner}</VRTRasterBand></VRTDataset>"
    )
    return path


def opens(path: str | Path, confined: bool = True) -> str:
    """Why a map does not open, "" if it does."""
    try:
        with open_map(path, MapOptions(confined=confined, cache_dir=None)) as aerial:
            assert aerial.info().bounds
        return ""
    except MapOpenError as error:
        assert len(str(error).splitlines()) == 1
        return str(error)


def test_mosaics_of_the_own_folder_open(folder: Path) -> None:
    assert opens(mosaic(folder / "1.vrt", source("a.tif") + source("tiles/b.tif"))) == ""
    assert opens(mosaic(folder / "2.vrt", source(str(folder / "a.tif"), 0))) == ""
    assert opens(mosaic(folder / "3.vrt", source("1.vrt"), "subClass='VRTSourcedRasterBand'")) == ""
    import rasterio
    from rasterio.shutil import copy

    with rasterio.open(folder / "a.tif") as tif:
        copy(tif, folder / "4.vrt", driver="VRT")
    assert opens(folder / "4.vrt") == ""
    with open_map(folder / "4.vrt") as shown, open_map(folder / "a.tif") as own:
        assert (shown.tile(LAT, LON, 64, 0.5).image == own.tile(LAT, LON, 64, 0.5).image).all()


RAW = "<SourceFilename relativeToVRT='1'>secret.bin</SourceFilename><ImageOffset>0</ImageOffset>"


@pytest.mark.parametrize(
    ("inner", "attributes", "says"),
    [
        (RAW, "subClass='VRTRawRasterBand'", "of the kind 'VRTRawRasterBand'"),
        (RAW, "SUBCLASS='vrtrawrasterband'", "of the kind"),
        (RAW + "<subClass>VRTRawRasterBand</subClass>", "", "'imageoffset' is not part"),
        (RAW, "subClass='VRTSourcedRasterBand' SubClass='VRTRawRasterBand'", "is not part of"),
        (source("{http}/0/0/0.png"), "", "not a plain file name"),
        (source("/vsicurl/{http}/0/0/0.png", 0), "", "not a plain file name"),
        (source("WMS:{http}/?", 0), "", "not a plain file name"),
        (source(WMS.replace("<", "&lt;"), 0), "", "not a plain file name"),
        (source("service.xml"), "", "service.xml"),
        (source("../outside.tif"), "", "outside of"),
        (source("{folder}/../outside.tif", 0), "", "outside of"),
        (source("link.tif"), "", "outside of"),
        (source("/etc/passwd", 0), "", "outside of"),
        (source("a.tif<!-- -->/../../outside.tif"), "", "comments"),
        ("<SimpleSource SourceFilename='../outside.tif'/>", "", "is not part of"),
        (source("pipe.tif"), "", "is no file"),
        (source("none.tif"), "", "is no file"),
        (source("secret.bin"), "", "not recognized"),
        (source("inner.vrt"), "", "outside of"),
        (source("loop.vrt") + source("a.tif"), "", ""),
        (
            "<PixelFunctionType>f</PixelFunctionType><PixelFunctionLanguage>Python</PixelFunctionLanguage>",
            "subClass='VRTDerivedRasterBand'",
            "of the kind",
        ),
        ("<Metadata domain='GEOLOCATION'><MDI key='X_DATASET'>{http}</MDI></Metadata>", "", "domain"),
        ("<GDALWarpOptions><SourceDataset>{http}</SourceDataset></GDALWarpOptions>", "", "not part of"),
    ],
)
def test_mosaics_of_anything_else_do_not(folder: Path, inner: str, attributes: str, says: str) -> None:
    with TileServer(None) as theirs:
        (folder / "service.xml").write_text(WMS.format(root=theirs.root))
        mosaic(folder / "inner.vrt", source("../outside.tif"))
        mosaic(folder / "loop.vrt", source("loop.vrt"))
        inner = inner.replace("{http}", theirs.root).replace("{root}", theirs.root)
        path = mosaic(folder / "m.vrt", inner.replace("{folder}", str(folder)), attributes)
        told = opens(path)
        assert says in told and (told or not says)
        # Not by another name either.
        assert (opens(path.rename(folder / "m.tif")) == "") == (not says)
        assert theirs.requests == 0


def test_where_it_is_allowed_a_mosaic_reaches_further(folder: Path) -> None:
    path = mosaic(folder / "m.vrt", source("../outside.tif"))
    assert "lies outside of" in opens(path) and opens(path, confined=False) == ""


def test_other_formats_and_files_do_not_open(folder: Path) -> None:
    with TileServer(None) as theirs:
        service = folder / "service.xml"
        service.write_text(WMS.format(root=theirs.root))
        inline = service.read_text().replace("${z}/${x}/${y}.png", "")
        grid = folder / "grid.asc"
        grid.write_text("ncols 2\nnrows 2\nxllcorner 0\nyllcorner 0\ncellsize 1\n1 2\n3 4\n")
        envi = folder / "secret.hdr"
        envi.write_text("ENVI\nsamples = 100\nlines = 100\nbands = 1\ndata type = 1\ninterleave = bsq\n")
        for path in (
            service,
            grid,
            folder / "secret.bin",
            inline,
            f"vrt://{folder}/a.tif?bands=1",
        ):
            assert "cannot open" in opens(path), path
        for path in (folder / "pipe.tif", Path("/dev/zero")):
            assert "a pipe or a device" in opens(path)
        assert "no such file" in opens(folder / "none.tif") and "no such file" in opens(
            "PG:password='a\\'b c'"
        )
        assert theirs.requests == 0
    # A mosaic over the network would be followed there.
    assert "cannot open" in opens("/vsizip/" + str(folder / "m.zip/m.vrt"))
