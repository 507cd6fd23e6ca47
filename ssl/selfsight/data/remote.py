"""Shards that lie elsewhere: whole files, fetched once into a cache that all processes of a machine share.

    http(s)://…     urllib: resumes a cut download, obeys Retry-After
    s3://… hf://…   through fsspec and the package it asks for (extra `remote`)

A cached file has the size of its original and, as modification time, a number made of what the server says of its
content (ETag, else date); where it says a checksum, the copy must have it. So an index and a reader check it as they
check any shard, a file that changed on the server is another file, and every machine agrees. A file appears under its
name only when it is complete. Each shard is locked while one process fetches it, and while a reader has it open; the
rest goes, the longest unused first, when there is no room.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import fcntl
import functools
import hashlib
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import cache_dir
from .source import DataError
from .tar import Reader, _Fd

if TYPE_CHECKING:
    from .order import Order

REMOTE = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://")
HTTP, FSSPEC = ("http", "https"), ("s3", "hf")
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that may be others next time
FIRST_WAIT, LONGEST_WAIT, BLOCK = 0.5, 60.0, 1 << 20
OPEN = 8  # shards that a process has open; they cannot leave the cache
LOOK_EVERY = 0.5  # seconds between looks at what is needed next
AHEAD = 2  # shards fetched before they are needed


class Settings(NamedTuple):
    """cache: folder (None: shards/ in the cache folder); gb: its size; retries: per request; timeout: seconds without
    a byte."""

    cache: Path | None = None
    gb: float = 100.0
    retries: int = 5
    timeout: float = 60.0


class About(NamedTuple):
    """What a server says of a file: bytes, a number that changes with its content (0: it says nothing), and the kind
    and hex digits of its checksum, where it is known."""

    size: int
    tag: int
    checksum: tuple[str, str] | None = None

    @property
    def stamp(self) -> tuple[int, int]:
        """Size and modification time of its copy, as `tar.stamp`; whole seconds, which every file system keeps."""
        return self.size, self.tag * 10**9


def is_remote(name: str) -> bool:
    """Whether a name is an address."""
    return REMOTE.match(name) is not None and not name.startswith("file://")


def _tag(*words: str | None) -> int:
    """A number below 10^9 from the first word that is there."""
    word = next((w for w in words if w), None)
    return int(hashlib.sha256(word.encode()).hexdigest()[:12], 16) % 10**9 if word else 0


def _checksum(headers: Mapping[str, str]) -> tuple[str, str] | None:
    """Of the whole file, from what servers call it (RFC 9530, RFC 1864, Google). ETags are often something else."""
    found = re.search(r"\bsha-256=:([\w+/=]+):", headers.get("Repr-Digest") or "")
    kind, text = "sha256", found and found[1]
    if not text:
        found = re.search(r"\bmd5=([\w+/=]+)", headers.get("X-Goog-Hash") or "")
        kind, text = "md5", found[1] if found else headers.get("Content-MD5")
    with contextlib.suppress(ValueError, TypeError):
        digest = base64.b64decode(text, validate=True)
        if len(digest) == hashlib.new(kind, usedforsecurity=False).digest_size:
            return kind, digest.hex()
    return None


# --- one file ---------------------------------------------------------------------------------------------------------


class Passing(Exception):
    """Something that may be better next time; wait: seconds that the server asks for."""

    def __init__(self, why: str, wait: float | None = None):
        super().__init__(why)
        self.wait = wait


def _again(what: str, url: str, settings: Settings, attempt: Any) -> Any:
    """attempt(), tried again with growing waits; DataError with the last reason."""
    for number in range(settings.retries + 1):
        try:
            return attempt()
        except Passing as error:
            last = error
            if number < settings.retries:
                growing = min(LONGEST_WAIT, FIRST_WAIT * 2**number) * random.uniform(0.5, 1.0)  # not all at once
                time.sleep(growing if error.wait is None else min(LONGEST_WAIT, error.wait))
    raise DataError(f"{url} cannot be {what}: {last} ({settings.retries + 1} tries, data.retries={settings.retries})")


def _request(url: str, method: str, settings: Settings, headers: dict[str, str]) -> Any:
    """An open answer; Passing for what may pass, DataError for what will not."""
    try:
        return urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers),
                                      timeout=settings.timeout)  # fmt: skip
    except urllib.error.HTTPError as error:
        with error:
            if error.code in PASSING:
                raise Passing(f"status {error.code}", _retry_after(error.headers.get("Retry-After"))) from None
            raise DataError(f"{url}: the server answers {error.code} ({error.reason}); check the address") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError):
            raise DataError(f"{url} is no address that can be asked for ({error})") from None
        raise Passing(str(getattr(error, "reason", error))) from None


def _retry_after(text: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or a date."""
    if not text:
        return None
    if text.strip().isdigit():
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _fsspec(url: str) -> tuple[Any, str]:
    """The file system and path of an address; DataError where a package is missing."""
    import fsspec

    scheme = REMOTE.match(url)["scheme"]
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        package = {"s3": "s3fs", "hf": "huggingface_hub"}.get(scheme, scheme)
        raise DataError(f"{url}: {scheme}:// needs the package {package}: pip install 'selfsight[remote]' ({error})"
                        ) from None  # fmt: skip


