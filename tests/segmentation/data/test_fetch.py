"""Against an HTTP server on this machine that serves ranges and counts what it sends."""

import io
import re
import socket
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlseg.data import main
from mlseg.errors import RunError, UserError
from mlseg.segmentation.data import DataSettings, load_data
from mlseg.segmentation.data import fetch as fetching
from mlseg.segmentation.data.entry import DATA_SETS, Archive, data_set
from mlseg.segmentation.data.fetch import fetch, incomplete

IMAGES = "ISIC2018_Task1-2_Training_Input"
MASKS = "ISIC2018_Task1_Training_GroundTruth"
NUMBER = 24

ENTRIES = {name: data_set(name) for name in DATA_SETS.names()}


class Server:
    """Files by path; can be told to fail."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.sent: dict[str, int] = {}
        self.failures = 0  # of the requests to come
        self.down_after: int | None = None  # bytes
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                content = outer.files.get(self.path)
                too_much = (
                    outer.down_after is not None and sum(outer.sent.values()) > outer.down_after
                )
                if content is None or too_much or (body and outer.failures > 0):
                    outer.failures -= 1 if body else 0
                    self.send_response(404 if content is None else 503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                start, end = 0, len(content)
                if wanted:
                    start = int(wanted[1])
                    end = min(int(wanted[2]) + 1, end) if wanted[2] else end
                self.send_response(206 if wanted else 200)
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(end - start))
                if wanted:
                    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
                self.end_headers()
                if body:
                    self.wfile.write(content[start:end])
                    outer.sent[self.path] = outer.sent.get(self.path, 0) + end - start

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def picture(number: int, kind: str) -> bytes:
    """An image that doesn't compress: 100 kB; or its mask."""
    rng = np.random.default_rng(number)
    values = rng.integers(0, 256, (180, 190, 3), dtype=np.uint8)
    file = io.BytesIO()
    if kind == "image":
        Image.fromarray(values).save(file, "PNG")
    else:
        Image.fromarray(
            np.where(np.arange(190) < 95, 255, 0).astype(np.uint8)[None].repeat(180, 0)
        ).save(file, "PNG")
    return file.getvalue()


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return file.getvalue()


@pytest.fixture(scope="module")
def content() -> dict[str, bytes]:
    # Names end in .jpg as in the official archive; readers go by the content.
    images = {f"{IMAGES}/ISIC_{n:07d}.jpg": picture(n, "image") for n in range(NUMBER)}
    masks = {f"{MASKS}/ISIC_{n:07d}_segmentation.png": picture(n, "mask") for n in range(NUMBER)}
    extra = {f"{IMAGES}/LICENSE.txt": b"terms", f"__MACOSX/{IMAGES}/._ISIC_0000001.jpg": b"x"}
    return {"/images.zip": archive(images | extra), "/masks.zip": archive(masks)}


