"""What a frame shows: an object and a hand around it, and where they are. Chance follows from (seed, session, object) alone.

x points right, y up, z to the camera, a hand's fingers to -z and its back to +y; metres, radians; time in videos.
"""
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE, X, Y, Z = Path(__file__).resolve().parent, *np.eye(3)
SESSIONS, OBJECTS = (json.loads((HERE / name).read_text()) for name in ("sessions.json", "objects.json"))

def asset(path):
    """A file of an installed package, pip's or npm's."""
    for root in (HERE / "node_modules", *sys.path):
        if (file := Path(root, path)).is_file():
            return file
    raise SystemExit(f"error: {path} is missing: install the packages as {HERE / 'README.md'} says")

def turned(v):
    """Rotation (3, 3) about a vector, by its length."""
    angle = np.linalg.norm(v) + 1e-300
    k = np.cross(np.eye(3), v / angle)
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k

def quaternion(q):
    """Rotation of a quaternion (x, y, z, w) of any length."""
    n = np.linalg.norm(q[:3])
    return turned(np.array(q[:3]) * 2 * np.arctan2(n, q[3]) / (n + 1e-300))

def pose(rotation, shift):
    """Matrix (4, 4) of a rotation and a shift."""
    return np.vstack([np.column_stack([rotation, shift]), (0, 0, 0, 1)])

def smooth_normals(v, f):
    """Normals of vertices, each the mean of the faces around it; vertices at one place share theirs."""
    _, place = np.unique(np.round(v / (np.ptp(v, 0).max() * 1e-5)), axis=0, return_inverse=True)
    place, n = place.ravel(), np.zeros((len(v), 3))
    np.add.at(n, place[f], np.cross(v[f[:, 1]] - v[f[:, 0]], v[f[:, 2]] - v[f[:, 0]])[:, None])
    return n[place] / (np.linalg.norm(n[place], axis=1, keepdims=True) + 1e-12)

def read_obj(path):
    """(vertices, normals, texture coordinates, faces) of a Wavefront file, with a vertex of its own for each corner."""
    lines = [line.split() for line in asset(path).read_text("utf8", "ignore").splitlines() if line.strip()]
    v, t, n = (np.array([w[1:1 + k] for w in lines if w[0] == kind], "f4") for kind, k in (("v", 3), ("vt", 2), ("vn", 3)))
    fans = [corner.split("/") for w in lines if w[0] == "f" for k in range(2, len(w) - 1) for corner in (w[1], *w[k:k + 2])]
    i, j, k = np.array(fans, int).T - 1
    return v[i], n[k], t[j] * (1, -1) + (0, 1), np.arange(len(i)).reshape(-1, 3)

class Glb:
    """As much of a binary glTF 2.0 file as the models need."""
    def __init__(self, path):
        b = asset(path).read_bytes()
        n = int.from_bytes(b[12:16], "little")
        self.d = json.loads(b[20:20 + n])
        self.views = [b[28 + n + view.get("byteOffset", 0):][:view["byteLength"]] for view in self.d["bufferViews"]]

    def access(self, i):
        """An accessor's numbers, one row for each of its items."""
        a = self.d["accessors"][i]
        k, kind = {"SCALAR": 1, "MAT4": 16}.get(a["type"]) or int(a["type"][3]), {5121: "u1", 5123: "<u2", 5126: "<f4"}
        x = np.frombuffer(self.views[a["bufferView"]], kind[a["componentType"]], a["count"] * k, a.get("byteOffset", 0))
        return x.reshape(-1, k).astype(float if x.dtype.kind == "f" else int)

    def matrix(self, node):
        """Pose of a node within its parent."""
        if "matrix" in node:
            return np.array(node["matrix"]).reshape(4, 4).T
        turn = quaternion(node.get("rotation", (0, 0, 0, 1)))
        return pose(turn * node.get("scale", (1, 1, 1)), node.get("translation", (0, 0, 0)))

    def parts(self, node, parent):
        """(*what read_obj gives, texture) for each part below a node. parent: pose of the node's parent."""
        m, out = parent @ self.matrix(node), []
        for p in self.d["meshes"][node["mesh"]]["primitives"] if "mesh" in node else ():
            look, at = self.d["materials"][p["material"]]["pbrMetallicRoughness"], p["attributes"]
            *color, opacity = look.get("baseColorFactor", (1, 1, 1, 1))
            image = Image.new("RGB", (4, 4), tuple(int(255 * c ** (1 / 2.2)) for c in color))
            if "baseColorTexture" in look:
                source = self.d["textures"][look["baseColorTexture"]["index"]]["source"]
                image = Image.open(io.BytesIO(self.views[self.d["images"][source]["bufferView"]]))
            v, f = self.access(at["POSITION"]) @ m[:3, :3].T + m[:3, 3], self.access(p["indices"]).reshape(-1, 3)
            out += [(v, smooth_normals(v, f), self.access(at["TEXCOORD_0"]), f, image)] if opacity > .2 else []
        return out + [part for i in node.get("children", ()) for part in self.parts(self.d["nodes"][i], m)]

