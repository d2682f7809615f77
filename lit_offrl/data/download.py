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

from lit_offrl.data.formats.cache import source_sha256
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


def secure(url: str) -> str:
    """Return the address by https where the host answers there; an address with a port stays as it is."""
    if not url.startswith("http://") or urllib.parse.urlsplit(url).port is not None:
        return url
    address = "https" + url.removeprefix("http")
    return address if host_answers(address) else url


def download(url: str, target: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Download a file, with a progress bar.

    What arrived before a connection broke is kept in `<target>.part`, beside it what names this version of the file
    (its ETag, or when it was modified); this call, or a later one, continues from there if the host still has that
    version. Where several processes want the same file, one downloads it and the others wait.

    Args:
        url: Address.
        target: Where the file will lie.
        size: Its length in bytes, if it is known.
        sha256: Its digest in hexadecimal, if it is known.

    Raises:
        UserError: The host cannot be reached, it has no such file, the file arrived incomplete, has another size or
            digest than the known one, or cannot be written; nothing lies at `target` then.
    """
    remedy = f"put the file into {target.parent}"
    part = target.with_name(target.name + ".part")
    try:
        if not host_answers(url):
            raise UserError(f"{target} is missing and the host of {url} cannot be reached: {remedy}")
        url = secure(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_lock(target.with_name(f".{target.name}.lock")):
            if not target.is_file():  # else another process was faster
                _download_part(url, part)
                _check(part, url, size, sha256)
                part.replace(target)
                _version_file(part).unlink(missing_ok=True)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url} answers {error.code} ({error.reason}), so {target} is missing: {remedy}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"{url} could not be downloaded to {target} ({one_line(error)}): try again, which goes on where it broke "
            f"off, or {remedy}"
        ) from error


def _check(part: Path, url: str, size: int | None, sha256: str | None) -> None:
    """Remove a file that is not the one that is known, and say so."""
    found = part.stat().st_size
    complaint = f"{found:,} bytes, not the known {size:,}" if size not in (None, found) else None
    if complaint is None and sha256 is not None:
        digest = source_sha256(part)
        if digest != sha256:
            complaint = f"the digest {digest}, not the known {sha256}"
    if complaint is not None:
        _discard(part)
        raise UserError(
            f"{url} has {complaint}: it was changed there or on the way; a file that you trust goes into {part.parent}"
        )


def _discard(part: Path) -> None:
    part.unlink()
    _version_file(part).unlink(missing_ok=True)


def _version_file(part: Path) -> Path:
    return part.with_name(part.name + ".version")


def _download_part(url: str, part: Path) -> None:
    """Complete the file `part`; remove it where nothing of it has arrived."""
    try:
        with part.open("ab") as file:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    _fetch(url, file, _version_file(part))
                    return
                except (TimeoutError, ConnectionError, http.client.HTTPException):  # noqa: PERF203 (three attempts)
                    if attempt == _ATTEMPTS:
                        raise
    finally:
        with contextlib.suppress(OSError):
            if not part.stat().st_size:
                _discard(part)


def _fetch(url: str, file: IO[bytes], version_file: Path) -> None:
    """Append the missing rest of the URL's content to `file`; begin anew where the host has another version of it."""
    begin = file.seek(0, os.SEEK_END)
    version = version_file.read_text() if begin and version_file.is_file() else ""
    if not version:  # nothing says which version the part is of
        begin = 0
        file.truncate(0)
    headers = {"Range": f"bytes={begin}-", "If-Range": version} if begin else {}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_SECONDS_OF_SILENCE)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(begin):
            return  # the file was complete already
        file.truncate(0)
        _fetch(url, file, version_file)
        return
    with response:
        if response.status != http.client.PARTIAL_CONTENT:  # another version, or a server that ignores ranges
            begin = 0
            file.truncate(0)
        length = response.headers.get("Content-Length")
        total = begin + int(length) if length else None
        version_file.write_text(_version(response.headers))
        _copy(response, file, begin, total, Path(urllib.parse.urlsplit(url).path).name)


def _version(headers: Any) -> str:
    """Return what names a version of a file in `If-Range`; a weak ETag may not."""
    etag = str(headers.get("ETag") or "")
    return etag if etag and not etag.startswith("W/") else str(headers.get("Last-Modified") or "")


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
