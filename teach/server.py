"""The page on which a camera teaches objects: python ar1star_lat_replay.py --teach [DIR].

    serve(load_config("teach", overrides={"data": "taught"}))       until Ctrl-C, at http://localhost:8000

A recording is one batch of own images in DIR: train/<number>/<name>/*.jpg, and every fifth frame, held back,
in test/<name>/*.jpg. `Teacher` writes it, learns it and saves, in DIR/teach/run0_seed0/ as a run does;
`Application` lets the page ask a Teacher, one request at a time.
"""
import base64
import errno
import hashlib
import io
import json
import re
import shutil
import socket
import time
import unicodedata
import warnings
from collections import Counter
from contextlib import suppress
from itertools import count
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from werkzeug import exceptions
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from ar1star_lat_replay import Learner, build_learner
from data_loader import lock
from harness.checkpoint import CheckpointError, RunFailure, RunFolder, run_path
from harness.config import ConfigError
from harness.console import leaving_at_once, say
from harness.encoder import TestSet, pick_device
from harness.errors import explain
from harness.records import kept_mb, per_class
from models.split_net import SplitNet
from streams.folder import KINDS, FolderStream, decode, stretched
from utils import CWRHead, ReplayMemory, scores

PAGE = Path(__file__).with_name("page.html")
HELD_BACK = 5               # every fifth frame of a recording is tested on instead of learned
MOST_FRAMES = 100           # of a recording
MOST_BYTES = 20_000_000     # of a request
MOST_PIXELS = 2000          # a side of a frame; the page sends 128
MOST_LATENTS = 10_000       # that are remembered, 60 MB
UNKNOWN = 1.144             # benchmarks/teach_ten.py measures it: see Teacher.look
WAIT = 0.5                  # seconds that a request waits for others that take no longer than a look
NO_NAME = re.compile(r'[/\\:*?"<>|]|^\.|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)


class Refused(exceptions.BadRequest):
    """What a request asks for and cannot have: what is wrong and what to do, in one sentence."""


# ---- what is taught ----

class Remembering:
    """An Encoder that remembers the latents of frames, so that those of a recording are made while it runs.

    width: how many values of a latent are given; None: all.
    """
    latents_are_fixed = True

    def __init__(self, encoder, width=None):
        self.encoder = encoder
        self.width = width
        self.latents = {}       # by a check sum of the frame

    def __call__(self, frames):
        """Latents (n, width) of frames, uint8 (n, H, W, 3)."""
        found = []
        for frame in np.asarray(frames):
            key = hashlib.sha256(frame.tobytes()).digest()
            if key not in self.latents:
                self.latents[key] = self.encoder(frame[None])[0]
            found.append(self.latents[key])
        while len(self.latents) > MOST_LATENTS:
            del self.latents[next(iter(self.latents))]
        return torch.stack(found)[:, :self.width]


class Teacher:
    """A learner, a twin that is merely fine-tuned on the same latents, and the recordings that both learned.

    config: of the section teach, whose `data` is the folder DIR. Recordings that lie in DIR and that the last
    checkpoint does not hold are learned at the start; all of them, where it was made of others. Raises what
    RunFolder and FolderStream do.
    """

    def __init__(self, config):
        self.config = config
        self.root = Path(config.data)
        self.size = config.image_size
        self.encoder = None
        self.folder = None
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            self.lock = lock(self.root / "teach.lock", wait=False)
        except BlockingIOError:
            raise ConfigError(f"another program teaches in {self.root}: open its page, end it, or name "
                              "another folder") from None
        self.start()

    def start(self):
        """Takes over what DIR holds."""
        self.close()
        self._make_learners()
        self._read_folder()
        self._open()
        state = self.folder.state
        self.rows = []
        if state:
            self.rows = state["rows"]
            self.learner.load_state_dict(state)
            self.twin.load_state_dict(state["twin"])
        self.learner.encoder = self.encoder
        self.twin.encoder = Remembering(self.encoder, self.twin.net.output.in_features)
        self._learn_rest()
        self._changed()

    def _changed(self):
        """To be called after every change of what is known."""
        memory = self.learner.memory
        self.met = self._directions(memory.x[torch.arange(len(memory))])
        self.change = time.time()       # by which a page notices it

    def _directions(self, latents):
        """The features of latents (n, values) that SLDA takes, scaled to a length of 1."""
        beside = self.learner.beside
        return F.normalize(latents.sqrt() if beside is None else beside.features(latents))

    def _make_learners(self):
        size = (self.size, self.size)
        device = pick_device(self.config.device)
        self.learner = build_learner(self.config, 1, size, device)
        features = self.learner.net.output.in_features
        if self.encoder is None:
            self.learner.encoder.chunk = 1      # 16, to which an Encoder fills up, take ten times as long
            self.encoder = Remembering(self.learner.encoder)
            self.learner.encoder(np.zeros((1, *size, 3), np.uint8))     # the first one takes longer

        # a head alone, which takes latents as they come
        head = SplitNet({"latents": nn.Identity()}, features, 1, "latents").to(device)
        memory = ReplayMemory(0, like=torch.zeros((1, features), device=device))
        phases = [phase._replace(frozen_layer="latent") for phase in (self.learner.first, self.learner.later)]
        self.twin = Learner(head, CWRHead(head.output, "none"), memory, None, *phases, seed=self.config.seed,
                            mb_size=self.config.mb_size, momentum=self.config.momentum, l2=self.config.l2)

    def _read_folder(self):
        """Sees which recordings lie in DIR: `stream`, None if there are none, and what it says of them."""
        some = any(self.root.glob("train/*"))
        self.stream = FolderStream(self.root, self.size) if some else None
        self.names = self.stream.class_names if some else []
        self.listing = self.stream.listing if some else []
        self.data = self.stream.identity() if some else None

    def _open(self):
        """Opens the RunFolder, with a checkpoint that the recordings go on from, if there is one."""
        path = run_path(self.config, "teach", self.root)
        older = path / "previous.pt"
        fresh = self.stream is None
        while self.folder is None:
            try:
                self.folder = RunFolder(path, self.config, fresh=fresh, data=self.data)
                self.folder.check_weights(self.learner.net)
                self.folder.begin()
            except CheckpointError as error:
                self.close()
                if fresh or isinstance(error, RunFailure):
                    raise
                if older.exists():
                    older.replace(path / "checkpoint.pt")       # as after the last recording was taken back
                else:
                    fresh = True

    def _learn_rest(self):
        """Learns the recordings that lie in DIR and are not learned yet, and saves."""
        learned = len(self.rows)
        if learned == len(self.listing):
            return
        test = TestSet(*self.stream.get_test_set())
        for i in range(learned, len(self.listing)):
            images, labels = self.stream.read_batch(i)
            self.learner.learn(images, labels)
            self.twin.learn(images, labels)
            result = test.evaluate(self.learner)
            twin = per_class(self.twin, labels, test.evaluate(self.twin))
            row = {"batch": i, "n_train": len(images), "test_accuracy": result["accuracy"]}
            row |= {"seconds_train": round(self.learner.clock.take()["train"], 4)}
            row |= per_class(self.learner, labels, result)
            row |= {"kept_mb": kept_mb(self.learner), "twin": twin["per_class"]}
            self.rows.append(row)

        newest = self.folder.path / "checkpoint.pt"
        if newest.exists():
            shutil.copyfile(newest, newest.with_name("previous.pt"))
        self._save()

    def _save(self):
        self.folder.data = self.data
        self.folder.save({"rows": self.rows, "image_size": [self.size, self.size],
                          **self.learner.state_dict(), "twin": self.twin.state_dict()}, force=True)

    def close(self):
        """Lets go of the run's folder; `start` takes it again."""
        if self.folder is not None:
            self.folder.close()
            self.folder = None

    # ---- what the page asks for ----

    def look(self, frame, remember=False):
        """What one frame, uint8 (size, size, 3), shows. remember: it belongs to a recording.

        "p": the probability of each object, where one of them is there; "near": the cosine between its
        features and the nearest ones that the memory replays, and a fifth of the highest probability. Where
        that is below UNKNOWN, over some frames, probably none of them is there. The cosine alone tells one
        place from another rather than one object from another.
        """
        # other frames would drive those held back out of its memory within minutes
        latents = (self.encoder if remember else self.encoder.encoder)(frame[None])
        told = {"change": self.change, "p": [], "near": 0.0}
        if self.rows:
            told["p"] = scores(self.learner.classify, latents, 1).softmax(1)[0].tolist()
            told["near"] = (self.met @ self._directions(latents)[0]).max().item() + max(told["p"]) / 5
        return told

    def teach(self, name, files):
        """Learns one recording of an object, five to MOST_FRAMES JPEGs; a name that differs from a known one
        in case alone is that one. Where it fails, nothing has changed."""
        name = checked_name(name)
        name = next((known for known in self.names if known.casefold() == name.casefold()), name)
        taken = [int(path.name) for path in self.root.glob("train/*") if path.name.isdecimal()]
        number = 1 + max(taken, default=0)
        try:
            self._write(number, name, files)
            self._read_folder()
            self._learn_rest()
            self._changed()
        except BaseException:
            self._remove(number)
            self.start()
            raise

    def _write(self, number, name, files):
        # complete before it comes to its place, which is the last thing: a kill leaves no half a recording
        whole = self.root / ".recording"
        shutil.rmtree(whole, ignore_errors=True)
        train = whole / name
        test = self.root / "test" / name
        train.mkdir(parents=True)
        test.mkdir(parents=True, exist_ok=True)
        for k, file in enumerate(files, 1):
            folder = train if k % HELD_BACK else test
            (folder / f"{number}_{k:03}.jpg").write_bytes(file)
        (self.root / "train").mkdir(exist_ok=True)
        whole.rename(self.root / "train" / str(number))

    def _remove(self, number):
        """Takes the files of a recording out of DIR."""
        gone = self.root / ".recording"
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(FileNotFoundError):
            (self.root / "train" / str(number)).rename(gone)        # at once, whatever comes
        for folder in list(self.root.glob("test/*")):
            for file in folder.glob(f"{number}_[0-9][0-9][0-9].jpg"):
                file.unlink()
            with suppress(OSError):     # which holds other frames
                folder.rmdir()
        shutil.rmtree(gone, ignore_errors=True)

    def undo(self):
        """Takes the last recording back, its files, too."""
        last = self.last()
        if last is None:
            raise Refused("there is no recording to take back: what lies here was not filmed on this page")
        self._remove(last)
        self.start()

    def last(self):
        """The number of the last recording; None if there is none, or none of this page's."""
        if not self.listing:
            return None
        number = self.data["content"][-1][0]
        first = self.listing[-1][0][1]      # the name of its first file
        return number if number.isdecimal() and first.startswith(f"{number}_") else None

    def rename(self, old, new):
        """Gives an object another name, in the folders, too."""
        new = checked_name(new)
        if old not in self.names:
            raise Refused(f"there is no object {old!r}: load the page again")
        if new.casefold() in {name.casefold() for name in self.names if name != old}:
            raise Refused(f"there is an object {new!r} already: choose another name")
        for folder in [*self.root.glob("train/*"), self.root / "test"]:
            if (folder / old).is_dir():
                (folder / old).rename(folder / new)
        before = self.names
        self._read_folder()
        if self.names == [new if name == old else name for name in before]:
            self._save()
            self._changed()
        else:       # names within a batch of several objects are in another order, which numbers them
            self.start()

    def reset(self):
        """Begins anew. The recordings move to DIR/reset<number>."""
        places = (self.root / f"reset{number}" for number in count(1))
        aside = next(place for place in places if not place.exists())
        aside.mkdir()
        for part in ("train", "test"):
            if (self.root / part).exists():
                (self.root / part).rename(aside / part)
        self.start()

    def state(self):
        """All that the page shows, as JSON has it."""
        frames = Counter(name for batch in self.listing for name, _, _ in batch)
        return {"change": self.change, "unknown": UNKNOWN, "folder": str(self.root), "size": self.size,
                "most": MOST_FRAMES, "names": self.names, "frames": [frames[name] for name in self.names],
                "rows": self.rows, "undo": self.last() is not None}


def checked_name(name):
    """A name for an object, without spaces around it; Refused unless every system takes it for a folder."""
    name = unicodedata.normalize("NFC", name).strip() if isinstance(name, str) else ""
    if not name:
        raise Refused("the object has no name: write one")
    if not name.isprintable() or NO_NAME.search(name) or len(name.encode()) > 100:
        raise Refused(f"{name[:40]!r} cannot be the name of a folder on every system: choose a shorter one, "
                      'or one without / \\ : * ? " < > | and without a dot at its beginning or end')
    return name


def as_frame(given, size):
    """An image file as (uint8 (size, size, 3), JPEG of exactly that); Refused if damaged.

    given: its bytes, or the text data:image/...;base64,... that a page makes of a picture.
    """
    try:
        raw = given
        if not isinstance(given, bytes):
            raw = base64.b64decode(str(given).partition(",")[2], validate=True)
        with Image.open(io.BytesIO(raw), formats=KINDS) as header:
            if max(header.size) > MOST_PIXELS:
                raise ValueError(f"it is larger than {MOST_PIXELS} pixels")
        file = io.BytesIO()
        Image.fromarray(stretched(decode(raw), size)).save(file, "JPEG", quality=95)
        return np.array(decode(file.getvalue())), file.getvalue()
    except Exception as error:      # Pillow raises nearly anything for damaged bytes
        raise Refused(f"a frame cannot be read as an image ({str(error):.100}): send another") from error


# ---- requests ----

DOING = {       # what those are told that come meanwhile; None: it takes no longer than a look
    "/teach": "learning the last recording",
    "/undo": "taking back the last recording",
    "/rename": "renaming an object",
    "/reset": "beginning anew",
    "/state": None,
    "/look": None}

HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
                               "img-src data: blob:; media-src blob:; connect-src 'self'; "
                               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}


