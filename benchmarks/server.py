"""A STAC API on loopback over files that a test or a benchmark writes, with the faults of others.

The API is rustac's. The files come from a server of our own, as no other one fails on demand.
"""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from socket import create_server
from threading import Thread
from typing import Any, BinaryIO
from urllib.parse import urlparse

import rasterio
import urllib3
from numpy.typing import NDArray
from rasterio.transform import from_origin
from rasterio.warp import transform_geom
from shapely import box
from shapely.geometry import mapping, shape

from torchgeo_s1s2.datasets.rasters import Grid, crs_of


@dataclass
class Files:
    """A server of files, with the faults of real ones; names are paths below its address.

    Attributes:
        root: Folder of the files, which are below ``moved/`` too, by a redirect.
        contents: Files that are in no folder.
        url: Its address.
        faults: What a name answers next, each once: a status, or ``'drop'`` to break off midway.
        headers: Headers of answers that are such a status.
        cuts: Bytes after which the next answers of a name break off.
        etags: Version of each file.
        ranges: Whether a part of a file can be had.
        excess: What the length that is told has too much.
        most: Bytes that an answer to a request of a part has at most, as some proxies have it.
        asked: Name and first byte of each request.
        sent: Bytes sent of each name.
    """

    root: Path | None = None
    contents: dict[str, bytes] = field(default_factory=dict)
    url: str = ''
    faults: dict[str, list[Any]] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    etags: defaultdict[str, str] = field(default_factory=lambda: defaultdict(lambda: '"1"'))
    ranges: bool = True
    excess: int = 0
    most: int = 2**63
    asked: list[tuple[str, int]] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)

    def open(self, name: str) -> BinaryIO | None:
        """A file, None if there is none."""
        if name in self.contents:
            return BytesIO(self.contents[name])
        path = self.root and self.root / name
        return path.open('rb') if path and path.is_file() else None

    def first_bytes(self, name: str) -> list[int]:
        """First byte of each request of a file."""
        return [first for asked, first in self.asked if asked == name]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def __init__(self, files: Files, *args: Any) -> None:
        self.files = files
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        """Be silent."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        files, name = self.files, urlparse(self.path).path.lstrip('/')
        first, last = self.headers.get('Range', 'bytes=0-').removeprefix('bytes=').split('-')
        files.asked.append((name, int(first)))
        faults = files.faults.get(name)
        fault = faults.pop(0) if faults else None
        if isinstance(fault, int):
            self._answer(fault, **files.headers)
        elif name.startswith('moved/'):
            self._answer(302, Location=f'{files.url}/{name.removeprefix("moved/")}')
        elif content := files.open(name):
            with content:
                self._send(name, content, int(first), last, fault == 'drop')
        else:
            self._answer(404)

    def _send(self, name: str, content: BinaryIO, first: int, last: str, drop: bool) -> None:
        files, size = self.files, content.seek(0, os.SEEK_END)
        etag, part = files.etags[name], {}
        start, stop = 0, size
        if 'Range' in self.headers and files.ranges and self.headers.get('If-Range', etag) == etag:
            start, stop = first, min(int(last or size), size - 1, first + files.most - 1) + 1
            part = {'Content-Range': f'bytes {start}-{stop - 1}/{size}'}
        told = {'ETag': etag, 'Content-Length': str(stop - start + files.excess)}
        self._answer(206 if part else 200, **part, **told, **{'Accept-Ranges': 'bytes'})
        if self.command == 'HEAD':
            return
        cuts = files.cuts.get(name)
        length = cuts.pop(0) if cuts else (stop - start) // (2 if drop else 1)
        self.close_connection = length < stop - start + files.excess
        content.seek(start)
        with suppress(OSError):  # nobody listens any more
            while length > 0 and (chunk := content.read(min(length, 2**16))):
                files.sent[name] += self.wfile.write(chunk)
                length -= len(chunk)

    def _answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({'Content-Length': '0'} | headers).items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def serve_files(root: Path | None = None) -> Iterator[Files]:
    """Serve the files of a folder, and what is put into ``contents``."""
    files = Files(root)
    server = ThreadingHTTPServer(('127.0.0.1', 0), lambda *args: _Handler(files, *args))
    server.daemon_threads = True
    files.url = f'http://127.0.0.1:{server.server_address[1]}'
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serve_items(items: Sequence[dict[str, Any]], folder: Path) -> Iterator[str]:
    """Serve STAC items by an API; yields its address."""
    path = folder / 'items.json'
    path.write_text(json.dumps({'type': 'FeatureCollection', 'features': [*items]}))
    with create_server(('127.0.0.1', 0)) as free:
        address = f'127.0.0.1:{free.getsockname()[1]}'
    command: list[Any] = [Path(sys.executable).with_name('rustac'), 'serve', '--create-collections']
    process = subprocess.Popen(
        [*command, '--addr', address, path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        starting = urllib3.Retry(15, backoff_factor=0.01)
        urllib3.PoolManager().request('GET', f'http://{address}', retries=starting)
        yield f'http://{address}'
    finally:
        process.terminate()
        process.wait()


def write_cog(
    path: Path,
    value: NDArray[Any],
    left: float,
    top: float,
    res: float = 10,
    epsg: int = 32632,
    **options: Any,
) -> None:
    """Write a band (H, W) as a COG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = value.shape
    grid = Grid(crs_of(epsg), from_origin(left, top, res, res), width, height)
    profile = {'count': 1, 'dtype': value.dtype, 'compress': 'deflate', 'blocksize': 512} | options
    with rasterio.open(path, 'w', 'COG', **vars(grid), **profile) as dst:
        dst.write(value, 1)


def item(
    name: str,
    collection: str,
    time: str,
    assets: dict[str, dict[str, Any]],
    path: Path,
    **properties: Any,
) -> dict[str, Any]:
    """A STAC item that lies where a raster lies."""
    with rasterio.open(path) as src:
        outline = transform_geom(src.crs, 'EPSG:4326', mapping(box(*src.bounds)))
        projection = {'proj:code': f'EPSG:{src.crs.to_epsg()}'}
    media = {'type': 'image/tiff; application=geotiff; profile=cloud-optimized', 'roles': ['data']}
    return {
        'type': 'Feature',
        'stac_version': '1.1.0',
        'stac_extensions': ['https://stac-extensions.github.io/projection/v2.0.0/schema.json'],
        'id': name,
        'collection': collection,
        'geometry': outline,
        'bbox': [*shape(outline).bounds],
        'properties': {'datetime': time, **projection, **properties},
        'assets': {key: media | asset for key, asset in assets.items()},
        'links': [],
    }