@pytest.fixture
def server(content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    # Read-ahead is for large archives; here it must not cover the whole file.
    monkeypatch.setattr(fetching, "_BLOCK", 2**14)
    made = Server()
    made.files = dict(content)
    yield made
    made.close()


def archives(server: Server) -> tuple[Archive, ...]:
    return tuple(Archive(f"{server.url}/{name}.zip", "train") for name in ("images", "masks"))


def get(server: Server, root: Path, limit: int | None = None) -> int:
    return fetch(data_set("isic2018"), root, limit, archives=archives(server), pause=0.01)


def names(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_only_what_is_needed_travels(server: Server, tmp_path: Path) -> None:
    assert get(server, tmp_path, limit=3) == 3
    assert names(tmp_path) == sorted(
        [f"{IMAGES}/ISIC_{n:07d}.jpg" for n in range(3)]
        + [f"{MASKS}/ISIC_{n:07d}_segmentation.png" for n in range(3)]
    )
    assert (tmp_path / IMAGES / "ISIC_0000002.jpg").read_bytes() == picture(2, "image")
    assert server.sent["/images.zip"] < 0.35 * len(server.files["/images.zip"])
    assert not incomplete(tmp_path)


def test_a_member_without_a_name_is_none_of_the_images(server: Server, tmp_path: Path) -> None:
    named = archive({"Xnameless": b"?", f"{IMAGES}/ISIC_0000001.jpg": picture(1, "image")})
    server.files["/images.zip"] = named.replace(b"Xnameless", b"\0nameless")
    assert get(server, tmp_path) == 1


def test_what_is_there_is_not_fetched_again_and_never_replaced(
    server: Server, tmp_path: Path
) -> None:
    get(server, tmp_path, limit=4)
    changed = tmp_path / IMAGES / "ISIC_0000001.jpg"
    right = changed.read_bytes()
    changed.write_bytes(bytes([right[0] ^ 1]) + right[1:])  # of the right size
    theirs = changed.read_bytes()
    for limit in (4, 5):
        with pytest.raises(UserError, match=r"0000001\.jpg: is there already and differs"):
            get(server, tmp_path, limit)
    assert changed.read_bytes() == theirs
    assert len(names(tmp_path)) == 8, "refused before any work"
    assert not incomplete(tmp_path)
    changed.unlink()
    server.sent.clear()
    get(server, tmp_path, limit=4)
    assert changed.read_bytes() == right
    assert server.sent["/images.zip"] < 3 * len(right)


def test_a_link_in_the_place_of_a_file_is_somebodys(server: Server, tmp_path: Path) -> None:
    target, link = tmp_path / "precious", tmp_path / "in" / IMAGES / "ISIC_0000000.jpg"
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    with pytest.raises(UserError, match=r"0000000\.jpg: is there already and differs"):
        get(server, tmp_path / "in", limit=1)
    assert link.is_symlink()
    assert not target.exists()


def _odd(kind: str) -> tuple[bytes, str]:
    """An archive of an image and its mask, and what is said of it."""
    image, mask = "Kvasir-SEG/images/a.jpg", "Kvasir-SEG/masks/a.jpg"
    flat = {image: bytes(60 * 2**20), mask: b"x"}
    if kind == "bomb":
        return archive(flat, zipfile.ZIP_DEFLATED), r"that would become 60; refused"
    if kind == "one file":
        packed = bytearray(archive({image: b"x", mask: b"x"}, zipfile.ZIP_STORED))
        directory = packed.find(b"PK\x01\x02")
        packed[directory + 24 : directory + 28] = (2**31).to_bytes(4, "little")
        return bytes(packed), r"'Kvasir-SEG/images/a\.jpg' would take 2048 MiB; refused"
    if kind == "method":
        return archive({image: b"x", mask: b"x"}, zipfile.ZIP_BZIP2), "packed by method 12"
    if kind == "encrypted":
        packed = bytearray(archive({image: b"x", mask: b"x"}, zipfile.ZIP_STORED))
        for place in (6, packed.find(b"PK\x01\x02") + 8):
            packed[place] |= 1
        return bytes(packed), r"no archive that can be unpacked \(.*encrypted"
    if kind == "directory":
        packed = bytearray(archive({image: b"x", mask: b"x"}, zipfile.ZIP_STORED))
        end = packed.find(b"PK\x05\x06")
        packed[end + 12 : end + 16] = (2**31).to_bytes(4, "little")
        return bytes(packed), "can't be read"
    assert kind == "twice"
    other = archive({image: b"x", mask: b"x", f"{image[:-5]}b.jpg": b"x"}, zipfile.ZIP_STORED)
    return other.replace(b"/b.jpg", b"/a.jpg"), "is in it twice"


@pytest.mark.parametrize("kind", ["bomb", "one file", "method", "encrypted", "directory", "twice"])
def test_an_odd_archive_is_one_line_and_leaves_no_file(
    kind: str, server: Server, tmp_path: Path
) -> None:
    server.files["/images.zip"], said = _odd(kind)
    made = [Archive(f"{server.url}/images.zip", "all")]
    with pytest.raises(RunError, match=said) as caught:
        fetch(data_set("kvasir"), tmp_path, archives=made, pause=0.01)
    assert "\n" not in str(caught.value)
    assert [name for name in names(tmp_path) if not name.startswith(".")] == []


def test_a_silent_server_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "SILENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/images.zip"
        with pytest.raises(RunError, match="can't be read"):
            fetch(data_set("kvasir"), tmp_path, archives=[Archive(url, "all")], pause=0.01)


def test_an_interrupted_download_goes_on(server: Server, tmp_path: Path) -> None:
    server.down_after = 10 * len(picture(0, "image"))
    with pytest.raises(RunError, match=r"can't be read.*the same command goes on"):
        get(server, tmp_path)
    have = names(tmp_path)
    assert 4 < len(have) < 2 * NUMBER
    assert incomplete(tmp_path)
    assert not [name for name in have if name.endswith(".part")]
    with pytest.raises(UserError, match=r"a download was interrupted; finish it with: python -m"):
        load_data(DataSettings(name="isic2018", root=str(tmp_path)))

    before, server.down_after = sum(server.sent.values()), None
    assert get(server, tmp_path) == NUMBER
    rest = sum(server.sent.values()) - before
    assert rest < 0.75 * len(server.files["/images.zip"])
    data = load_data(DataSettings(name="isic2018", root=str(tmp_path), image_size=16))
    assert len(data.train) + len(data.val) + len(data.test) == NUMBER
    assert data.train.masks.float().mean() == 0.5


def test_passing_faults_are_tried_again(server: Server, tmp_path: Path) -> None:
    server.failures = 2
    assert get(server, tmp_path, limit=2) == 2


def test_a_damaged_archive_is_noticed(server: Server, tmp_path: Path) -> None:
    damaged = bytearray(server.files["/images.zip"])
    place = damaged.find(picture(1, "image")[1000:1100])
    damaged[place] ^= 255
    server.files["/images.zip"] = bytes(damaged)
    with pytest.raises(RunError, match=r"images\.zip: can't be read \(Bad CRC-32.*0000001"):
        get(server, tmp_path, limit=3)
    assert f"{IMAGES}/ISIC_0000001.jpg" not in names(tmp_path)


def test_no_such_address_and_something_else_there(server: Server, tmp_path: Path) -> None:
    del server.files["/masks.zip"]
    with pytest.raises(RunError, match=r"masks\.zip: can't be read"):
        get(server, tmp_path)
    server.files["/masks.zip"] = archive({"other/a.png": b"x"})
    with pytest.raises(RunError, match="hold no image with its mask"):
        get(server, tmp_path)
    server.files["/images.zip"] = archive({"other/a.png": b"x"})
    with pytest.raises(RunError, match="not the expected archive of isic2018"):
        get(server, tmp_path)


def test_a_member_that_leads_out_of_the_folder_is_refused(server: Server, tmp_path: Path) -> None:
    name = f"../{'Kvasir-SEG'}/{{}}/a.jpg"
    server.files["/images.zip"] = archive({name.format("images"): b"x", name.format("masks"): b"y"})
    with pytest.raises(RunError, match="refuses to unpack"):
        fetch(
            data_set("kvasir"),
            tmp_path / "in",
            archives=[Archive(f"{server.url}/images.zip", "all")],
        )
    assert not (tmp_path / "Kvasir-SEG").exists()


def test_when_missing_download(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = replace(data_set("isic2018"), archives=archives(server))
    known = DATA_SETS.get
    monkeypatch.setattr(DATA_SETS, "get", lambda n: entry if n == "isic2018" else known(n))
    settings = DataSettings(
        name="isic2018", root=str(tmp_path / "isic"), when_missing="download", image_size=16
    )
    data = load_data(settings)
    assert data.provenance == "real"
    sent = sum(server.sent.values())
    load_data(settings)
    assert sum(server.sent.values()) == sent


def test_the_command(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    entry = replace(data_set("isic2018"), archives=archives(server))
    known = DATA_SETS.get
    monkeypatch.setattr(DATA_SETS, "get", lambda n: entry if n == "isic2018" else known(n))
    assert main(["isic2018", "--root", str(tmp_path), "--limit", "2"]) == 0
    assert len(names(tmp_path)) == 4
    assert main(["isic2018", "--root", str(tmp_path), "--part", "test"]) == 2
    assert main(["isic2018", "--root", str(tmp_path), "--limit", "0"]) == 2
    assert main(["isic20018"]) == 2
    assert main(["synthetic_lesions"]) == 2
    assert "did you mean 'isic2018'" in capsys.readouterr().err
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("isic2018", "busi", "pairs"))


@pytest.mark.parametrize(
    "name", [name for name, entry in ENTRIES.items() if not entry.archives and not entry.synthetic]
)
def test_sets_behind_a_form_say_where_they_are(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([name, "--root", str(tmp_path)]) == 2
    text = capsys.readouterr().err
    assert data_set(name).source in text
    assert all(path in text for path in data_set(name).expected)
    assert list(tmp_path.iterdir()) == []
