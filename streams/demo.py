"""A stream that the program draws itself: DemoStream, which needs neither data nor weights nor a network.

It has NICv2's shape at a size for a laptop's CPU: 10 objects (5 shapes, 2 each), 5 training and 2 test
sessions, 46 batches, 1,800 + 400 images of 48x48, drawn in 2-3 s on one core. An object is a shape AND a
pattern AND two colours; each of these alone also belongs to another object. Colours move with the light of
the session.
"""
from pathlib import Path

import numpy as np
import torch

from data_loader import DataError, Stream, fingerprint, writing

# shape, pattern and two colours of each object
OBJECTS = (("ball", "banded", "red", "cream"), ("ball", "dotted", "green", "yellow"),
           ("box", "checked", "blue", "white"), ("box", "swirled", "orange", "black"),
           ("can", "banded", "purple", "yellow"), ("can", "checked", "pink", "black"),
           ("cone", "sectored", "blue", "orange"), ("cone", "swirled", "green", "cream"),
           ("ring", "dotted", "purple", "pink"), ("ring", "sectored", "red", "white"))
COLOURS = {"red": (.75, .05, .05), "orange": (.90, .33, .03), "yellow": (.95, .75, .08),
           "green": (.04, .42, .10), "blue": (.05, .12, .70), "purple": (.32, .06, .50),
           "pink": (.95, .45, .65), "cream": (.95, .85, .65), "white": (.90, .92, .95),
           "black": (.06, .05, .05)}  # linear RGB
BASE_TILT = {"ball": 0., "box": .2, "can": -.2, "cone": 0., "ring": -1.}  # radians; a ring shows its hole
SURFACES = (("planks", "plain"), ("tiles", "clouds"), ("clouds", "bricks"), ("checks", "panels"),
            ("plain", "tiles"), ("waves", "planks"), ("bricks", "waves"))  # floor and wall of each session
TRAIN_SESSIONS = (0, 1, 2, 3, 4)  # indices into SURFACES
TEST_SESSIONS = (5, 6)
TRAIN_FRAMES = 36  # per (session, object)
TEST_FRAMES = 20
FIRST_BATCH = (0, 2, 4, 6, 8)  # labels: one object of each shape, as NICv2 begins with one of each category
LAST_NEWCOMER = (.75, .80)  # where the last object appears, as a share of the stream (NICv2-391: .82 to .87)
CAMERA = np.array([0, .8, -4.2], np.float32)  # x, y, z in scene units; an object has a radius of about 1
PITCH = .2  # of the camera, radians downwards
HALF_VIEW = .31  # tangent of half the angle of view
FLOOR_Y = -1.  # scene units
WALL_Z = 3.5
MARCH_STEPS = 20  # sphere-tracing steps per ray


def distance(shape, p):
    """Signed distance (n,) of the points p (3, n) from the surface of a shape that fits the unit sphere."""
    x, y, z = p
    if shape == "ball":
        return np.sqrt(x * x + y * y + z * z) - .80
    if shape == "box":
        q = np.abs(p) - .46
        return np.sqrt((np.maximum(q, 0) ** 2).sum(0)) + np.minimum(q.max(0), 0) - .09
    radius = np.sqrt(x * x + z * z)
    if shape == "can":
        side = radius - .46
        lid = np.abs(y) - .72
        return np.hypot(np.maximum(side, 0), np.maximum(lid, 0)) + np.minimum(np.maximum(side, lid), 0) - .06
    if shape == "cone":
        return np.maximum(.91 * radius + .414 * (y - .92), -.68 - y)
    return np.sqrt((radius - .64) ** 2 + y * y) - .27  # ring


