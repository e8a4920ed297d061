"""The objects of objects.json and a hand that closes around them, read from the packages that carry them; in metres."""
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

from benchmarks.standin.placement import HERE, OBJECTS, pose, quaternion, turned


def asset(path):
    """A file of an installed package, pip's or npm's."""
    found = [file for root in (HERE / "node_modules", *sys.path) if (file := Path(root, path)).is_file()]
    if not found:
        raise SystemExit(f"error: {path} is missing: install the packages as {HERE / 'README.md'} says")
    return found[0]


def smooth_normals(v, f):
    """Normals of vertices, each the mean of the faces around it; vertices at one place share theirs."""
    _, place = np.unique(np.round(v / (np.ptp(v, 0).max() * 1e-5)), axis=0, return_inverse=True)
    place, n = place.ravel(), np.zeros((len(v), 3))
    for corner in f.T:
        np.add.at(n, place[corner], np.cross(v[f[:, 1]] - v[f[:, 0]], v[f[:, 2]] - v[f[:, 0]]))
    return n[place] / (np.linalg.norm(n[place], axis=1, keepdims=True) + 1e-12)


class Glb:
    """As much of a binary glTF 2.0 file as the models need."""

    def __init__(self, path):
        b = asset(path).read_bytes()
        n = int.from_bytes(b[12:16], "little")
        self.d, self.data = json.loads(b[20:20 + n]), b[28 + n:]

    def view(self, i):
        """Bytes of a buffer view."""
        view = self.d["bufferViews"][i]
        return self.data[view.get("byteOffset", 0):][:view["byteLength"]]

    def access(self, i):
        """An accessor's numbers, one row for each of its items."""
        a = self.d["accessors"][i]
        k, kind = {"SCALAR": 1, "MAT4": 16}.get(a["type"]) or int(a["type"][3]), a["componentType"]
        x = np.frombuffer(self.view(a["bufferView"])[a.get("byteOffset", 0):], {5121: "u1", 5123: "<u2", 5126: "<f4"}[kind], a["count"] * k)
        return x.reshape(-1, k).astype(float if kind == 5126 else int)

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
            color = tuple(int(255 * c ** (1 / 2.2)) for c in look.get("baseColorFactor", (1, 1, 1))[:3])
            image = Image.new("RGB", (4, 4), color)
            if "baseColorTexture" in look:
                source = self.d["textures"][look["baseColorTexture"]["index"]]["source"]
                image = Image.open(io.BytesIO(self.view(self.d["images"][source]["bufferView"])))
            v, f = self.access(at["POSITION"]) @ m[:3, :3].T + m[:3, 3], self.access(p["indices"]).reshape(-1, 3)
            out.append((v, smooth_normals(v, f), self.access(at["TEXCOORD_0"]), f, image))
        return out + [part for i in node.get("children", ()) for part in self.parts(self.d["nodes"][i], m)]


def read_obj(path):
    """(vertices, normals, texture coordinates, faces) of a Wavefront file."""
    lines = [line.split() for line in asset(path).read_text("utf8", "ignore").splitlines() if line.strip()]
    v, t, n = (np.array([w[1:1 + k] for w in lines if w[0] == kind], "f4") for kind, k in (("v", 3), ("vt", 2), ("vn", 3)))
    fans = [(w[1], *w[k:k + 2]) for w in lines if w[0] == "f" for k in range(2, len(w) - 1)]
    corners, f = np.unique([corner.split("/") for fan in fans for corner in fan], axis=0, return_inverse=True)
    i, j, k = corners.astype(int).T - 1
    return v[i], n[k], t[j] * (1, -1) + (0, 1), f.reshape(-1, 3)


def thin(v, n, uv, f, cell):
    """A coarser mesh: vertices of one cell with like normals and texture coordinates become one."""
    key = np.hstack([np.round(v / cell), np.round(n * .7), np.round(uv * 10)]).astype(int)
    _, new, count = np.unique(key, axis=0, return_inverse=True, return_counts=True)
    v, n, uv = (np.stack([np.bincount(new.ravel(), c) for c in x.T], 1) / count[:, None] for x in (v, n, uv))
    f = new.ravel()[f]
    n = n / (np.linalg.norm(n, axis=1, keepdims=True) + 1e-12)
    return v, n, uv, np.unique(f[(f != np.roll(f, 1, 1)).all(1)], axis=0)