class Application:
    """The WSGI application by which pages ask a Teacher, on a server at `host`.

    One request is let in after the other; those that come while it learns are told so at once.
    """

    def __init__(self, teacher, host="127.0.0.1"):
        self.teacher = teacher
        self.host = host
        self.lock = Lock()
        self.doing = None

    @Request.application
    def __call__(self, request):
        status = 200
        request.max_content_length = MOST_BYTES
        try:
            check_origin(request, self.host)
            if request.path == "/" and request.method in ("GET", "HEAD"):
                return Response(PAGE.read_bytes(), status, HEADERS, content_type="text/html; charset=utf-8")
            told = self.answer(request.path, as_asked(request))
        except Exception as error:
            status, sentence = as_told(error)
            told = {"error": sentence}
        return Response(json.dumps(told), status, HEADERS, content_type="application/json")

    def answer(self, path, asked):
        """What a request is answered: path, and asked, the object in its body."""
        if path not in DOING:
            raise exceptions.NotFound("there is nothing here: open /")
        if self.doing or not self.lock.acquire(timeout=WAIT):
            raise exceptions.ServiceUnavailable(f"{self.doing or 'busy'}: wait a moment")
        try:
            self.doing = DOING[path]
            return self._do(path, asked)
        finally:
            self.doing = None
            self.lock.release()

    def _do(self, path, asked):
        teacher = self.teacher
        if teacher.folder is None:      # a full disk did not even let it start again
            teacher.start()
        if path == "/look":
            frame, _ = as_frame(asked.get("frame"), teacher.size)
            return teacher.look(frame, asked.get("remember") is True)

        if path == "/teach":
            frames = asked.get("frames")
            n = len(frames) if isinstance(frames, list) else 0
            if not HELD_BACK <= n <= MOST_FRAMES:
                raise Refused(f"a recording has {HELD_BACK} to {MOST_FRAMES} frames, and this one {n}: film "
                              "longer, or give more files")
            teacher.teach(asked.get("name"), [as_frame(frame, teacher.size)[1] for frame in frames])
        elif path == "/undo":
            teacher.undo()
        elif path == "/rename":
            teacher.rename(asked.get("old"), asked.get("new"))
        elif path == "/reset":
            teacher.reset()
        return teacher.state()


