"""HTTP downloads that continue where they broke off. The target appears when it is complete.

pooch and huggingface_hub were looked at: pooch starts a broken download again, and the hub serves its own files only.
"""

from __future__ import annotations

import contextlib
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
from lit_offrl.system.files import temporary_lock
from lit_offrl.system.progress import progress_bar

_ATTEMPTS = 3
_SECONDS_TO_CONNECT = 4.0
_SECONDS_OF_SILENCE = 30.0
_CHUNK = 1 << 20


def host_answers(url: str, seconds: float = _SECONDS_TO_CONNECT) -> bool:
    """Return whether the host of a URL accepts connections within some seconds; True where a proxy is in between."""
    address = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies()
    if (address.scheme in proxies or "all" in proxies) and not urllib.request.proxy_bypass(address.netloc):
        return True
    port = address.port or {"https": 443}.get(address.scheme, 80)
    answered = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection((address.hostname, port), timeout=seconds):
            answered.set()

    # In a thread of its own, because the look-up of a host name has no time limit.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(seconds)
    return answered.is_set()


def download(url: str, target: Path) -> None:
    """Download a file, with a progress bar.

    What arrived before a connection broke is kept in `<target>.part`; this call, or a later one, continues from there.
    Where several processes want the same file, one downloads it and the others wait.

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
        with temporary_lock(target.with_name(f".{target.name}.lock")):
            if not target.is_file():  # else another process was faster
                _download_part(url, part)
                part.replace(target)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url} answers {error.code} ({error.reason}), so {target} is missing: {remedy}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"{url} could not be downloaded to {target} ({one_line(error)}): try again, which goes on where it broke "
            f"off, or {remedy}"
        ) from error


def _download_part(url: str, part: Path) -> None:
    """Complete the file `part`; remove it where nothing of it has arrived."""
    try:
        with part.open("ab") as file:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    _fetch(url, file)
                    return
                except (TimeoutError, ConnectionError, http.client.HTTPException):  # noqa: PERF203 (three attempts)
                    if attempt == _ATTEMPTS:
                        raise
    finally:
        with contextlib.suppress(OSError):
            if not part.stat().st_size:
                part.unlink()


def _fetch(url: str, file: IO[bytes]) -> None:
    """Append the missing rest of the URL's content to `file`."""
    begin = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-"} if begin else {})
    try:
        response = urllib.request.urlopen(request, timeout=_SECONDS_OF_SILENCE)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(begin):
            return  # the file was complete already
        file.truncate(0)
        _fetch(url, file)
        return
    with response:
        if response.status != http.client.PARTIAL_CONTENT:  # the server ignores ranges and sends the whole file
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
