"""Where object, hand and light are in each frame of a video: all that chance decides follows from (seed, session, object).

x points right, y up, z to the camera; lengths in metres, angles in radians, time in videos. A hand's fingers point to -z.
"""
import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SESSIONS, OBJECTS = ({k: row for k, row in enumerate(json.loads((HERE / name).read_text()), 1)}
                     for name in ("sessions.json", "objects.json"))


def turned(*vectors):
    """Rotation (3, 3) about vectors by their lengths, about the last one first."""
    if len(vectors) > 1:
        return turned(vectors[0]) @ turned(*vectors[1:])
    angle = np.linalg.norm(vectors)
    k = np.cross(np.eye(3), np.asarray(vectors[0]) / (angle + 1e-300))
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def quaternion(q):
    """Rotation of a quaternion (x, y, z, w) of any length."""
    n = np.linalg.norm(q[:3])
    return turned(np.array(q[:3]) / (n + 1e-300) * 2 * np.arctan2(n, q[3]))


def pose(rotation, shift=(0, 0, 0)):
    """Matrix (4, 4) of a rotation and a shift."""
    return np.vstack([np.column_stack([rotation, shift]), (0, 0, 0, 1)])


class Wave:
    """A smooth random function of time with n values, about -1.5 to 1.5."""

    def __init__(self, rng, n, low=.4, high=2.2):
        self.f, self.p = rng.uniform(low, high, (4, n)) * 2 * np.pi, rng.uniform(0, 2 * np.pi, (4, n))

    def __call__(self, t):
        return np.sin(self.f * t + self.p).sum(0) / 2


class Video:
    """Object o in session s. thing: points (n, 3) on its surface, extent (3,), up (3,), and whether it is held upright."""

    def __init__(self, seed, s, o, thing, hand):
        self.session, self.thing, self.rng = SESSIONS[s], thing, np.random.default_rng((seed, s, o))
        rng, side = self.rng, -1 if self.session["left"] else 1
        self.mirror = np.diag([side, 1, 1])
        self.turn, self.shift, self.pan, self.light = (Wave(rng, n, *f) for n, *f in ((3,), (3,), (4, .3, 1.5), (2, .3, 1.2)))
        self.amplitude, arm = np.array((.30, .45, .30)) * rng.uniform(.8, 1.3), np.radians(self.session["arm"] + rng.normal(0, 14))
        tilt, palm = np.radians(rng.uniform(5, 45)), np.radians(self.session["turn"] + rng.normal(0, 22))
        fingers = -np.array((np.cos(arm) * np.cos(tilt), np.sin(arm) * np.cos(tilt), np.sin(tilt)))
        out = np.array((0, 0, 1)) - fingers * fingers[2]
        back = -turned(fingers * palm * side) @ out / np.linalg.norm(out)               # the thumb comes to the front
        self.base = np.stack([np.cross(back, -fingers), back, -fingers], 1)             # columns: x, y, z of the hand
        self.center, self.zoom, n = rng.normal(0, (.014, .012), 2), rng.uniform(1.08, 1.42), rng.integers(3, 6)
        self.cuts, self.spin = np.sort(rng.uniform(0, 1, n - 1)), rng.uniform(0, 2 * np.pi)
        self.grips = [self.grip(hand) for _ in range(n)]
        self.cloth, self.pan_at = rng.uniform(.02, .25, 3), rng.uniform(-.16, .16, 2)
        self.gamma, self.saturation, self.white = rng.normal(1, .04), rng.normal(1, .06), rng.normal(1, .015, 3)

    def hold(self):
        """A way to hold the object: (across the fingers?, its rotation in the hand)."""
        rng, extent, (long, middle, short) = self.rng, self.thing["extent"], np.argsort(-self.thing["extent"])
        if extent[long] <= 1.3 * extent[middle]:
            return True, quaternion(np.random.RandomState(rng.integers(2**31)).normal(size=4))
        axes = np.eye(3)[[long, middle, short]]                                         # become x, y, z
        axes[2] *= np.linalg.det(axes)
        across = rng.random() < .55
        y = (0 if across else np.pi / 2) + rng.normal(0, .3) + np.pi * rng.integers(0, 2)
        return across, turned((0, 0, rng.normal(0, .25)), (0, y, 0), (self.spin, 0, 0)) @ axes

    def grip(self, hand):
        """The next grip, most often upright and not end-on: the object's rotation and shift, and the hand's vertices, normals."""
        rng, thing, F = self.rng, self.thing, self.mirror
        self.spin += rng.uniform(.8, 2.2) * rng.choice((-1, 1), p=(.25, .75))
        for _ in range(40):
            across, r = self.hold()
            _, y, z = self.base @ F @ r @ F @ thing["up"]
            if (y > .45 and -.25 < z < .75) if thing["upright"] and rng.random() < .92 else abs(z) < .65:
                break
        p = thing["points"] @ F @ r.T
        shift = np.array((rng.uniform(-.2, .2) * np.ptp(p[:, 0]) + .005, rng.uniform(-.028, -.016) - p[:, 1].max(),
                          rng.uniform(*(-.115, -.075) if across else (-.10, -.06)) - p[:, 2].max()))
        return F @ r @ F, F @ shift, *hand.grip(p + shift, rng)

    def at(self, t, grip):
        """At time t: pose of the hand, pose of the object, what the light looks at, direction of the light."""
        (rotation, shift, *_), light, move = self.grips[grip], self.light(t), self.shift(t)
        key = turned((.12 * light[1], 0, 0), (0, .25 * light[0], 0)) @ self.session["key"] / np.linalg.norm(self.session["key"])
        r = self.base @ turned(self.turn(t) * self.amplitude)
        center = np.array((*self.center + move[:2] * .010, -.60 / self.zoom * (1 + .09 * move[2])))
        wrist = center - r @ (.75 * shift + np.array((0, -.02, -.09)) * .25)            # in the middle: mostly the object
        return pose(r, wrist), pose(r @ rotation, wrist + r @ shift), center, key