def thin(v, n, uv, f, cell):
    """A coarser mesh: vertices of one cell with like normals and texture coordinates become one."""
    key = np.hstack([np.round(v / cell), np.round(n * .7), np.round(uv * 10)]).astype(int)
    _, new, count = np.unique(key, axis=0, return_inverse=True, return_counts=True)
    v, n, uv = (np.stack([np.bincount(new.ravel(), c) for c in x.T], 1) / count[:, None] for x in (v, n, uv))
    n, f = n / (np.linalg.norm(n, axis=1, keepdims=True) + 1e-12), new.ravel()[f]
    return v, n, uv, np.unique(f[(f != np.roll(f, 1, 1)).all(1)], axis=0)

def load_object(o):
    """Object o: its meshes and textures, centred and in its size, and what Video wants to know of it."""
    parts, thing = [], OBJECTS[o - 1]
    for path, *look in thing["parts"]:
        if path.endswith("glb"):
            parts += (g := Glb(path)).parts({"children": g.d["scenes"][0]["nodes"]}, np.eye(4))
        else:
            (v, *rest), (texture, scale) = read_obj(path), look
            image = Image.new("RGB", (4, 4), texture) if "#" in texture else Image.open(asset(texture))
            parts += [(v * scale, *rest, image)]
    v = np.concatenate([part[0] for part in parts])
    middle, scale = (v.min(0) + v.max(0)) / 2, thing["side"] / np.ptp(v, 0).max()
    parts = [(*thin((v - middle) * scale, *mesh, thing["side"] / 44), image.convert("RGB")) for v, *mesh, image in parts]
    parts = [(*mesh, im.resize(np.minimum(im.size, 512), Image.BOX)) for *mesh, im in parts if len(mesh[3])]
    rng, t = np.random.default_rng(o), np.concatenate([v[f] for v, _, _, f, _ in parts])       # triangles
    area = np.linalg.norm(np.cross(t[:, 1] - t[:, 0], t[:, 2] - t[:, 0]), axis=1)
    points = t[rng.choice(len(t), 2500, p=area / area.sum())] * rng.dirichlet((1, 1, 1), 2500)[..., None]
    extent = np.ptp(t, axis=(0, 1))
    up = np.eye(3)[extent.argmax() if thing["axis"] is None else thing["axis"]]
    return {**thing, "parts": parts, "points": points.sum(1), "extent": extent, "up": up}

class Hand:
    """The rigged right hand of the WebXR profiles, in its wrist's frame."""
    def __init__(self):
        g = Glb("@webxr-input-profiles/assets/dist/profiles/generic-hand/right.glb")
        skin, primitive = g.d["skins"][0], g.d["meshes"][0]["primitives"][0]
        nodes, at = [g.d["nodes"][i] for i in skin["joints"]], primitive["attributes"]         # the wrist comes first
        self.rest = {node["name"]: np.linalg.inv(g.matrix(nodes[0])) @ g.matrix(node) for node in nodes}
        self.v, self.joints, self.weights = (g.access(at[name]) for name in ("POSITION", "JOINTS_0", "WEIGHTS_0"))
        self.f, inverse = g.access(primitive["indices"]).reshape(-1, 3), g.access(skin["inverseBindMatrices"])
        self.inverse = inverse.reshape(-1, 4, 4).transpose(0, 2, 1)

    def grip(self, points, rng):
        """The hand closed around an object, given by points on its surface: vertices, normals."""
        from scipy.spatial import cKDTree
        tree, poses, still = cKDTree(points), [np.eye(4)], (0, 0, 0)
        for finger in ("thumb", "index", "middle", "ring", "pinky"):
            spread, mix, twist, rest = (rng.uniform(*x) for x in ((-.12, .12), (.7, 1.3, 3), (.2, .6), (.35, .8)))
            joints, best = [joint for name, joint in self.rest.items() if name.startswith(finger)], None
            for s in np.linspace(0, 1, 18):                     # (flexion, sideways, twist) of each joint
                a, b, c = mix * s * ((.5, .55, .75) if finger == "thumb" else (1.25, 1.5, .9))
                bent, p = [(a, -.35 + .9 * s, -twist)] if finger == "thumb" else [still, (a, spread, 0)], [np.eye(4)]
                for (a, d, e), joint, last in zip([*bent, (b, 0, 0), (c, 0, 0), still], joints, [p[0], *joints]):
                    turn = turned(Z * e) @ turned(Y * d) @ turned(-X * a)
                    p.append(p[-1] @ np.linalg.inv(last) @ joint @ pose(turn, 0 * X))
                ends = np.stack(p)[2:, :3, 3]
                near = tree.query([x + k * (y - x) for x, y in zip(ends, ends[1:]) for k in (.25, .5, .75, 1)])[0].min()
                best = p[1:] if s <= rest or near < .03 else best
                if near < .0095:
                    break
            poses += best
        m, v = np.stack(poses) @ self.inverse, np.c_[self.v, np.ones(len(self.v))]
        v = sum(self.weights[:, k, None] * np.einsum("vij,vj->vi", m[self.joints[:, k]], v)[:, :3] for k in range(4))
        return v, smooth_normals(v, self.f)

