"""A STAC API on loopback over files that a test or a benchmark writes, with the faults of others.

The API is rustac's. The files come from a server of our own, as no other one fails on demand.
"""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import create_server
from threading import Thread
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.parse import urlparse
from urllib.request import urlopen

import rasterio
from numpy.typing import NDArray
from rasterio.transform import from_origin
from rasterio.warp import transform_geom
from shapely import box
from shapely.geometry import mapping, shape


class Files(NamedTuple):
    """A server of files.

    Attributes:
        url: Its address.
        faults: What a path answers next, each once: a status, or ``'drop'`` to break off midway.
        asked: Number of requests of each path.
    """

    url: str
    faults: dict[str, list[Any]]
    asked: Counter[str]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def __init__(self, files: Files, root: Path, *args: Any) -> None:
        self.files, self.root = files, root
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        """Be silent."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        self.files.asked[path] += 1
        fault = next(iter(self.files.faults.get(path, ())), 200)
        if fault != 200:
            self.files.faults[path].pop(0)
        if path.startswith('/moved/'):
            return self._answer(302, Location=self.files.url + path.removeprefix('/moved'))
        file = self.root / path.lstrip('/')
        if (isinstance(fault, int) and fault != 200) or not file.is_file():
            return self._answer(fault if isinstance(fault, int) and fault != 200 else 404)
        size = file.stat().st_size
        first, last = self.headers.get('Range', 'bytes=0-').removeprefix('bytes=').split('-')
        start, stop = int(first), min(int(last or size), size - 1) + 1
        partly = {'Content-Range': f'bytes {start}-{stop - 1}/{size}'}
        headers = partly if 'Range' in self.headers else {}
        with file.open('rb') as content:
            content.seek(start)
            body = content.read(stop - start) if self.command == 'GET' else b''
        length = {'Content-Length': str(stop - start), 'Accept-Ranges': 'bytes'}
        self._answer(206 if headers else 200, **headers, **length)
        if fault == 'drop':
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({'Content-Length': '0'} | headers).items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def serve_files(root: Path) -> Iterator[Files]:
    """Serve the files of a folder, and below ``/moved/`` by a redirect."""
    files = Files('', {}, Counter())
    server = ThreadingHTTPServer(('127.0.0.1', 0), lambda *args: _Handler(files, root, *args))
    files = files._replace(url=f'http://127.0.0.1:{server.server_address[1]}')
    Thread(target=server.serve_forever, daemon=True).start()
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
        _wait(f'http://{address}')
        yield f'http://{address}'
    finally:
        process.terminate()
        process.wait()


def _wait(url: str) -> None:
    for _ in range(300):
        try:
            return urlopen(url).close()
        except URLError:
            time.sleep(0.1)
    raise TimeoutError(f'{url} did not start')


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
    profile = {
        'driver': 'COG',
        'width': value.shape[1],
        'height': value.shape[0],
        'count': 1,
        'dtype': value.dtype,
        'crs': rasterio.CRS.from_epsg(epsg),
        'transform': from_origin(left, top, res, res),
        'compress': 'deflate',
        'blocksize': 512,
    }
    with rasterio.open(path, 'w', **(profile | options)) as dst:
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