def check_origin(request, host):
    """Forbidden unless a request names this server as its host, and comes from its own page or from none."""
    name = re.sub(r":\d{1,5}$", "", request.headers.get("Host", ""))
    own = {"localhost", "127.0.0.1", "[::1]", host, f"[{host}]"}
    # a name could be one that somebody has pointed here; an address is no such name
    if host not in ("127.0.0.1", "localhost", "::1") and re.fullmatch(r"[\d.]+|\[[\da-fA-F:.]+\]", name):
        own.add(name)
    origin = request.headers.get("Origin")
    if name not in own or origin not in (None, f"http://{request.headers['Host']}"):
        raise exceptions.Forbidden("this is not the page of this server: open the address that the program "
                                   "printed")


def as_asked(request):
    """The object in the body of a request; {} of a GET."""
    if request.method == "GET" and request.path == "/state":
        return {}
    if request.method != "POST" or request.mimetype != "application/json":
        raise exceptions.MethodNotAllowed(["POST"], "this is asked by POST, with JSON as its body")
    try:
        asked = json.loads(request.get_data())
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        raise Refused("the body of the request is no JSON object")
    return asked


def as_told(error):
    """(status, sentence) of an error."""
    if isinstance(error, exceptions.RequestEntityTooLarge):
        return 413, f"a request has at most {MOST_BYTES // 1_000_000} MB: give fewer frames"
    if isinstance(error, exceptions.HTTPException):
        return error.code, error.description
    if getattr(error.__cause__ or error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return 507, "the disk is full, so nothing was learned: make room and record again"
    say(explain(error))
    return 500, explain(error)


# ---- the server ----

class Quiet(WSGIRequestHandler):
    """Says nothing of single requests, and waits for none that does not come to its end."""
    timeout = 20

    def log(self, type, message, *args):
        """Nothing."""


def listening(host, port):
    """A socket at host and port; ConfigError if there can be none."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"there can be no server at {host}, port {port} ({error}): open "
                          f"http://localhost:{port}, where this program may be already, or choose others "
                          "with --host and --port") from error


def serve(config, host="127.0.0.1", port=8000):
    """Serves the page until Ctrl-C or SIGTERM. Raises what Teacher and listening do."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)     # as_frame refuses such an image
    with listening(host, port) as listener, leaving_at_once():
        teacher = Teacher(config)
        app = Application(teacher, host)
        server = make_server(host, port, app, threaded=True, request_handler=Quiet, fd=listener.fileno())
        shown = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::") else host
        say(f"teach objects at http://{shown}:{server.port} ; Ctrl-C ends. All is kept in {teacher.root}")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        # what is being learned is learned, and saved; nobody gets in any more: a thread that computes while
        # the process ends would abort it
        app.lock.acquire()
        teacher.close()
        teacher.lock.close()
        n = len(teacher.names)
        say(f"saved: the same command goes on with {n} object{'s' * (n != 1)}")
