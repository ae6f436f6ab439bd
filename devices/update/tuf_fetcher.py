"""python-tuf's way to get metadata and targets, over a `Transport`: HTTP and a USB stick look the same to it.

1. `BASE_URL` stands for the repository: tuf wants URLs, a folder has none.
2. Every failure is one of tuf's own: 403 and 404 tell its client that there is no newer root.
3. A connection that is cut goes on at its byte, until the deadline. Where the file was replaced meanwhile, the mixture
   fails its signature or hash, as any other wrong bytes do.
"""

from __future__ import annotations

from collections.abc import Iterator

from tuf.api.exceptions import DownloadError, DownloadHTTPError
from tuf.ngclient.fetcher import FetcherInterface

from edge_ilseg.devices.update.transport import Transport, TransportError
from edge_ilseg.devices.update.tries import Tries

BASE_URL = "repository:///"
"""Before the path of a file: `Updater(metadata_base_url=BASE_URL + "metadata/", …)`."""
DEADLINE_S = 120.0


class TufFetcher(FetcherInterface):
    """Serves `BASE_URL` from a transport; `deadline_s` is for each file."""

    def __init__(self, transport: Transport, *, deadline_s: float = DEADLINE_S) -> None:
        self._transport = transport
        self._deadline_s = deadline_s

    def _fetch(self, url: str) -> Iterator[bytes]:
        if not url.startswith(BASE_URL):
            raise DownloadError(f"{url} is not in the repository")
        return self._pieces(url.removeprefix(BASE_URL))

    def _pieces(self, path: str) -> Iterator[bytes]:
        tries = Tries(self._deadline_s)
        position = 0
        while True:
            try:
                for piece in self._transport.read_range(path, position, None):
                    yield piece
                    position += len(piece)
                    tries.progressed()
            except TransportError as error:
                try:
                    tries.failed(error)
                except TransportError as last:
                    raise _tuf_error(last) from last
            else:
                return


def _tuf_error(error: TransportError) -> DownloadError:
    if error.status is not None:
        return DownloadHTTPError(error.one_line(), error.status)
    return DownloadError(error.one_line())
