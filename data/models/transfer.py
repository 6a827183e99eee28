"""The transfer of one file over HTTP, so that one that breaks off can be resumed."""

import os
import re
import secrets
import shutil
import ssl
import time
import urllib.request
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from functools import cache
from urllib.parse import urlsplit

from tqdm import tqdm

from data.process.errors import InputError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

CHANGED = "the file on the server has changed meanwhile"


@contextmanager
def open_partial(path):
    """Yield where to put what arrives of `path`. If the transfer does not end and can be resumed,
    it stays, with its ETag beside it. Two processes never write to the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = path.with_name(f".{path.name}.partial")
    own = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    with open(shared, "ab") as file:
        is_locked = _lock(file)
        partial = shared if is_locked else own
        try:
            yield partial
        finally:
            if not is_locked or not resumable_size(partial):
                _discard(partial)


def _lock(file):
    """Try to lock an open file until it is closed. Returns whether that worked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (AttributeError, OSError):  # no fcntl, or a file system without locks
        with suppress(OSError):
            os.unlink(file.name)
        return False
    with suppress(FileNotFoundError):
        # The process that had it before may have moved or removed it.
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    return False


def resumable_size(partial):
    """How many bytes of a file are here, 0 if its transfer can't be resumed."""
    is_resumable = partial.is_file() and _etag_path(partial).is_file()
    return partial.stat().st_size if is_resumable else 0


def _etag_path(partial):
    return partial.with_name(f"{partial.name}.etag")


def _store_etag(partial, etag):
    """Remember the ETag of what begins to arrive. A weak one does not promise the same bytes."""
    if etag and not etag.startswith("W/"):
        _etag_path(partial).write_text(etag, encoding="utf-8")
    else:
        _etag_path(partial).unlink(missing_ok=True)


def _discard(partial):
    partial.unlink(missing_ok=True)
    _etag_path(partial).unlink(missing_ok=True)


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    """Sends the token again to the host that it was meant for, as when a repository was renamed,
    and never to another: the hub keeps large files elsewhere."""

    def redirect_request(self, request, *arguments):
        redirected = super().redirect_request(request, *arguments)
        token = request.get_header("Authorization")
        if token and urlsplit(redirected.full_url)[:2] == urlsplit(request.full_url)[:2]:
            redirected.add_unredirected_header("Authorization", token)
        return redirected


def fetch(url, partial, token=None):
    """Download a file to `partial`, or only its rest if `partial` has its beginning and the ETag is
    still the same. token: for the server. Raises OSError, HTTPException or EOFError."""
    request = urllib.request.Request(url)
    if token:
        # In bytes, so that the server judges a token with characters that no token has.
        request.add_unredirected_header("Authorization", f"Bearer {token}".encode(errors="replace"))
    size, etag = resumable_size(partial), None
    if size:
        etag = _etag_path(partial).read_text(encoding="utf-8")
        request.add_header("Range", f"bytes={size}-")
        request.add_header("If-Range", etag)
    opener = urllib.request.build_opener(_RedirectHandler, *_https_handlers())
    try:
        response = opener.open(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not size:  # 416: the file has no such range
            raise
        if (error.headers["ETag"], error.headers["Content-Range"]) == (etag, f"bytes */{size}"):
            return  # all of it was here
        _discard(partial)
        raise EOFError(CHANGED) from error
    with response:
        is_rest = response.status == 206
        start = (response.headers["Content-Range"] or "").rpartition("-")[0]
        if is_rest and (response.headers["ETag"], start) != (etag, f"bytes {size}"):
            _discard(partial)
            raise EOFError(CHANGED)
        with open(partial, "ab" if is_rest else "wb") as file:
            if not is_rest:
                _store_etag(partial, response.headers["ETag"])
            _copy(response, file, name=url.rsplit("/", 1)[-1])


def _copy(response, file, name):
    """Append what a server sends to a file. Raises EOFError if it is cut off."""
    start, size = file.tell(), getattr(response, "length", None)  # None: the server does not say
    total = None if size is None else start + size
    options = {"total": total, "initial": start, "desc": name, "disable": None}
    with tqdm.wrapattr(response, "read", **options) as reader:
        shutil.copyfileobj(reader, file)
    if total is not None and file.tell() != total:
        raise EOFError(f"cut off after {file.tell():,} of {total:,} bytes")


def _https_handlers():
    """What urllib needs to trust the certificates of REQUESTS_CA_BUNDLE as well. SSL_CERT_FILE and
    SSL_CERT_DIR count without that."""
    path = os.environ.get("REQUESTS_CA_BUNDLE")
    return [urllib.request.HTTPSHandler(context=_context(path))] if path else []


@cache  # it takes 50 ms, as often as a file is asked for
def _context(path):
    """The usual certificates, and those of a file or directory."""
    context = ssl.create_default_context()
    try:
        context.load_verify_locations(**{"capath" if os.path.isdir(path) else "cafile": path})
    except OSError as error:
        problem = f"has no certificates that can be read ({error.strerror or error})"
        raise InputError(f"REQUESTS_CA_BUNDLE={path}: {problem}; correct or unset it") from error
    return context


def requested_wait(headers):
    """How many seconds a server asks to wait, None if it does not."""
    value = headers.get("Retry-After", "").strip()
    # The hub has a field of its own, as in "resolvers";r=0;t=55.
    match = re.fullmatch(r"(\d{1,9})", value)
    match = match or re.search(r"\bt=(\d{1,9})\b", headers.get("RateLimit", ""))
    if match:
        return int(match[1])
    with suppress(TypeError, ValueError, OverflowError):  # if it is no date either
        return max(0, round(parsedate_to_datetime(value).timestamp() - time.time()))
    return None
