"""HTTP downloads that go on where they broke off and appear in their place whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO, Any

from lit_offrl.errors import UserError, one_line
from lit_offrl.system.progress import progress_bar

_ATTEMPTS = 3
_SECONDS_TO_CONNECT = 4.0
_SECONDS_OF_SILENCE = 30.0
_CHUNK = 1 << 20


def host_answers(url: str, seconds: float = _SECONDS_TO_CONNECT) -> bool:
    """Whether the host of a URL accepts connections; knows within seconds. Behind a proxy only the client can tell."""
    address = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies()
    if (address.scheme in proxies or "all" in proxies) and not urllib.request.proxy_bypass(address.netloc):
        return True
    port = address.port or {"https": 443}.get(address.scheme, 80)
    answered = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection((address.hostname, port), timeout=seconds):
            answered.set()

    # Beside us, because looking a name up knows no time limit.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(seconds)
    return answered.is_set()


def download(url: str, target: Path) -> None:
    """Download a file, with a progress bar.

    What arrived before a connection broke is kept in `<target>.part`, and this call or a later one goes on from there.
    Of several processes that want the same file one downloads it and the others wait.

    Raises:
        UserError: The host cannot be reached, it has no such file, the file arrived incomplete, or it cannot be
            written; nothing lies at `target` then.
    """
    remedy = f"put the file into {target.parent}"
    part = target.with_name(target.name + ".part")
    try:
        if not host_answers(url):
            raise UserError(f"{target} is missing and the host of {url} cannot be reached: {remedy}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not target.is_file():  # else another process was faster
                _fetch_patiently(url, file)
                part.replace(target)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url} answers {error.code} ({error.reason}), so {target} is missing: {remedy}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"{url} could not be downloaded to {target} ({one_line(error)}): try again, which goes on where it broke "
            f"off, or {remedy}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            if not part.stat().st_size:
                part.unlink()


def _fetch_patiently(url: str, file: IO[bytes], attempts: int = _ATTEMPTS) -> None:
    try:
        _fetch(url, file)
    except (TimeoutError, ConnectionError, http.client.HTTPException):
        if attempts == 1:
            raise
        _fetch_patiently(url, file, attempts - 1)


def _fetch(url: str, file: IO[bytes]) -> None:
    """Append to `file` what it lacks of the URL's content."""
    begin = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-"} if begin else {})
    try:
        response = urllib.request.urlopen(request, timeout=_SECONDS_OF_SILENCE)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(begin):
            return  # all of it was there already
        file.truncate(0)
        _fetch(url, file)
        return
    with response:
        if response.status != http.client.PARTIAL_CONTENT:  # the server knows no ranges and sends the whole
            begin = 0
            file.truncate(0)
        length = response.headers.get("Content-Length")
        total = begin + int(length) if length else None
        _copy(response, file, begin, total, Path(urllib.parse.urlsplit(url).path).name)


def _copy(response: Any, file: IO[bytes], begin: int, total: int | None, name: str) -> None:
    received = begin
    with progress_bar(name, total, initial=begin, unit="B") as bar:
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            received += len(chunk)
            bar.update(len(chunk))
    file.flush()
    if total is not None and received != total:
        raise ConnectionError(f"the connection broke after {received} of {total} bytes")
