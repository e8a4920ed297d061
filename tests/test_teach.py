"""--teach: what a Teacher learns, keeps and takes back, and which requests its server refuses.

In a browser: test_teach_browser.py.
"""
import base64
import errno
import io
import json
import re
import shutil
import socket
import threading
import urllib.request
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image
from werkzeug.serving import make_server
from werkzeug.test import Client

import ar1star_lat_replay as program
from harness.config import ConfigError, load_config
from helpers import PARAMS, same, write_weights
from streams.demo import draw_unit
from streams.folder import FolderStream
from teach import server
from teach.server import Application, Refused, Teacher, as_frame, checked_name
from tiny import all_files
from utils import copied

SMALL = {"width": 0.25, "image_size": 64, "device": "cpu"}
FRAMES = 10         # of a recording: eight to learn, two held back


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights") / "weights.pth")


@pytest.fixture(scope="module")
def films():
    """JPEGs of three objects, twelve each."""
    def jpeg(frame):
        file = io.BytesIO()
        Image.fromarray(frame).resize((140, 130)).save(file, "JPEG")
        return file.getvalue()
    return [[jpeg(frame) for frame in draw_unit(0, 0, label, 12, 48)] for label in (0, 2, 5)]


@pytest.fixture
def begin(weights, tmp_path):
    """begin(): a Teacher of tmp_path/taught. The one before is closed first, as by a kill."""
    teachers = []

    def start(**changes):
        for teacher in teachers:
            teacher.close()
            teacher.lock.close()
        settings = SMALL | {"weights": str(weights), "data": str(tmp_path / "taught")} | changes
        teachers.append(Teacher(load_config("teach", PARAMS, settings)))
        return teachers[-1]

    yield start
    for teacher in teachers:
        teacher.close()
        teacher.lock.close()


@pytest.fixture
def teacher(begin):
    return begin()


def record(teacher, name, film, n=FRAMES):
    teacher.teach(name, [as_frame(raw, teacher.size)[1] for raw in film[:n]])


def files(teacher):
    """What lies in DIR as own images."""
    return {str(path.relative_to(teacher.root)): content for path, content in all_files(teacher.root).items()
            if path.suffix == ".jpg"}


def learned(teacher):
    return copied([teacher.learner.state_dict(), teacher.twin.state_dict(), teacher.names, rows(teacher)])


def rows(teacher):
    return [{key: value for key, value in row.items() if key != "seconds_train"} for row in teacher.rows]


# ---- what is learned, and kept ----

def test_recordings_are_own_images_that_any_run_learns(teacher, films, tmp_path):
    """Every fifth frame is held back. The learner is that of a run on the same files, to the bit of its
    latents' sums."""
    record(teacher, "red ball", films[0])
    record(teacher, "Box", films[1])
    record(teacher, "RED BALL", films[0][::-1], 5)      # adds to it
    assert teacher.names == ["red ball", "Box"]
    found = files(teacher)
    assert sorted(path for path in found if path.startswith("test")) == [
        "test/Box/2_005.jpg", "test/Box/2_010.jpg", "test/red ball/1_005.jpg", "test/red ball/1_010.jpg",
        "test/red ball/3_005.jpg"]
    assert len(found) == 25 and "train/3/red ball/3_004.jpg" in found
    for name, film in zip(teacher.names, films):
        seen = [teacher.look(as_frame(raw, 64)[0]) for raw in film]
        assert all(teacher.names[int(np.argmax(told["p"]))] == name for told in seen)

    # latents of a recording are made while it runs: learning encodes none
    shots = [as_frame(raw, 64) for raw in films[2]]
    for frame, _ in shots:
        teacher.look(frame, remember=True)
    known = len(teacher.encoder.latents)
    teacher.look(as_frame(films[1][11], 64)[0])
    teacher.teach("can", [file for _, file in shots])
    assert len(teacher.encoder.latents) == known

    run = program.run(teacher.config, "run", tmp_path / "logs")
    learner = program.load_learner(run["folder"])
    assert learner.class_names == teacher.names
    images, _ = FolderStream(teacher.root, 64).get_test_set()
    torch.testing.assert_close(learner.scores(images), teacher.learner.scores(images), rtol=1e-3, atol=1e-3)