def ask(url: str, settings: Settings) -> About:
    """What the server says of a file; DataError in one sentence."""
    if REMOTE.match(url)["scheme"] in HTTP:

        def attempt() -> About:
            with _request(url, "HEAD", settings, {}) as answer:
                length = answer.headers.get("Content-Length")
                if not length:
                    raise DataError(f"{url}: the server does not say how long it is (Content-Length); use "
                                    "data.mode=stream, or copy the shards first")  # fmt: skip
                tag = _tag(answer.headers.get("ETag"), answer.headers.get("Last-Modified"))
                return About(int(length), tag, _checksum(answer.headers))
    else:
        system, path = _fsspec(url)

        def attempt() -> About:
            try:
                info = system.info(path)
            except FileNotFoundError:
                raise DataError(f"{url} does not exist") from None
            except OSError as error:
                raise Passing(str(error)) from None
            words = (info.get(k) for k in ("ETag", "etag", "checksum", "blob_id", "LastModified", "created"))
            sha256 = (info.get("lfs") or {}).get("sha256")
            return About(int(info["size"]), _tag(*(str(w) for w in words if w)), sha256 and ("sha256", sha256))

    return _again("asked for", url, settings, attempt)


def download(url: str, about: About, target: Path, settings: Settings) -> None:
    """All bytes of a file into `target`, which may have the first of them already; DataError in one sentence."""
    http = REMOTE.match(url)["scheme"] in HTTP

    def attempt() -> None:
        have = target.stat().st_size if target.exists() else 0
        if have > about.size:
            target.unlink()
            have = 0
        if have < about.size or not about.size:
            _http(have) if http else _other()
        found = target.stat().st_size if target.exists() else 0
        if found != about.size:
            raise Passing(f"it ended after {found:,} of {about.size:,} bytes")
        if about.checksum:
            kind, expected = about.checksum
            with target.open("rb") as file:
                digest = hashlib.file_digest(file, functools.partial(hashlib.new, kind, usedforsecurity=False))
            if digest.hexdigest() != expected:
                target.unlink()
                raise Passing(f"what came has another {kind} checksum than the server says")

    def _http(have: int) -> None:
        with _request(url, "GET", settings, {"Range": f"bytes={have}-"} if have else {}) as answer:
            now = _tag(answer.headers.get("ETag"), answer.headers.get("Last-Modified"))
            if now != about.tag:
                target.unlink(missing_ok=True)
                raise DataError(f"{url} changed on the server while it was in use; leave the shards alone, and start "
                                "again (its index is then rebuilt)")  # fmt: skip
            goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            try:
                with target.open("ab" if goes_on else "wb") as file:
                    while block := answer.read(BLOCK):
                        file.write(block)
            except (OSError, ValueError) as error:  # a cut or stalled connection; what came is kept
                if isinstance(error, OSError) and error.filename:
                    raise DataError(f"{target} cannot be written ({error.strerror}): see data.cache") from None
                raise Passing(str(error) or type(error).__name__) from None
            except Exception as error:  # http.client's own
                raise Passing(f"{type(error).__name__}: {error}") from None

    def _other() -> None:
        system, path = _fsspec(url)
        try:
            system.get_file(path, str(target))
        except OSError as error:
            raise Passing(str(error)) from None

    _again("fetched", url, settings, attempt)


# --- the cache --------------------------------------------------------------------------------------------------------


