"""Shards on a server that stalls, cuts, refuses and changes its mind: the same samples as from local files, or one
sentence."""

import base64
import contextlib
import email.utils
import hashlib
import http.server
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import runs
from kill_driver import count
from selfsight import config
from selfsight.data import open_source
from selfsight.data import remote as module
from selfsight.data.loader import Positions, Samples, make_loader
from selfsight.data.manifest import Shards
from selfsight.data.order import Order
from selfsight.data.remote import About, Cache, Settings, ask, download
from selfsight.data.source import DataError
from selfsight.views.spec import Crop, Views

EACH = 12


class Server(http.server.ThreadingHTTPServer):
    """Files of a folder; `faults` is what goes wrong, one for each GET of a name that ends in `spoil`."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.spoil, self.log, self.ranges = folder, [], ".tar", [], True
        self.silent: set[str] = set()  # what is not being answered, until `over`
        self.over = threading.Event()
        self.digest: Callable[[bytes], tuple[str, str]] | None = None  # header of a file
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        pass  # clients that give up


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(head=True)

    def do_GET(self):
        self._answer(head=False)

    def _answer(self, head):
        server, path = self.server, self.server.folder / self.path.lstrip("/")
        fault = None
        if not head:
            server.log.append(self.path)
            if server.faults and self.path.endswith(server.spoil):
                fault = server.faults.pop(0)
        if not path.is_file():
            return self.send_error(404)
        if isinstance(fault, int):
            self.send_response(fault)
            if fault == 429:
                self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        data = path.read_bytes()
        tag = hashlib.sha256(data).hexdigest()[:16] if fault != "other tag" else "changed"
        start, asked = 0, self.headers.get("Range")
        if asked and server.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{tag}"')
        if server.digest:
            self.send_header(*server.digest(data))
        if fault == "flip":
            data = data[:700] + bytes([data[700] ^ 1]) + data[701:]
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if head:
            return None
        body = data[start:]
        if fault == "slow":
            time.sleep(1)
        if fault == "silence":
            server.silent.add(self.path)
            server.over.wait(20)
            server.silent.discard(self.path)
            return self.connection.close()
        if fault in ("cut", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(1.5)
            return self.connection.close()
        return self.wfile.write(body)


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    for i in range(3):
        runs.shard(folder / f"train-{i:06d}.tar", EACH)
    served = Server(folder)
    yield served
    served.over.set()
    served.shutdown()
    served.server_close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)


def settings(tmp_path, **more):
    return Settings(tmp_path / "cache", **({"retries": 3, "timeout": 0.5} | more))


def remote(server, tmp_path, **more):
    return Shards(f"{server.url}/train-{{000000..000002}}.tar", tmp_path / "index", remote=settings(tmp_path, **more))


def local(server):
    return Shards(str(server.folder / "train-*.tar"))


def everything(source):
    return [source.read(i)[:3] for i in range(len(source))]


# --- the same as local ------------------------------------------------------------------------------------------------


def test_samples_and_fingerprint_are_those_of_local_shards(server, tmp_path):
    (server.folder / "classes.json").write_text('["a", "b", "c"]')
    far, near = remote(server, tmp_path), local(server)
    assert everything(far) == everything(near) and far.lengths == near.lengths
    assert far.fingerprint == near.fingerprint and far.classes == near.classes == ["a", "b", "c"]
    assert [raw.where for raw in (far.read(0),)] == [f"{server.url}/train-000000.tar, key s0000"]


def test_a_shard_is_fetched_once_whoever_asks(server, tmp_path):
    for _ in range(2):
        everything(remote(server, tmp_path))
    assert sorted(name for name in server.log if name.endswith(".tar")) == [f"/train-{i:06d}.tar" for i in range(3)]


def test_a_published_index_saves_fetching_a_shard(server, tmp_path):
    near = local(server)  # which leaves .idx files beside the shards
    far = remote(server, tmp_path)
    assert not [name for name in server.log if name.endswith(".tar")]
    assert far.lengths == near.lengths and far.read(5)[:3] == near.read(5)[:3]
    assert [name for name in server.log if name.endswith(".tar")] == ["/train-000000.tar"]


def test_an_index_of_another_file_is_not_believed(server, tmp_path):
    local(server)
    runs.shard(server.folder / "train-000001.tar", EACH + 5)
    assert remote(server, tmp_path).lengths == [EACH, EACH + 5, EACH]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_local_shards_also_after_an_interruption(server, tmp_path, workers):
    views = Views((Crop("global", 1, 16, (0.5, 1.0)),))

    def batches(source, start, stop):
        order = Order(3, source.lengths)
        loader = make_loader(Samples(source, order, views, 3), Positions(start, stop, 6, 1, 0, 1), workers, False)
        return [(batch["id"], batch["crops"]["global"]) for batch in loader]

    expected, far = batches(local(server), 0, 9), remote(server, tmp_path)
    found = batches(far, 0, 4)
    for path in (tmp_path / "cache").glob("*.tar"):  # and the cache was emptied in between
        path.unlink()
    found += batches(remote(server, tmp_path), 4, 9)
    for (ids, images), (their_ids, their_images) in zip(found, expected, strict=True):
        assert torch.equal(ids, their_ids) and torch.equal(images, their_images)


def test_a_run_on_remote_shards_ends_with_the_bits_of_a_local_one(server, tmp_path):
    words = ("max_steps=3", "knn.every_n_steps=0", "data=shards")
    more = (f"data.cache={tmp_path / 'cache'}", f"data.index_dir={tmp_path / 'index'}")
    runs.run_here(tmp_path / "near", *words, f"data.train={server.folder}/train-*.tar", without=runs.SCENES)
    runs.run_here(tmp_path / "far", *words, *more, f"data.train='{server.url}/train-{{000000..000002}}.tar'",
                  without=runs.SCENES)  # fmt: skip
    runs.assert_identical(runs.final_state(tmp_path / "near"), runs.final_state(tmp_path / "far"))


# --- servers that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults", [[500], [503, 502], [429, 429], ["cut"], ["cut", "cut"], ["stall"], [503, "cut", 500]]
)
@pytest.mark.parametrize("ranges", [True, False])
def test_passing_failures_are_tried_again(server, tmp_path, faults, ranges):
    server.faults, server.ranges = list(faults), ranges
    assert everything(remote(server, tmp_path)) == everything(local(server))
    assert not server.faults and not list((tmp_path / "cache").glob(".*part*"))
    count("failures of servers", len(faults))


def _of(name, form, kind):
    """A header with the checksum of a file."""
    return lambda data: (name, form.format(base64.b64encode(hashlib.new(kind, data).digest()).decode()))


@pytest.mark.parametrize("digest", [
    _of("Repr-Digest", "sha-256=:{}:", "sha256"), _of("Content-MD5", "{}", "md5"),
    _of("X-Goog-Hash", "crc32c=n03x6A==,md5={}", "md5"),
])  # fmt: skip
def test_a_checksum_that_the_server_says_is_checked(server, tmp_path, digest):
    server.digest, server.faults = digest, ["flip"]
    assert everything(remote(server, tmp_path)) == everything(local(server))
    assert len([name for name in server.log if name.endswith(".tar")]) == 3 + 1
    count("failures of servers")
    server.faults = ["flip"] * 9
    with pytest.raises(DataError, match=r"another (sha256|md5) checksum than the server says \(4 tries"):
        download(f"{server.url}/train-000000.tar", ask(f"{server.url}/train-000000.tar", settings(tmp_path)),
                 tmp_path / "copy", settings(tmp_path))  # fmt: skip
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("header", [("Content-MD5", "no"), ("Repr-Digest", "sha-256=:AAAA:"), ("ETag", '"0cc1"')])
def test_what_is_no_checksum_is_not_taken_for_one(server, tmp_path, header):
    server.digest = lambda data: header
    assert ask(f"{server.url}/train-000000.tar", settings(tmp_path)).checksum is None


def test_a_server_that_falls_silent_is_not_waited_for(server, tmp_path):
    url, about = f"{server.url}/train-000000.tar", ask(f"{server.url}/train-000000.tar", settings(tmp_path))
    server.faults = ["silence"]
    download(url, about, tmp_path / "copy", settings(tmp_path))
    assert server.silent == {"/train-000000.tar"}  # the first request still has no answer
    count("failures of servers")


def test_a_cut_download_goes_on_where_it_ended(server, tmp_path):
    url, about = f"{server.url}/train-000000.tar", None
    about = ask(url, settings(tmp_path))
    server.faults = ["cut"]
    asked = []
    own = module._request
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_request", lambda u, m, s, h: asked.append(h) or own(u, m, s, h))
        download(url, about, tmp_path / "copy", settings(tmp_path))
    assert (tmp_path / "copy").read_bytes() == (server.folder / "train-000000.tar").read_bytes()
    assert asked[0] == {} and asked[1] == {"Range": f"bytes={about.size // 2}-"}


@pytest.mark.parametrize(("faults", "says"), [
    ([503] * 9, r"train-000000\.tar cannot be fetched: status 503 \(4 tries, data\.retries=3\)"),
    (["cut"] * 9, r"cannot be fetched: .* \(4 tries"),
    ([403], r"the server answers 403 \(.*\); check the address"),
    (["other tag"], r"train-000000\.tar changed on the server while it was in use"),
])  # fmt: skip
def test_what_lasts_is_one_sentence_and_leaves_no_shard(server, tmp_path, faults, says):
    source = remote(server, tmp_path)
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    server.faults, server.ranges = list(faults), False
    with pytest.raises(DataError, match=says) as caught:
        source.read(0)
    assert "\n" not in str(caught.value) and not list((tmp_path / "cache").glob("[!.]*"))
    count("failures of servers", len(faults) - len(server.faults))


def test_retry_after_is_obeyed(monkeypatch, server, tmp_path):
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    monkeypatch.setattr(Handler, "send_header", _with_retry_after(Handler.send_header, "7"))
    server.faults = [429, 503]
    everything(remote(server, tmp_path))
    assert 7.0 in waits and any(0 < wait < 1 for wait in waits)
    later = email.utils.format_datetime(email.utils.datetime.datetime.now(email.utils.datetime.timezone.utc))
    assert module._retry_after(later) == 0.0 and module._retry_after("soon") is None


def _with_retry_after(own, seconds):
    return lambda self, name, value: own(self, name, seconds if name == "Retry-After" else value)


def test_a_shard_that_changed_between_two_sessions_gets_a_new_index(server, tmp_path):
    assert remote(server, tmp_path).lengths == [EACH] * 3
    runs.shard(server.folder / "train-000002.tar", EACH + 1)
    source = remote(server, tmp_path)
    assert source.lengths == [EACH, EACH, EACH + 1] and len(everything(source)) == 3 * EACH + 1


@pytest.mark.parametrize(("names", "says"), [
    ("ftp://h/a.tar", r"ftp:// cannot be read; there are http, https, s3, hf"),
    ("{url}/a.tar.gz", r"a shard by number is a plain \.tar; use data\.mode=stream"),
    ("{url}/none.tar", r"none\.tar: the server answers 404"),
    ("{url}/train-000000.tar::/d/b.tar", r"/d/b\.tar is local and http.* is not"),
    ("{url}/train-000000.tar::{url}/train-000000.tar", r"is named twice"),
    ("pipe:cat a.tar", r"commands are not run"),
    ("http://127.0.0.1:9/a.tar", r"http://127\.0\.0\.1:9/a\.tar cannot be asked for: .*refused \(4 tries"),
])  # fmt: skip
def test_names_that_cannot_be_had_are_one_sentence(server, tmp_path, names, says):
    with pytest.raises(DataError, match=says):
        Shards(names.replace("{url}", server.url), tmp_path / "index", remote=settings(tmp_path))


# --- the cache --------------------------------------------------------------------------------------------------------


def test_the_longest_unused_shard_goes_and_one_in_use_stays(server, tmp_path):
    urls = [f"{server.url}/train-{i:06d}.tar" for i in range(3)]
    abouts = [ask(url, settings(tmp_path)) for url in urls]
    cache = Cache(settings(tmp_path, gb=2.5 * abouts[0].size / 1e9))
    first = cache.open(urls[0], abouts[0])
    second = cache.open(urls[1], abouts[1])
    del second
    third = cache.open(urls[2], abouts[2])
    assert [cache.has(*pair) for pair in zip(urls, abouts)] == [True, False, True]  # the first is older, but open
    with pytest.raises(DataError, match=r"data\.cache_gb=.* is too small: .* in use and one of .* is needed; give"):
        cache.open(urls[1], abouts[1])
    del first, third
    assert cache.open(urls[1], abouts[1]) is not None
    assert sum(p.stat().st_size for p in (tmp_path / "cache").glob("[!.]*.tar")) <= cache.limit


def test_a_shard_that_was_used_again_goes_after_one_that_was_not(server, tmp_path):
    urls = [f"{server.url}/train-{i:06d}.tar" for i in range(3)]
    abouts = [ask(url, settings(tmp_path)) for url in urls]
    cache = Cache(settings(tmp_path, gb=2.5 * abouts[0].size / 1e9))
    for number in (0, 1, 0, 2):
        assert cache.open(urls[number], abouts[number]) is not None
    assert [cache.has(*pair) for pair in zip(urls, abouts)] == [True, False, True]


def test_a_cache_that_is_too_small_for_the_order_is_refused_with_what_would_do(server, tmp_path):
    source = remote(server, tmp_path)
    size = sum(about.size for about in source._reader.abouts) / 1e9
    small = remote(server, tmp_path, gb=0.9 * size)
    views = Views((Crop("global", 1, 16, (0.5, 1.0)),))
    with pytest.raises(DataError, match=rf"3 of 3 shards in turn, .*or an order that stays in few shards, for example "
                                        rf"data\.chunk={EACH} data\.window=4"):  # fmt: skip
        Samples(small, Order(0, small.lengths), views, 0)
    Samples(source, Order(0, source.lengths), views, 0)
    assert len(module.shards_at_once(Order(0, [EACH] * 50, EACH, 4), [EACH] * 50)) == 4


def test_who_comes_while_a_shard_is_fetched_waits_for_it(server, tmp_path):
    """Two caches in two threads are to the lock what two processes are."""
    url, slow = f"{server.url}/train-000000.tar", settings(tmp_path, timeout=10)
    about, server.faults = ask(url, slow), ["slow"] * 3
    with ThreadPoolExecutor(3) as pool:
        files = list(pool.map(lambda _: Cache(slow).open(url, about), range(3)))
    assert all(files) and len([name for name in server.log if name.endswith(".tar")]) == 1


def _read_all(url, folder, out):
    torch.set_num_threads(1)
    source = Shards(url, Path(folder) / "index", remote=Settings(Path(folder) / "cache"))
    out.put(len([source.read(i) for i in range(len(source))]))


@pytest.mark.slow
def test_processes_share_what_one_of_them_fetched(server, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    out, url = spawn.Queue(), f"{server.url}/train-{{000000..000002}}.tar"
    both = [spawn.Process(target=_read_all, args=(url, str(tmp_path), out)) for _ in range(2)]
    for one in both:
        one.start()
    assert [out.get(timeout=200) for _ in both] == [3 * EACH] * 2
    for one in both:
        one.join(60)
    assert sorted(name for name in server.log if name.endswith(".tar")) == [f"/train-{i:06d}.tar" for i in range(3)]


def test_shards_are_fetched_before_they_are_needed(server, tmp_path):
    local(server)  # published indexes, so that nothing is fetched at the start
    source = remote(server, tmp_path)
    order = Order(0, source.lengths, EACH, 1)
    views = Views((Crop("global", 1, 16, (0.5, 1.0)),))
    samples = Samples(source, order, views, 0)
    until = time.monotonic() + 60
    while len(list((tmp_path / "cache").glob("[!.]*.tar"))) < 3 and time.monotonic() < until:
        samples[range(0, 2)]
        time.sleep(0.02)
    assert len(list((tmp_path / "cache").glob("[!.]*.tar"))) == 3
    assert len(np.unique(order(np.arange(EACH)) // EACH)) == 1  # though only one was read from


def test_a_full_disk_is_one_sentence(server, tmp_path, monkeypatch):
    source = remote(server, tmp_path)
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / "cache").write_text("a file, so that no folder can be made")
    with pytest.raises(DataError, match=r"data\.cache=.* cannot be used \(.*\); choose a folder"):
        source.read(0)


# --- other schemes, and the config ------------------------------------------------------------------------------------


def test_other_schemes_go_through_fsspec(server, tmp_path, monkeypatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in server.folder.glob("*.tar"):
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    monkeypatch.setattr(module, "_fsspec", lambda url: (memory, url.replace("s3://", "/")))
    far = Shards("s3://bucket/train-{000000..000002}.tar", tmp_path / "index", remote=settings(tmp_path))
    assert everything(far) == everything(local(server))
    with pytest.raises(DataError, match=r"s3://bucket/none\.tar does not exist"):
        Shards("s3://bucket/none.tar", tmp_path / "index", remote=settings(tmp_path))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    import fsspec

    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match=r"s3:// needs the package s3fs: pip install 'selfsight\[remote\]'"):
        Shards("s3://bucket/a.tar", tmp_path / "index", remote=settings(tmp_path))


def test_the_keys_of_the_config_reach_the_cache(server, tmp_path):
    words = [f"data.train={server.url}/train-000000.tar", f"data.cache={tmp_path / 'own'}", "data.cache_gb=3",
             "data.retries=1", "data.timeout=9", f"data.index_dir={tmp_path / 'index'}"]  # fmt: skip
    cfg = config.load("train", ["data=shards", *words])
    source = open_source(cfg.data, "train")
    assert source._reader.cache.settings == Settings(tmp_path / "own", 3.0, 1, 9.0)
    assert config.diff(cfg, config.load("train", ["data=shards", words[0]])) == []  # how it is fetched is no other run


def test_a_copy_is_known_by_its_content_not_by_its_name(server, tmp_path):
    url = f"{server.url}/train-000000.tar"
    about, cache = ask(url, settings(tmp_path)), Cache(settings(tmp_path))
    file = cache.open(url, about)
    with contextlib.closing(open(os.dup(file.fd), "rb")) as copy:  # noqa: PTH123
        assert copy.read() == (server.folder / "train-000000.tar").read_bytes()
    assert cache.has(url, about) and not cache.has(url, About(about.size, about.tag + 1))