def test_how_near_a_frame_is(teacher, films):
    """Cosine of the roots of what latents carry and that of a frame that is replayed, and a fifth of p."""
    record(teacher, "a", films[0])
    assert teacher.look(as_frame(films[0][0], 64)[0])["near"] == pytest.approx(1.2, abs=0.01)
    record(teacher, "b", films[1])
    shots = [as_frame(raw, 64)[0] for film in films[:2] for k, raw in enumerate(film[:FRAMES]) if k % 5 < 4]
    shots.append(as_frame(films[2][0], 64)[0])
    *learned, other = teacher.learner.encoder(np.stack(shots))[:, -128:].sqrt()
    told = teacher.look(as_frame(films[2][0], 64)[0])
    cosines = [torch.cosine_similarity(one, other, dim=0).item() for one in learned]
    assert told["near"] == pytest.approx(max(cosines) + max(told["p"]) / 5, abs=0.01)


def test_the_twin_is_merely_fine_tuned(begin, films):
    """On the same frames: plain gradient descent on its head, nothing replayed, nothing consolidated."""
    teacher = begin(inc_lr=0.2)
    for name, film in zip("abc", films):
        record(teacher, name, film)
    row = teacher.rows[-1]
    assert row["twin"][2] == 1 and sum(row["twin"][:2]) < 1 and sum(row["per_class"]) > 2, row
    assert not len(teacher.twin.memory) and teacher.twin.beside is None
    state = teacher.state()
    assert [row["classes"] for row in state["rows"]] == [[0], [1], [2]] and state["frames"] == [8, 8, 8]


def test_undo_takes_state_and_files_back(begin, films):
    """The last recording's from what was kept; those before it by learning anew."""
    teacher = begin()
    record(teacher, "a", films[0])
    teacher = begin()
    one, first = learned(teacher), files(teacher)
    record(teacher, "b", films[1])
    record(teacher, "a", films[1])
    teacher.undo()
    assert teacher.names == ["a", "b"] and not list(teacher.root.glob("*/*/3_*"))
    teacher.undo()
    assert files(teacher) == first and teacher.names == ["a"]
    assert same(learned(teacher), one)
    teacher.undo()
    assert files(teacher) == {} and teacher.look(as_frame(films[0][0], 64)[0])["p"] == []
    with pytest.raises(Refused, match="no recording"):
        teacher.undo()


def test_rename_and_reset(begin, films):
    teacher = begin()
    record(teacher, "a", films[0])
    record(teacher, "b", films[1])
    before = learned(teacher)
    teacher.rename("a", "Apple")
    assert "train/1/Apple/1_001.jpg" in files(teacher) and "test/Apple/1_005.jpg" in files(teacher)
    teacher = begin()
    assert same(learned(teacher)[:2], before[:2]) and teacher.names == ["Apple", "b"]
    for old, new, why in (("a", "x", "no object 'a'"), ("b", "aPPLE", "already"), ("b", "../b", "name of a")):
        with pytest.raises(Refused, match=why):
            teacher.rename(old, new)

    kept = sorted(files(teacher).values())
    teacher.reset()
    assert teacher.names == [] and not (teacher.root / "train").exists()
    assert sorted(content for path, content in files(teacher).items() if path.startswith("reset1/")) == kept
    record(teacher, "a", films[0])
    assert teacher.names == ["a"]