class Cache:
    """Copies of remote files in one folder. Picklable; every process has its own object."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.folder = settings.cache or cache_dir() / "shards"
        self.limit = int(settings.gb * 1e9)

    def place(self, url: str) -> Path:
        """Where the copy of a file lies, whether it is there or not."""
        name = re.sub(r"[^\w.-]", "_", url.rpartition("/")[2])[-80:]
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"

    def has(self, url: str, about: About) -> bool:
        """Whether the copy is there and is that of this content."""
        try:
            status = self.place(url).stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == about.stamp

    def open(self, url: str, about: About, wait: bool = True) -> _Fd | None:
        """The copy, fetched if need be, kept from leaving the cache while it is open. wait=False: None if another
        process is fetching it."""
        path = self.place(url)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                with _locked(path.with_name(f".{path.name}.lock"), wait) as alone:
                    if not alone:
                        return None
                    if not self.has(url, about):
                        self._fetch(url, about, path)
                    file = _Fd(str(path))
                    _share(file.fd)
                    if (os.fstat(file.fd).st_size, os.fstat(file.fd).st_mtime_ns) == about.stamp:
                        os.utime(path, ns=(time.time_ns(), about.stamp[1]))  # used now; who leaves first depends on it
                        return file
        except OSError as error:
            raise DataError(f"data.cache={self.folder} cannot be used ({error.strerror or error}); choose a folder on "
                            "a disk with room") from error  # fmt: skip

    def _fetch(self, url: str, about: About, path: Path) -> None:
        part = path.with_name(f".{path.name}.part-{about.tag}")
        for other in self.folder.glob(f".{path.name}.part-*"):  # of another content
            if other != part:
                other.unlink(missing_ok=True)
        self._make_room(about.size)
        download(url, about, part, self.settings)
        os.utime(part, ns=(time.time_ns(), about.stamp[1]))
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)

    def _make_room(self, size: int) -> None:
        """Let copies go, the longest unused first, until `size` more bytes are within the limit."""
        with _locked(self.folder / ".room.lock", True):
            found = []
            for path in self.folder.iterdir():
                with contextlib.suppress(OSError):
                    if not path.name.endswith(".lock"):
                        status = path.stat()
                        found.append((status.st_atime_ns, status.st_size, path))
            used = sum(bytes for _, bytes, _ in found)
            for _, bytes, path in sorted(found):
                if used + size <= self.limit:
                    return
                if not path.name.startswith(".") and _remove_unused(path):
                    used -= bytes
            if used + size > self.limit:
                raise DataError(f"data.cache_gb={self.settings.gb:g} is too small: {used / 1e9:.2f} GB of shards are "
                                f"in use and one of {size / 1e9:.2f} GB is needed; give data.cache_gb="
                                f"{(used + size) / 1e9:.2f} or more")  # fmt: skip


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Alone with a file; False if somebody else is and we do not wait. On file systems without locks: True."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True


def _share(fd: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_SH)


def _remove_unused(path: Path) -> bool:
    """Remove a copy unless a process has it open."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


# --- what shards need -------------------------------------------------------------------------------------------------


class RemoteReader(Reader):
    """`tar.Reader` of files in the cache; they are fetched when they are first read, or ahead of that."""

    def __init__(self, urls: Sequence[str], abouts: Sequence[About], cache: Cache):
        super().__init__(urls, [about.stamp for about in abouts], OPEN)
        self.abouts, self.cache = list(abouts), cache
        self.ahead: threading.Thread | None = None
        self.looked = 0.0

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"abouts": self.abouts, "cache": self.cache, "ahead": None}

    def opened(self, number: int) -> _Fd:
        """A shard, from the cache."""
        return self.cache.open(self.paths[number], self.abouts[number])

    def may_fetch(self) -> bool:
        """Whether it is time to look ahead: nothing is being fetched, and the last look was a while ago."""
        if time.monotonic() - self.looked < LOOK_EVERY or (self.ahead is not None and self.ahead.is_alive()):
            return False
        self.looked = time.monotonic()
        return True

    def fetch_ahead(self, numbers: Sequence[int]) -> None:
        """Fetch the first of these shards that are not there, beside whatever else is done."""
        missing = [n for n in numbers if not self.cache.has(self.paths[n], self.abouts[n])][:AHEAD]
        if missing:
            self.ahead = threading.Thread(target=self._fetch, args=(missing,), name="fetch-ahead", daemon=True)
            self.ahead.start()

    def _fetch(self, numbers: list[int]) -> None:
        for number in numbers:
            with contextlib.suppress(DataError):  # whoever needs it will say so
                self.cache.open(self.paths[number], self.abouts[number], wait=False)


