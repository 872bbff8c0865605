"""SICD scenes: complex images in NITF (NGA.STND.0024), as Umbra, Capella and others deliver them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from io import BufferedReader, FileIO
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from shards.errors import DataError
from shards.sources.scenes import Scene, Scenes, inside_border, radar_band
from shards.sources.sidecar import known

_BYTES = {"RE32F_IM32F": 8, "RE16I_IM16I": 4, "AMP8I_PHS8I": 8}  # of a pixel in a shard


class Sicd(Scenes):
    """SICD NITF: float pairs and amplitude with phase become complex64, integer pairs stay int16 pairs.

    Tiles of 256 pixels where the user names none. Read by sarkit, which unlike sarpy hands out the stored integers.
    """

    kind = "sicd"
    description = "SICD (NITF) complex scenes, cut into tiles of 256 pixels unless told otherwise"
    url = "https://umbra.space/open-data, https://www.capellaspace.com"
    licence = "as its publisher says; Umbra and Capella open data: CC BY 4.0 as commonly stated"
    modules = ("sarkit",)
    suffixes = (".nitf", ".ntf", ".sicd")
    columns: ClassVar = {"product": "SLC"}

    def open(self, path: Path, name: str) -> AbstractContextManager[Scene]:
        """See Scenes.open; the scene's id is the core name of the collection."""
        return _open(path, name)


class _FewBands(BufferedReader):
    """A file whose image headers have at most nine bands: with many, as no SICD has them, parsing takes hours.

    The parser reads field by field: a count of bands of one byte (NBANDS) and, only if it is 0, one of five bytes
    (XBANDS; MIL-STD-2500C, table A-3).
    """

    _before = b""

    def read(self, size: int | None = -1, /) -> bytes:
        """See BufferedReader.read; raises ValueError at the five bytes."""
        if size == 5 and self._before == b"0":
            raise ValueError("an image with more than nine bands is no SICD")
        self._before = super().read(size)
        return self._before


@contextmanager
def _open(path: Path, name: str) -> Iterator[Scene]:
    from sarkit.sicd import NitfReader

    logging.getLogger("jbpy").setLevel(logging.CRITICAL)  # a damaged file fills the screen; its reason is what counts
    with _FewBands(FileIO(path)) as file, NitfReader(file) as reader:
        xml = reader.metadata.xmltree
        stored = xml.findtext("{*}ImageData/{*}PixelType")
        if stored not in _BYTES:
            raise DataError(f"pixel type {stored!r} is none of SICD's", where=name, do="fetch it again or exclude it")
        amplitudes = _amplitude_table(xml)

        def rows(top: int, bottom: int) -> tuple[np.ndarray, np.ndarray | None]:
            pixels = _native(reader.read_sub_image(top, 0, bottom, width)[0], amplitudes)
            return pixels, inside_border(pixels)

        height, width = (int(xml.findtext(f"{{*}}ImageData/{{*}}Num{side}")) for side in ("Rows", "Cols"))
        yield Scene(height, width, _BYTES[stored], _columns(xml, name), rows)


def _native(stored: np.ndarray, amplitudes: np.ndarray) -> np.ndarray:
    """What a shard holds of pixels as they are stored: big-endian complex, or named pairs of integers."""
    if stored.dtype.names is None:
        return stored.astype(np.complex64)
    if "amp" in stored.dtype.names:
        turns = stored["phase"].astype(np.float32) / 256
        return (amplitudes[stored["amp"]] * np.exp(2j * np.pi * turns)).astype(np.complex64)
    return np.stack((stored["real"], stored["imag"]), axis=-1).astype(np.int16)


def _amplitude_table(xml: Any) -> np.ndarray:
    """Amplitude of each of the 256 codes of AMP8I_PHS8I: the file's table, else the code itself."""
    table = np.arange(256, dtype=np.float32)
    for entry in xml.findall("{*}ImageData/{*}AmpTable/{*}Amplitude"):
        table[int(entry.get("index"))] = float(entry.text)
    return table


def _columns(xml: Any, name: str) -> dict[str, Any]:
    def number(path: str) -> float | None:
        text = xml.findtext("/".join(f"{{*}}{tag}" for tag in path.split("/")))
        return float(text) if text else None

    low, high = number("RadarCollection/TxFrequency/Min"), number("RadarCollection/TxFrequency/Max")
    steps = [step for step in (number("Grid/Row/SS"), number("Grid/Col/SS")) if step]
    collector = xml.findtext("{*}CollectionInfo/{*}CollectorName")
    factor = number("Radiometric/SigmaZeroSFPoly/Coef")
    return known(
        sensor=collector,
        platform=collector,
        band=radar_band((low + high) / 2 if low and high else None),
        polarisation=(xml.findtext("{*}ImageFormation/{*}TxRcvPolarizationProc") or "").replace(":", ""),
        spacing=max(steps, default=None),
        look_angle=number("SCPCOA/IncidenceAng"),
        depression=number("SCPCOA/GrazeAng"),  # at the scene; from orbit the angle at the sensor is a little larger
        scene=xml.findtext("{*}CollectionInfo/{*}CoreName") or PurePosixPath(name).stem,
        calibration=f"sigma0 = {factor:.6g} |z|^2 at the scene centre" if factor else "uncalibrated",
    )