def test_files_that_the_checkpoint_does_not_hold_are_learned(begin, films):
    """As after a kill between writing and learning; and all anew where learned ones have changed, or the
    settings or the weights have."""
    teacher = begin()
    record(teacher, "a", films[0])
    record(teacher, "b", films[1])
    whole = learned(teacher)
    path = teacher.folder.path
    shutil.copyfile(path / "previous.pt", path / "checkpoint.pt")
    assert same(learned(begin())[2:], whole[2:])

    (teacher.root / "train/1/a/1_001.jpg").unlink()
    teacher = begin()
    assert teacher.rows[0]["n_train"] == 7 and len(teacher.rows) == 2
    assert begin(inc_lr=0.02).learner.batches == 2
    assert begin(inc_lr=0.02, weights="none").learner.batches == 2
    (path / "checkpoint.pt").write_bytes(b"damaged")
    (path / "previous.pt").unlink(missing_ok=True)
    assert begin().learner.batches == 2


def test_what_fails_changes_nothing(begin, films, monkeypatch):
    """A full disk in the middle of the frames, and one for the checkpoint; training that does not succeed."""
    teacher = begin()
    record(teacher, "a", films[0])
    client = Client(Application(teacher))
    left = learned(teacher), files(teacher)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def diverging(*args):
        raise RuntimeError("boom")

    for part, name, how in ((server.Path, "write_bytes", full), (server.RunFolder, "save", full),
                            (teacher.learner.__class__, "learn", diverging)):
        with monkeypatch.context() as patch:
            patch.setattr(part, name, how)
            answer = post(client, "/teach", name="b", frames=[url(raw) for raw in films[1]])
        told = answer.get_json()["error"]
        assert ("disk is full" in told and answer.status_code == 507) if how is full else "boom" in told
        assert files(teacher) == left[1] and same(learned(teacher), left[0])
    assert same(learned(begin()), left[0])


def test_at_most_five_mb_are_kept(begin):
    """Of the section as it is, its memory full."""
    config = load_config("teach", PARAMS, {"weights": "none", "device": "cpu"})
    learner = program.build_learner(config, 10, (config.image_size,) * 2, torch.device("cpu"))
    n = 3000
    latents = torch.rand(n, *learner.net.example_latent(config.image_size).shape[1:])
    learner.memory.update(latents, torch.arange(n) % 10, 0, torch.Generator())
    assert 3 < program.record.__globals__["kept_mb"](learner) <= 5


# ---- requests ----

def url(raw):
    return "data:image/jpeg;base64," + base64.b64encode(raw).decode()


def post(client, path, headers=None, **asked):
    return client.post(path, json=asked, headers={"Host": "localhost:8000"} | (headers or {}))


@pytest.fixture(scope="module")
def client(weights, tmp_path_factory, films):
    """Of a server that knows one object."""
    folder = tmp_path_factory.mktemp("server") / "taught"
    teacher = Teacher(load_config("teach", PARAMS, SMALL | {"weights": str(weights), "data": str(folder)}))
    record(teacher, "a", films[0])
    client = Client(Application(teacher))
    client.teacher = teacher
    yield client
    teacher.close()


def test_the_page_asks_nobody_else(client):
    answer = client.get("/", headers={"Host": "localhost:8000"})
    text = answer.get_data(as_text=True)
    assert answer.status_code == 200 and "Teach it by camera" in text
    assert "connect-src 'self'" in answer.headers["Content-Security-Policy"]
    assert not re.search(r"""(src|href|url|import|fetch)\s*[=(]\s*["']?(https?:)?//""", text)