def pattern(kind, p):
    """Share (n,) in [0, 1] of the palette's second colour at the points p (3, n) of an object."""
    x, y, z = p
    if kind == "banded":
        wave = np.sin(9 * y + 1)
    elif kind == "checked":
        wave = 1.5 * np.cos(5.7 * x) * np.cos(5.7 * y) * np.cos(5.7 * z)
    elif kind == "dotted":
        wave = np.cos(9 * x) + np.cos(9 * y) + np.cos(9 * z) - .5
    else:
        turns = np.arctan2(z, x)
        wave = np.sin(4 * turns) if kind == "sectored" else np.sin(2 * turns + 6 * y)
    return np.clip(.5 + 3 * wave, 0, 1)  # steep but not a step: an edge is spread over about one pixel


def surface(kind, a, b, phase):
    """Tone in [0, 1] of a floor or wall at the coordinates a, b (any one shape), in scene units."""
    if kind == "plain":
        return .5 + .1 * np.sin(.8 * a + phase) + .1 * np.sin(.9 * b)
    if kind == "clouds":
        coarse = np.sin(1.7 * a + .9 * b + phase)
        fine = np.sin(4.1 * a + 3.3 * b + 2 * phase)
        return .5 + .17 * (coarse + np.sin(2.9 * b - 1.3 * a) + fine)
    if kind == "waves":
        return .5 + .25 * np.sin(3 * b + 1.2 * np.sin(1.6 * a + phase))
    if kind == "checks":
        return .5 + np.clip(2 * np.sin(2.4 * a + phase) * np.sin(2.4 * b), -.3, .3)
    if kind == "panels":
        return .5 + np.clip(np.sin(3.5 * a + phase), -.3, .3)
    if kind == "planks":
        grain = np.sin(11 * np.floor(1.6 * a + phase))  # each plank has its own tone
        joint = np.sin(2 * np.pi * (1.6 * a + phase)) > .94
        return .5 + .2 * grain + .08 * np.sin(2 * b + 5 * grain) - .25 * joint

    rows, columns = (1.8, .9) if kind == "bricks" else (1.1, 1.1)  # tiles
    if kind == "bricks":
        a = a + .5 * (np.floor(1.8 * b) % 2)  # every other row is set off by half a brick
    joint = np.maximum(np.cos(2 * np.pi * rows * b), np.cos(2 * np.pi * (columns * a + phase)))
    return .65 - .45 * np.clip(8 * (joint - .9), 0, 1)


def drift(rng, frames, amplitude):
    """A smooth random path (frames,) within +-amplitude: the hand that moves the object, or the camera."""
    t = np.linspace(0, 1, frames)
    return amplitude * np.sin(2 * np.pi * (rng.uniform(.3, .9) * t + rng.uniform()))