def arm(sleeve):
    """A forearm: vertices, normals, faces; from the wrist to +z."""
    a, z = np.meshgrid(np.arange(20) * np.pi / 10, np.linspace(-.012, .28, 8))
    r = np.interp(z, (-.012, .03, .12, .28), (.9, .93, 1.2, 1.5)) * (1.18 if sleeve else 1)
    v = np.stack([.029 * r * np.cos(a), .021 * r * np.sin(a) - .002, z + .03 * sleeve], 2).reshape(-1, 3)
    i, j = np.arange(160).reshape(8, 20), np.roll(np.arange(160).reshape(8, 20), -1, 1)
    f = np.stack([i[:-1], i[1:], j[1:], i[:-1], j[1:], j[:-1]], 2).reshape(-1, 3)
    return v, smooth_normals(v, f), f

def wave(rng, n, low=.4, high=2.2):
    """A smooth random function of time with n values, about -1.5 to 1.5."""
    f, p = rng.uniform(low, high, (4, n)) * 2 * np.pi, rng.uniform(0, 2 * np.pi, (4, n))
    return lambda t: np.sin(f * t + p).sum(0) / 2

class Video:
    """Object o in session s. thing: points (n, 3) on its surface, extent (3,), up (3,), and whether it is held upright."""
    def __init__(self, seed, s, o, thing, hand):
        self.session, self.thing, self.rng = SESSIONS[s - 1], thing, np.random.default_rng((seed, s, o))
        rng, self.mirror = self.rng, np.diag([-1 if self.session["left"] else 1, 1, 1])
        self.turn, self.shift, self.pan, self.light = (wave(rng, *a) for a in ((3,), (3,), (4, .3, 1.5), (2, .3, 1.2)))
        self.amplitude = np.array((.30, .45, .30)) * rng.uniform(.8, 1.3)
        arm, tilt, palm = rng.normal(self.session["arm"], 14), rng.uniform(5, 45), rng.normal(self.session["turn"], 22)
        fingers = turned(Z * np.radians(arm)) @ turned(-Y * np.radians(tilt)) @ -X
        turn = turned(fingers * np.radians(palm) * self.mirror[0, 0])                          # the thumb comes to the front
        back = turn @ (fingers * fingers[2] - Z) / np.sqrt(1 - fingers[2] ** 2)
        self.base = np.stack([np.cross(back, -fingers), back, -fingers], 1)             # columns: x, y, z of the hand
        self.center, self.zoom, n = rng.normal(0, (.014, .012), 2), rng.uniform(1.08, 1.42), rng.integers(3, 6)
        self.cuts, self.spin = np.sort(rng.uniform(0, 1, n - 1)), rng.uniform(0, 2 * np.pi)
        self.grips = [self.grip(hand) for _ in range(n)]
        self.cloth, self.pan_at = rng.uniform(.02, .25, 3), rng.uniform(-.16, .16, 2)
        self.gamma, self.saturation, self.white = rng.normal(1, .04), rng.normal(1, .06), rng.normal(1, .015, 3)

    def grip(self, hand):
        """The next grip, mostly upright, not end-on: rotation and shift of the object, vertices and normals of the hand."""
        rng, thing, F, long = self.rng, self.thing, self.mirror, np.sort(self.thing["extent"])[1:] @ (-1.3, 1) > 0
        axes, across = np.eye(3)[np.argsort(-thing["extent"])], True                    # long, middle, short become x, y, z
        axes[2] *= np.linalg.det(axes)
        self.spin += rng.uniform(.8, 2.2) * rng.choice((-1, 1), p=(.25, .75))
        for _ in range(40):
            if long:                                            # across the fingers or along them, else any way round
                across = rng.random() < .55
                y = (0 if across else np.pi / 2) + rng.normal(0, .3) + np.pi * rng.integers(0, 2)
                r = turned(Z * rng.normal(0, .25)) @ turned(Y * y) @ turned(X * self.spin) @ axes
            else:
                r = quaternion(np.random.RandomState(rng.integers(2**31)).normal(size=4))
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
        key = turned(X * .12 * light[1]) @ turned(Y * .25 * light[0]) @ self.session["key"]
        r = self.base @ turned(self.turn(t) * self.amplitude)
        center = np.array((*self.center + move[:2] * .010, -.60 / self.zoom * (1 + .09 * move[2])))
        wrist = center - r @ (.75 * shift + np.array((0, -.02, -.09)) * .25)            # in the middle: mostly the object
        return pose(r, wrist), pose(r @ rotation, wrist + r @ shift), center, key / np.linalg.norm(key)