def hostile(films):
    """(status, path, headers, body) of requests that have to be refused."""
    good = url(films[1][0])
    big = io.BytesIO()
    Image.new("P", (1, 1)).save(big, "GIF")
    big = big.getvalue()[:6] + b"\xff\xff\xff\xff" + big.getvalue()[10:]      # 65535x65535
    wide = io.BytesIO()
    Image.new("RGB", (2001, 5)).save(wide, "PNG")
    for host in ("evil.com", "evil.com:8000", "localhost.evil.com", "127.0.0.1.evil.com:8000", "192.168.0.9",
                 "", "localhost@evil.com", "[::2]:8000"):
        yield 403, "/state", {"Host": host}, None
        yield 403, "/undo", {"Host": host}, {}
    for origin in ("http://evil.com", "null", "https://localhost:8000", "http://localhost:8001",
                   "http://127.0.0.1"):
        for path in ("/look", "/teach", "/undo", "/rename", "/reset"):
            yield 403, path, {"Origin": origin}, {"frame": good, "name": "x", "frames": [good] * 5}
    for path in ("/../etc/passwd", "/%2e%2e/x", "//evil.com/", "/train/1/a/1_001.jpg", "/page.html",
                 "/state/"):
        yield 404, path, {}, {}
    for body in (b"", b"{", b"[]", b"null", b"1", b"\xff\xfe", b"[" * 100_000, b'{"name": ' * 50_000):
        yield 400, "/teach", {"Content-Type": "application/json"}, body
    yield 405, "/undo", {"Content-Type": "text/plain"}, b"{}"
    yield 405, "/reset", {"Content-Type": "application/x-www-form-urlencoded"}, b"sure=1"
    yield 413, "/teach", {"Content-Type": "application/json"}, b" " * 20_000_001
    damaged = films[1][0][:200]
    for frame in (None, 5, [], {}, "", "x", "data:image/jpeg;base64,", "data:image/jpeg;base64,!!!!",
                  "data:text/html;base64,aGk=", url(b"GIF89a"), url(damaged), url(big),
                  url(wide.getvalue()), url(films[1][0][:-300]), "file:///etc/passwd", "http://localhost/x"):
        yield 400, "/look", {}, {"frame": frame}
        yield 400, "/teach", {}, {"name": "x", "frames": [good] * 5 + [frame]}
    for frames in (None, 5, "x", {}, [], [good] * 4, [good] * 101):
        yield 400, "/teach", {}, {"name": "x", "frames": frames}
    for name in NAMES:
        yield 400, "/teach", {}, {"name": name, "frames": [good] * 5}
        yield 400, "/rename", {}, {"old": "a", "new": name}
    for old in (None, 5, "b", "../a", ["a"], {}):
        yield 400, "/rename", {}, {"old": old, "new": "x"}


NAMES = ["", " ", ".", "..", "../a", "/etc", "a/b", "a\\b", "C:x", "a\0b", "a\nb", "\x1b[2J", ".hidden",
         "end.", "CON", "nul", "com1.txt", "LPT9", "a?", "a*", 'a"', "<b>", "a|b", "x" * 101, "ü" * 51,
         "\u202etxt", "prn", "AUX.tar.gz", "com9", "~/../..", "a\tb", "a\x7f", "a\u2028b", "..\\..\\x",
         "\ud800", None, 5, ["a"], {"a": 1}]


def test_hostile_requests(client, films, capfd):
    """Some 200: each is refused in a sentence, nothing is written, and the server goes on."""
    before = {path: path.stat().st_mtime_ns for path in client.teacher.root.parent.rglob("*")}
    n = 0
    for status, path, headers, body in hostile(films):
        headers = {"Host": "localhost:8000"} | headers
        if body is None:
            answer = client.get(path, headers=headers)
        elif isinstance(body, bytes):
            answer = client.post(path, data=body, headers=headers)
        else:
            answer = client.post(path, json=body, headers=headers)
        assert answer.status_code == status, (path, headers, str(body)[:80], answer.get_data())
        assert len(answer.get_json()["error"]) > 10
        n += 1
    assert n >= 180
    assert {path: path.stat().st_mtime_ns for path in client.teacher.root.parent.rglob("*")} == before
    assert capfd.readouterr().err == ""
    assert post(client, "/look", frame=url(films[0][0])).get_json()["p"] == [1.0]