def ask_all(urls: Sequence[str], settings: Settings) -> list[About]:
    """`ask` of many files."""
    with ThreadPoolExecutor(min(16, len(urls))) as pool:
        return list(pool.map(lambda url: ask(url, settings), urls))


def small_file(url: str, settings: Settings, limit: int = 256 << 20) -> bytes | None:
    """The bytes of a file beside a shard; None if there is none (or none that can be had)."""
    import tempfile

    try:
        about = ask(url, settings._replace(retries=min(1, settings.retries)))
        if about.size > limit:
            return None
        with tempfile.TemporaryDirectory() as folder:
            download(url, about, Path(folder) / "file", settings)
            return (Path(folder) / "file").read_bytes()
    except (DataError, OSError):
        return None


def shards_at_once(order: Order, lengths: Sequence[int]) -> set[int]:
    """Shards that an order reads in turn: of the window that touches most, among some; all for a global shuffle."""
    if order.chunk == 1:
        return set(range(len(lengths)))
    span, ends, most = min(order.num_samples, order.window * order.chunk), np.cumsum(lengths), set()
    for start in np.linspace(0, order.num_samples - span, 8).astype(np.int64) // span * span:
        touched = np.searchsorted(ends, order(np.arange(start, start + span)), side="right")
        most = max(most, set(np.unique(touched).tolist()), key=len)
    return most


def refuse_small(order: Order, lengths: Sequence[int], abouts: Sequence[About], settings: Settings) -> None:
    """DataError where a cache cannot hold what the order needs at once: every sample would fetch its shard again."""
    sizes = sorted((about.size for about in abouts), reverse=True)
    count = min(len(sizes), len(shards_at_once(order, lengths)) + AHEAD)
    needed, whole = sum(sizes[:count]) / 1e9, sum(sizes) / 1e9
    if needed > settings.gb:
        typical = max(1, int(np.median(lengths)))
        raise DataError(
            f"data.cache_gb={settings.gb:g}: this order reads from {count:,} of {len(sizes):,} shards in turn, "
            f"{needed:.2f} GB; give data.cache_gb={needed:.2f} or more (all: {whole:.2f}), or an order that stays in "
            f"few shards, for example data.chunk={typical} data.window=4 (another order is another run)"
        )


def index_of(url: str, about: About, cache: Cache, index_dir: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and arrays of a shard's index: the one kept here, else the side-car beside the shard, else made by
    fetching the shard once."""
    from .manifest import build_index, load_index, save_index

    name = f"{url.rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:16]}.idx"
    place = (index_dir or cache_dir() / "index") / name
    found = load_index(place)
    if found and tuple(found[0].get("stamp", ())) == about.stamp and "image" in found[1]:
        return found
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        found = _published(url, about, cache.settings, place)
        if found is None:
            file = cache.open(url, about)
            try:
                found = build_index(str(cache.place(url)))
            except DataError as error:
                raise DataError(str(error).replace(str(cache.place(url)), url)) from None
            finally:
                del file
        save_index(place, *found)
    except OSError as error:
        raise DataError(f"{place} cannot be written ({error.strerror}); use data.index_dir=<a folder that can be "
                        "written>") from error  # fmt: skip
    return found


def _published(url: str, about: About, settings: Settings, place: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The index that lies beside a shard, if it is of a file of this size (times differ between machines)."""
    from .manifest import load_index

    data = small_file(f"{url}.idx", settings)
    if data is None:
        return None
    own = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        own.write_bytes(data)
        found = load_index(own)
    finally:
        own.unlink(missing_ok=True)
    if not found or "image" not in found[1] or found[0].get("stamp", (None,))[0] != about.size:
        return None
    return found[0] | {"stamp": list(about.stamp)}, found[1]


def indexes(urls: Sequence[str], abouts: Sequence[About], cache: Cache, index_dir: Path | None) -> list[Any]:
    """`index_of` of many shards."""
    from tqdm import tqdm

    with ThreadPoolExecutor(min(2, len(urls))) as pool:
        work = pool.map(lambda pair: index_of(*pair, cache, index_dir), zip(urls, abouts))
        return list(tqdm(work, "indexing remote shards (once)", len(urls), leave=False, delay=2, disable=None))