def load_object(o):
    """Object o: its meshes and textures, centred and in its size, and what Video wants to know of it."""
    parts, thing = [], OBJECTS[o]
    for path, *look in thing["parts"]:
        if not look:
            g = Glb(path)
            parts += g.parts({"children": g.d["scenes"][0]["nodes"]}, np.eye(4))
        else:
            (v, *rest), (texture, scale) = read_obj(path), look
            image = Image.new("RGB", (4, 4), texture) if texture[0] == "#" else Image.open(asset(texture))
            parts.append((v * scale, *rest, image))
    v = np.concatenate([part[0] for part in parts])
    middle, scale = (v.min(0) + v.max(0)) / 2, thing["side"] / np.ptp(v, 0).max()
    parts = [(*thin((v - middle) * scale, *mesh, thing["side"] / 44), image.convert("RGB")) for v, *mesh, image in parts]
    parts = [(*mesh, im.resize((512, 512), Image.BOX) if max(im.size) > 512 else im) for *mesh, im in parts if len(mesh[3])]
    rng, t = np.random.default_rng(o), np.concatenate([v[f] for v, _, _, f, _ in parts])       # triangles
    area = np.linalg.norm(np.cross(t[:, 1] - t[:, 0], t[:, 2] - t[:, 0]), axis=1)
    points = t[rng.choice(len(t), 2500, p=area / area.sum())] * rng.dirichlet((1, 1, 1), 2500)[..., None]
    extent = np.ptp(np.concatenate([part[0] for part in parts]), axis=0)
    up = np.eye(3)[extent.argmax() if thing["axis"] is None else thing["axis"]]
    return {**thing, "parts": parts, "points": points.sum(1), "extent": extent, "up": up}


class Hand:
    """The rigged right hand of the WebXR profiles, in its wrist's frame: fingers to -z, back of the hand to +y."""

    def __init__(self):
        g = Glb("@webxr-input-profiles/assets/dist/profiles/generic-hand/right.glb")
        skin, primitive = g.d["skins"][0], g.d["meshes"][0]["primitives"][0]
        nodes, at = [g.d["nodes"][i] for i in skin["joints"]], primitive["attributes"]         # the wrist comes first
        self.rest = {node["name"]: np.linalg.inv(g.matrix(nodes[0])) @ g.matrix(node) for node in nodes}
        self.v, self.f = g.access(at["POSITION"]), g.access(primitive["indices"]).reshape(-1, 3)
        self.joints, self.weights = g.access(at["JOINTS_0"]), g.access(at["WEIGHTS_0"])
        self.inverse = g.access(skin["inverseBindMatrices"]).reshape(-1, 4, 4).transpose(0, 2, 1)

    def bent(self, finger, angles):
        """Poses of a finger's joints (4 or 5, 4, 4); angles: (flexion, sideways, twist) of each, radians."""
        poses, rest = [np.eye(4)], np.eye(4)
        for (flexion, sideways, twist), joint in zip(angles, (x for name, x in self.rest.items() if name.startswith(finger))):
            poses.append(poses[-1] @ np.linalg.inv(rest) @ joint @ pose(turned((0, 0, twist), (0, sideways, 0), (-flexion, 0, 0))))
            rest = joint
        return np.stack(poses[1:])

    def grip(self, points, rng):
        """The hand closed around an object, given by points on its surface: vertices, normals."""
        tree, poses, still = cKDTree(points), [np.eye(4)[None]], (0, 0, 0)
        for finger in ("thumb", "index", "middle", "ring", "pinky"):
            spread, mix, twist, rest = (rng.uniform(*x) for x in ((-.12, .12), (.7, 1.3, 3), (.2, .6), (.35, .8)))
            for s in np.linspace(0, 1, 18):
                a, b, c = mix * s * ((.5, .55, .75) if finger == "thumb" else (1.25, 1.5, .9))
                first = [(a, -.35 + .9 * s, -twist)] if finger == "thumb" else [still, (a, spread, 0)]
                p = self.bent(finger, [*first, (b, 0, 0), (c, 0, 0), still])
                bones = p[1:, :3, 3]
                near = tree.query(np.concatenate([bones[:-1] + k * np.diff(bones, axis=0) for k in (.25, .5, .75, 1)]))[0].min()
                if s <= rest or near < .03:
                    best = p
                if near < .0095:
                    break
            poses.append(best)
        m, v = np.concatenate(poses) @ self.inverse, np.c_[self.v, np.ones(len(self.v))]
        v = sum(self.weights[:, k, None] * np.einsum("vij,vj->vi", m[self.joints[:, k]], v)[:, :3] for k in range(4))
        return v, smooth_normals(v, self.f)


def arm(sleeve):
    """A forearm: vertices, normals, faces; from the wrist to +z."""
    a, z = np.meshgrid(np.arange(20) * np.pi / 10, np.linspace(-.012, .28, 8))
    r = np.interp(z, (-.012, .03, .12, .28), (.9, .93, 1.2, 1.5)) * (1.18 if sleeve else 1)
    v = np.stack([.029 * r * np.cos(a), .021 * r * np.sin(a) - .002, z + .03 * sleeve], 2).reshape(-1, 3)
    i = np.arange(160).reshape(8, 20)
    j = np.roll(i, -1, 1)
    f = np.stack([i[:-1], i[1:], j[1:], i[:-1], j[1:], j[:-1]], 2).reshape(-1, 3)
    return v, smooth_normals(v, f), f