def test_good_names_and_hosts(client):
    for name in (" Käse ", "cup 2", "電話", "a.b", "console"):
        assert checked_name(name) == name.strip()
    for host in ("localhost", "localhost:1", "127.0.0.1:8000", "[::1]:8000"):
        for origin in ({}, {"Origin": f"http://{host}"}):
            assert client.get("/state", headers={"Host": host} | origin).status_code == 200
    everywhere = Client(Application(client.teacher, "0.0.0.0"))
    assert everywhere.get("/state", headers={"Host": "192.168.0.9:8000"}).status_code == 200
    assert everywhere.get("/state", headers={"Host": "evil.com:8000"}).status_code == 403


def test_while_it_learns_others_are_told_so_at_once(client, films, monkeypatch):
    learning = threading.Event()
    go_on = threading.Event()

    def slow(*args):
        learning.set()
        assert go_on.wait(20)
        raise Refused("enough")

    monkeypatch.setattr(client.teacher, "teach", slow)
    one = threading.Thread(target=lambda: post(client, "/teach", name="b", frames=[url(films[1][0])] * 5))
    one.start()
    assert learning.wait(20)
    for path, asked in (("/look", {"frame": url(films[0][0])}), ("/undo", {}),
                        ("/teach", {"name": "b", "frames": [url(films[1][0])] * 5})):
        answer = post(client, path, **asked)
        assert answer.status_code == 503 and "learning" in answer.get_json()["error"]
    go_on.set()
    one.join()
    assert post(client, "/look", frame=url(films[0][0])).status_code == 200


def test_half_and_broken_requests(client, films, capfd):
    """Over a real connection: each is answered or dropped, and the server goes on."""
    head = b"POST /undo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with server.listening("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        serving = make_server("127.0.0.1", port, client.application, threaded=True,
                              request_handler=server.Quiet, fd=listener.fileno())
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        try:
            for raw in (b"", b"\0" * 100, b"GET\r\n\r\n", b"GET /state\r\n\r\n", b"x" * 70_000 + b"\r\n",
                        b"GET /state HTTP/9.9\r\n\r\n",
                        b"GET /state HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
                        b"GET /state HTTP/1.1\r\n\r\n", head + b"Content-Length: 1000\r\n\r\n{",
                        head + b"Content-Length: -5\r\n\r\n{}", head + b"Content-Length: x\r\n\r\n{}",
                        head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
                        head + b"Content-Length: 99999999999\r\n\r\n{}"):
                with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                    with suppress(ConnectionError):
                        connection.sendall(raw)
                        connection.shutdown(socket.SHUT_WR)
                        assert b"200" not in connection.recv(12)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/state", timeout=10) as answer:
                assert json.load(answer)["names"] == ["a"]
        finally:
            serving.shutdown()
            thread.join()
            serving.server_close()
    assert "Traceback" not in capfd.readouterr().err


# ---- the command ----

def test_a_port_or_folder_in_use(teacher, weights, capfd):
    words = ["--weights", str(weights), "--set", "width=0.25", "--teach", str(teacher.root)]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert program.main([*words, "--port", str(port)]) == 2
        assert "--port" in capfd.readouterr().err
    assert program.main([*words, "--port", "0"]) == 2
    assert "another program teaches" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="--host"):
        server.listening("192.0.2.1", 8000)
    assert program.main(["--port", "9"]) == 2 and program.main(["--teach", "x", "--data", "y"]) == 2


def test_what_is_taught_is_named_in_other_images(teacher, films, capfd):
    ask = ["--teach", str(teacher.root), "--predict"]
    assert program.main([*ask, "cup.jpg"]) == 2
    assert f"ar1star_lat_replay.py --teach {teacher.root}`" in capfd.readouterr().err
    for name, film in zip(("cup", "box"), films):
        record(teacher, name, film)
    assert program.main([*ask, str(next((teacher.root / "test" / "cup").iterdir()))]) == 0
    assert "cup" in capfd.readouterr().out.split("box")[0]