def colour(hue, saturation, value):
    """Linear RGB (3,) of a hue in [0, 1) (red, yellow, green, ...)."""
    pure = np.clip(np.abs((6 * hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return value * (1 - saturation + saturation * pure)


def make_scene(seed, session):
    """Light and colours of a session; its hues are at least a seventh of the circle from any other's."""
    rng = np.random.default_rng([seed, 1])
    hue = rng.uniform() + rng.permutation(len(SURFACES))[session] / len(SURFACES)

    def tones(hue):
        """A dark and a bright tone, (2, 3)."""
        return np.stack([colour(hue, .2, rng.uniform(.22, .28)), colour(hue, .15, rng.uniform(.35, .45))])

    rng = np.random.default_rng([seed, 2, session])
    side = rng.uniform(.3, .9) * rng.choice([-1, 1])
    height = rng.uniform(.7, 1.2)
    warmth = rng.uniform(-.1, .1)
    light = np.array([side, height, -rng.uniform(.5, .9)])
    return {"light": light / np.linalg.norm(light),
            "floor": tones(hue),
            "wall": tones(hue + .4),
            "key": rng.uniform(.85, 1.05) * np.array([1 + warmth, 1, 1 - warmth]),
            "sky": rng.uniform(.25, .35) * np.array([1 - warmth / 2, 1, 1 + warmth / 2]),
            "phase": rng.uniform(0, 6)}


def draw_background(session, scene, rays, centre, size, pan):
    """Floor, wall and the object's soft shadow: linear RGB (F, P, 3) for the rays (3, P) of F frames."""
    # where each ray ends, and the texture there
    to_floor = (FLOOR_Y - CAMERA[1]) / np.minimum(rays[1], -1e-3)  # length of the ray up to the floor, (P,)
    to_wall = (WALL_Z - CAMERA[2]) / rays[2]
    on_floor = to_floor < to_wall
    x, y, z = CAMERA[:, None] + rays * np.where(on_floor, to_floor, to_wall)
    a = x + pan[:, None]  # (F, P): the camera pans, the pixels stay
    tone = np.empty_like(a)
    for here, kind, b in zip((on_floor, ~on_floor), SURFACES[session], (z, y)):
        b = np.broadcast_to(b[here], (len(a), here.sum()))
        tone[:, here] = surface(kind, a[:, here], b, scene["phase"])
    dark, bright = (np.where(on_floor[:, None], scene["floor"][i], scene["wall"][i]) for i in (0, 1))
    albedo = dark + (bright - dark) * tone[..., None]  # (F, P, 3)

    # the light that falls there
    light = scene["light"]
    low = np.clip(.75 + .2 * y, 0, 1)  # a wall is darker near the floor
    lit = np.where(on_floor, light[1], -light[2] * low)[:, None]
    foot = centre - light * ((centre[:, 1] - FLOOR_Y) / light[1])[:, None]  # where the shadow falls, (F, 3)
    off = np.hypot(x - foot[:, :1], z - foot[:, 2:]) / size[:, None]
    shade = 1 - .8 * on_floor * np.clip(1.25 - off, 0, 1) ** .5
    return (albedo * (scene["sky"] + scene["key"] * lit * shade[..., None])).astype(np.float32)


def make_motion(rng, shape, frames):
    """Where the object is and how it is turned: centre (F, 3), size (F,), object -> scene (F, 3, 3)."""
    x = rng.uniform(-.3, .3) + drift(rng, frames, .3)
    y = rng.uniform(-.1, .1) + drift(rng, frames, .2)
    z = drift(rng, frames, .4)
    size = rng.uniform(.95, 1.1) + drift(rng, frames, .1)
    yaw = rng.uniform(0, 6.3) + np.linspace(0, rng.uniform(1.2, 3) * rng.choice([-1, 1]), frames)
    tilt = BASE_TILT[shape] + drift(rng, frames, .35)
    roll = rng.uniform(-.2, .2) + drift(rng, frames, .3)
    rotation = rotations(2, roll) @ rotations(0, tilt) @ rotations(1, yaw)
    return np.stack([x, y, z], 1), size, rotation


def rotations(axis, angles):
    """Rotation matrices (F, 3, 3) about one axis by angles (F,), in radians."""
    i = (axis + 1) % 3
    j = (axis + 2) % 3
    turns = np.tile(np.eye(3), (len(angles), 1, 1))
    turns[:, i, i] = np.cos(angles)
    turns[:, j, j] = np.cos(angles)
    turns[:, i, j] = -np.sin(angles)
    turns[:, j, i] = np.sin(angles)
    return turns


def march(shape, origin, rays):
    """Sphere tracing along rays (3, n) from origin (3, n): points (3, n) nearest to the shape, gaps (n,)."""
    along = -(origin * rays).sum(0)
    t = np.maximum(along - 1.1, 0)
    best_t = t
    best = np.full_like(t, np.inf)
    for _ in range(MARCH_STEPS):
        gap = distance(shape, origin + rays * t)
        best_t = np.where(gap < best, t, best_t)
        best = np.minimum(best, gap)
        t = t + gap
    return origin + rays * best_t, best


def shade(obj, scene, point, rays, rotation):
    """Linear RGB (n, 3) of points (3, n) of an object: Lambert's law, a highlight, light from all around."""
    shape, kind, *colours = obj
    tetrahedron = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], np.float32)[:, :, None]
    normal = sum(corner * distance(shape, point + .01 * corner) for corner in tetrahedron)
    normal = np.einsum("nij,jn->in", rotation, normal / np.linalg.norm(normal, axis=0))

    light = scene["light"].astype(np.float32)
    half = light[:, None] - rays
    glint = np.maximum((normal * half).sum(0) / np.linalg.norm(half, axis=0), 0) ** 32
    direct = np.maximum(light @ normal, 0)
    around = .65 + .35 * normal[1]  # less light comes from below

    first, second = np.array([COLOURS[name] for name in colours], np.float32)
    albedo = first + (second - first) * pattern(kind, point)[:, None]
    diffuse = scene["sky"] * around[:, None] + scene["key"] * direct[:, None]
    return albedo * diffuse + .35 * glint[:, None] * scene["key"]


def draw_unit(seed, session, label, frames, image_size):
    """The video of one object in one session: uint8 (frames, image_size, image_size, 3).

    Every unit has its own random stream, so that it looks the same whatever was drawn before it.
    """
    obj = OBJECTS[label]
    scene = make_scene(seed, session)
    rng = np.random.default_rng([seed, 3, session, label])
    centre, size, rotation = make_motion(rng, obj[0], frames)

    v, u = HALF_VIEW * (1 - (2 * np.mgrid[:image_size, :image_size] + 1) / image_size).reshape(2, -1)
    y = v * np.cos(PITCH) - np.sin(PITCH)
    z = v * np.sin(PITCH) + np.cos(PITCH)
    rays = np.stack([-u, y, z]).astype(np.float32)  # from the camera through each pixel, (3, P)
    rays /= np.linalg.norm(rays, axis=0)
    pan = rng.uniform(0, 9) + drift(rng, frames, 2)
    picture = draw_background(session, scene, rays, centre, size, pan)  # (F, P, 3)

    to_object = (centre - CAMERA) / size[:, None]  # in units of the object's size, (F, 3)
    near = (to_object ** 2).sum(1)[:, None] - (to_object @ rays) ** 2 < 1.1 ** 2  # to the unit sphere
    frame, pixel = np.nonzero(near)
    turn = rotation.astype(np.float32)[frame]
    seen = rays[:, pixel]
    origin = -np.einsum("fji,fj->if", rotation, to_object).astype(np.float32)[:, frame]
    point, gap = march(obj[0], origin, np.einsum("nji,jn->in", turn, seen))

    pixel_width = 2 * HALF_VIEW / image_size * np.linalg.norm(to_object, axis=1).astype(np.float32)[frame]
    cover = np.clip(1 - gap / pixel_width, 0, 1)[:, None]  # a near miss is mixed in: a smooth outline
    picture[frame, pixel] += cover * (shade(obj, scene, point, seen, turn) - picture[frame, pixel])
    picture *= 1 + drift(rng, frames, .12)[:, None, None]  # the camera's exposure wanders
    picture = np.sqrt(np.clip(picture, 0, 1))  # linear light -> pixel values, gamma 2
    return (255 * picture + .5).astype(np.uint8).reshape(frames, image_size, image_size, 3)


def draw_order(seed, run):
    """The units [(session, label), ...] of every batch: those of FIRST_BATCH in batch 0, then one each.

    The five objects that batch 0 lacks come in at even distances, in a random order, the last one within
    LAST_NEWCOMER; everywhere else stands a random unit of an object already met.
    """
    rng = np.random.default_rng([seed, 4, run])
    batches = [[(TRAIN_SESSIONS[0], o) for o in FIRST_BATCH]]
    rest = [(s, o) for s in TRAIN_SESSIONS for o in range(len(OBJECTS)) if (s, o) not in batches[0]]
    newcomers = [o for o in rng.permutation(len(OBJECTS)).tolist() if o not in FIRST_BATCH]
    shares = np.linspace(0, 1, len(newcomers) + 1)[1:] * rng.uniform(*LAST_NEWCOMER)
    first_places = [int(share * (len(rest) + 1)) for share in shares]
    entering = dict(zip(first_places, newcomers))  # {batch: the new object in it}

    met = set(FIRST_BATCH)
    while rest:
        allowed = {entering[len(batches)]} if len(batches) in entering else met
        choice = [unit for unit in rest if unit[1] in allowed]
        unit = choice[rng.integers(len(choice))]
        rest.remove(unit)
        met.add(unit[1])
        batches.append([unit])
    return batches


class DemoStream(Stream):
    """A small NICv2 stream, drawn by the program; a seed gives the same bytes (on one machine and numpy).

    `seed` draws motions, lights, colours of the surroundings and, with `run`, the order of the batches; the
    objects are always the same. `units[i]` lists the (session, label) of batch i, `test_units` those of the
    test set; a batch holds their frames in this order. They are drawn when first needed, and kept (15 MB in
    all). cumulative: batch i holds the batches 0 .. i. DataError if there is no batch `start_batch`.
    """
    class_names = ["_".join(obj[:2]) for obj in OBJECTS]
    num_classes = len(OBJECTS)

    def __init__(self, seed=0, run=0, image_size=48, start_batch=0, cumulative=False):
        self.seed = seed
        self.image_size = image_size
        self.units = draw_order(seed, run)
        self.test_units = [(s, o) for o in range(len(OBJECTS)) for s in TEST_SESSIONS]
        self._drawn = {}  # (session, label): video
        super().__init__(len(self.units), start_batch, cumulative)

    def draw(self, session, label):
        """The video of one unit, uint8 (36 or 20 frames, H, W, 3)."""
        if (session, label) not in self._drawn:
            frames = TRAIN_FRAMES if session in TRAIN_SESSIONS else TEST_FRAMES
            self._drawn[session, label] = draw_unit(self.seed, session, label, frames, self.image_size)
        return self._drawn[session, label]

    def _join(self, units):
        videos = [self.draw(*unit) for unit in units]
        labels = [np.full(len(video), label, np.int64) for video, (_, label) in zip(videos, units)]
        return np.concatenate(videos), np.concatenate(labels)

    def _read_batches(self, numbers):
        return self._join([unit for i in numbers for unit in self.units[i]])

    def _read_test(self, stride):
        x, y = self._join(self.test_units)
        return x[::stride], y[::stride]

    def identity(self):
        """As Stream.identity, but "batches" and "test" count videos, and the images are "demo"."""
        return {"data": "demo", "order": fingerprint(repr((self.units, self.test_units))),
                "classes": self.class_names, "batches": [len(units) for units in self.units],
                "test": len(self.test_units)}


def export_demo(root, seed=0):
    """Write DemoStream(seed) to disk as FolderStream reads it: same pixels, labels, order. 6.5 MB, 6 s.

    Returns {"batches", "classes", "train", "test"}, the last two in images. DataError if root holds anything.
    """
    root = Path(root)
    stream = DemoStream(seed)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DataError(f"{root} exists and is not an empty folder: name a new folder for the demo's images")

    folders = {root / "train" / f"{i:02d}": units for i, units in enumerate(stream.units)}
    train = sum(_write_units(stream, units, folder) for folder, units in folders.items())
    test = _write_units(stream, stream.test_units, root / "test")
    return {"batches": len(folders), "classes": stream.num_classes, "train": train, "test": test}


def _write_units(stream, units, folder):
    """Write the frames of some units as FOLDER/<class>/*.png; their number."""
    from torchvision.io import encode_png  # not above: importing it takes seconds

    written = 0
    for session, label in units:
        video = torch.from_numpy(stream.draw(session, label))
        images = video.permute(0, 3, 1, 2).contiguous()  # (F, 3, H, W)
        target = folder / stream.class_names[label]
        target.mkdir(parents=True, exist_ok=True)
        for frame, image in enumerate(images):
            file = target / f"C_{session + 1:02d}_{label + 1:02d}_{frame:03d}.png"
            with writing(file):
                file.write_bytes(encode_png(image).numpy().tobytes())  # write_png wants names in UTF-8
        written += len(images)
    return written
