"""What the tests of data/ share: WikiText's file where there is one; hubs that answer, stall or are dead."""

import hashlib
import http.server
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WIKI_TEST_RAW = Path(__file__).parents[3] / "shared/data/wikitext-2-raw/wiki.test.raw"
OFFLINE_VARIABLES = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def wiki_raw() -> bytes:
    if not WIKI_TEST_RAW.is_file():
        pytest.skip("WikiText-2's raw test file is not on this machine (it is not part of the product)")
    return WIKI_TEST_RAW.read_bytes()


@pytest.fixture(scope="session")
def wiki_rows(wiki_raw: bytes) -> list[str]:
    """The file as the hub's data set has it: one row a line, a blank line being the empty row."""
    lines = wiki_raw.decode("utf-8").split("\n")
    assert lines.pop() == ""
    return ["" if line == " " else line + "\n" for line in lines]


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of `datasets` with nothing in it, and a network neither forbidden nor behind a proxy."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    for name in OFFLINE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):  # the hubs of the tests are on this machine
        monkeypatch.setenv(name, "127.0.0.1")
    if "datasets" in sys.modules:
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", cache)
    return cache


@pytest.fixture
def hub_at(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> Callable[[str], None]:
    """Points this process's hub, with an empty cache, to an address."""
    from huggingface_hub import constants

    return lambda url: monkeypatch.setattr(constants, "ENDPOINT", url)


@pytest.fixture
def refusing_url() -> str:
    """An address where nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


@pytest.fixture
def silent_url() -> Iterator[str]:
    """An address that takes connections and never answers, as a firewall does to a caller."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


class FakeHub:
    """As much of the hub's protocol as `datasets` speaks to read one parquet file of `Salesforce/wikitext`.

    `delay_s` holds every download back; `status` replaces every answer; `requests` are the paths asked for.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.delay_s = 0.0
        self.status: int | None = None
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
                hub.requests.append(path)
                status, payload, headers = hub.answer(path, body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                for key, value in headers.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    if path.endswith(".parquet"):
                        time.sleep(hub.delay_s)
                    self.wfile.write(payload)

            do_GET = do_HEAD = do_POST = answer

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve_wikitext(self, rows: Sequence[str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = io.BytesIO()
        pq.write_table(pa.table({"text": list(rows)}), table)
        name = "wikitext-2-raw-v1"
        self.files = {
            "README.md": (
                f"---\nconfigs:\n- config_name: {name}\n  data_files:\n"
                f"  - split: test\n    path: {name}/test-*\n---\n"
            ).encode(),
            f"{name}/test-00000-of-00001.parquet": table.getvalue(),
        }

    def answer(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if self.status is not None:
            return self.status, b"", {}
        about, resolve = "/api/datasets/Salesforce/wikitext", "/datasets/Salesforce/wikitext/resolve/"
        if path.startswith(resolve):
            content = self.files.get(path.removeprefix(resolve).partition("/")[2])
            if content is not None:
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                return 200, content, {"ETag": etag, "X-Repo-Commit": COMMIT}
        elif path.startswith(about):
            return 200, json.dumps(self._about(path.removeprefix(about), body)).encode(), {}
        return 404, b"{}", {"X-Error-Code": "EntryNotFound"}

    def _about(self, rest: str, body: bytes) -> object:
        if rest.startswith("/tree/"):
            folder = rest.removeprefix("/tree/").partition("/")[2]
            inside = [Path(name) for name in self.files if Path(folder) in Path(name).parents]
            depth = len(Path(folder).parts) + 1
            return [self._entry("/".join(name.parts[:depth])) for name in inside]
        if rest.startswith("/paths-info/"):
            asked = (
                json.loads(body)["paths"]
                if body[:1] == b"{"
                else urllib.parse.parse_qs(body.decode())["paths"]
            )
            return [self._entry(name) for name in asked if name in self.files]
        return {"id": "Salesforce/wikitext", "sha": COMMIT, "siblings": [], "tags": []}

    def _entry(self, name: str) -> dict[str, object]:
        if name not in self.files:
            return {"type": "directory", "path": name, "oid": COMMIT}
        content = self.files[name]
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    yield hub
    hub.stop()


@pytest.fixture
def load_in_new_process(tmp_path: Path) -> Callable[..., dict]:
    """`load_corpus(**arguments)` in a process of its own, with a hub and a home for its cache.

    Needed where what is imported counts, and because the libraries read their settings once, when imported.
    """
    script = (
        "import dataclasses, json, sys, time\n"
        "start = time.monotonic()\n"
        "from verify.data import load_corpus\n"
        "corpus = load_corpus(**json.loads(sys.argv[1]))\n"
        "print(json.dumps({'seconds': time.monotonic() - start, **dataclasses.asdict(corpus)}))\n"
    )

    def load(*, hub: str, **arguments: object) -> dict:
        settings = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        settings |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub, "PYTHONPATH": str(ROOT)}
        settings |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        settings.pop("TRANSFORMERS_OFFLINE", None)
        done = subprocess.run(
            [sys.executable, "-c", script, json.dumps(arguments)],
            env=settings,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return load
