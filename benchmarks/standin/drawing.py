"""Draws the frames of a video with OpenGL: background, object, hand and forearm, shadows, and what a camera does to them."""
import moderngl
import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, map_coordinates

from benchmarks.standin.scene import HERE, SESSIONS, Hand, Video, arm, asset, load_object

AREA = np.array([[1, .5, 0], [0, .5, 1]], "f4") / 1.5       # of three pixels drawn, of 192, in two of the frame's, of 128
blur = lambda x, sigma: gaussian_filter(x, (sigma, sigma, 0))

def fractal(n, rng, sigmas, stretch=(1, 1)):
    """Noise (n, n, 1) with as much of each size, mean 0 and variance 1."""
    x = sum(gaussian_filter(rng.standard_normal((n, n)), np.multiply(s, stretch), mode="wrap") * s for s in sigmas)
    return ((x - x.mean()) / x.std())[..., None]

def painted(x, layers, rng):
    """x (n, n, 3), values 0 to 1, with layers of sessions.json on it; README.md says what each does."""
    n, row, column = len(x), np.arange(len(x))[:, None, None] / len(x), np.arange(len(x))[:, None] / len(x)
    for kind, *a in layers:
        if kind == "fill":
            x = 0 * x + a[0]
        elif kind == "times":
            x = x * (np.array(a[0]) + a[1] * column)
        elif kind == "noise":
            x = x.clip(0, 1) + fractal(n, rng, *a[:2]) * a[2]
        elif kind == "carpet":
            d = sum(np.abs(z % 1 - .5) for z in (row * 9 + column * 9, row * 9 - column * 9))
            x = np.where(d > .62, a[0], np.where(d < .25, a[2], a[1]))
        elif kind == "tiles":
            im, s = Image.open(asset(a[0])).convert("RGB").rotate(90 * a[2], expand=True), int(n * a[1])
            tile = np.asarray(im.resize((s, s * im.height // im.width), Image.LANCZOS), float) / 255
            x = np.tile(tile, (-(-n // len(tile)), -(-n // s), 1))[:n, :n]
        elif kind == "floor":
            (p, q), (v, u) = np.radians(a[:2]), np.mgrid[1:-1:n * 1j, -1:1:n * 1j] * np.tan(np.radians(32))
            down = np.sin(p) - v * np.cos(p)
            u, v = (a[2] * n / 2 * z / np.where(down > .04, down, 1) for z in (u, np.cos(p) + v * np.sin(p)))
            at = [(u * np.sin(q) + v * np.cos(q)) % n, (u * np.cos(q) - v * np.sin(q)) % n]
            x = np.stack([map_coordinates(c, at, order=1, mode="grid-wrap") for c in np.moveaxis(blur(x, .8), 2, 0)], 2)
        else:
            over, image = painted(x, a[0], rng), Image.new("1", (n, n))
            kind == "polygon" and ImageDraw.Draw(image).polygon([n * z for z in a[2]], fill=1)
            mask = np.asarray(image)[..., None] if kind == "polygon" else row < a[2] + a[3] * fractal(n, rng, a[4:])
            x = x + (over - x) * blur(mask.astype(float), a[1])
    return x

def put(program, **values):
    """Sets a program's variables: numbers, vectors and matrices."""
    for name, x in values.items():
        program[name].write(np.asarray(x, "f4").T.tobytes())

class Renderer:
    """What is drawn again and again. One object is kept at a time: videos should come object by object."""
    def __init__(self, seed):
        self.seed, self.hand, self.scenes, self.object = seed, Hand(), {}, {"object": None}
        self.gl = gl = moderngl.create_context(standalone=True, backend="egl")
        gl.gc_mode = "auto"
        gl.enable(moderngl.DEPTH_TEST)
        self.picture = gl.framebuffer([gl.texture((192, 192), 4)], gl.depth_renderbuffer((192, 192)))
        self.depth = gl.depth_texture((256, 256))
        self.depth.compare_func, self.depth.repeat_x, self.depth.repeat_y = "", False, False
        self.shadow = gl.framebuffer(depth_attachment=self.depth)
        self.lit, self.flat = (gl.program(*((HERE / f"shaders/{name}.{kind}").read_text() for kind in ("vert", "frag")))
                               for name in ("scene", "background"))
        self.quad = gl.vertex_array(self.flat, gl.buffer(np.array([-1, -1, 1, -1, -1, 1, 1, 1], "f4")), "p")
        mottle = fractal(256, np.random.default_rng(5), (2, 5, 14)) * 14 + 200
        self.mottle, self.white = self.texture(mottle.clip(60, 255).repeat(3, 2)), self.texture(np.full((4, 4, 3), 255))

    def texture(self, image):
        """An image (height, width, 3) as OpenGL wants it."""
        x = np.asarray(image).astype("u1")
        texture = self.gl.texture(x.shape[1::-1], 3, x.tobytes(), alignment=1)
        texture.build_mipmaps()
        return texture

    def mesh(self, v, n, uv, f):
        """A mesh as OpenGL wants it."""
        b, i = self.gl.buffer(np.hstack([v, n, uv]).astype("f4")), self.gl.buffer(f.astype("i4"))
        return self.gl.vertex_array(self.lit, [(b, "3f 3f 2f", "p", "n", "t")], i)

    def background(self, s):
        """The background of session s and the colour of its hand; real backgrounds have less contrast and less colour."""
        S, rng = SESSIONS[s - 1], np.random.default_rng((self.seed, s, 77))
        x = blur(painted(np.ones((640, 640, 3)), S["layers"], rng), S["soft"]).clip(0, 1)
        x = x.mean((0, 1)) * .25 + x * .75
        return self.texture(x.mean(2, keepdims=True) * 38.25 + x * 216.75), rng.uniform((.74, .5, .4), (.84, .6, .5)) ** 2.2

    def frames(self, s, o, numbers):
        """Yields frames of object o in session s, uint8 (128, 128, 3); numbers: 0 to 299 within the video."""
        behind, tint = self.scenes[s] = self.scenes.get(s) or self.background(s)
        if self.object["object"] != o:
            self.object = load_object(o)
            look = {"tint": (1, 1, 1), "rough": self.object["roughness"], "skin": 0}
            self.object["models"] = [(self.mesh(*mesh), self.texture(image), look) for *mesh, image in self.object["parts"]]
        video = Video(self.seed, s, o, self.object, self.hand)
        bare, sleeve, F = (self.mottle, {"tint": tint, "rough": .55, "skin": 1}), video.session["sleeve"], video.mirror
        limb = lambda v, n, f: self.mesh(v @ F, n @ F, v[:, [0, 2]] * 7 + v[:, 1:2] * 3, f)
        forearm = limb(*arm(sleeve)), *((self.white, {"tint": video.cloth, "rough": .8, "skin": 0}) if sleeve else bare)
        limbs = [[(limb(v, n, self.hand.f), *bare), forearm] for *_, v, n in video.grips]
        for number in numbers:
            grip, t = np.searchsorted(video.cuts, number / 300), number / 300
            x = sum(self.draw(video, t + dt, grip, behind, limbs[grip], dt == 0) for dt in (0, .0035)) / 510
            x = np.einsum("ia,jb,yaxbc->yixjc", AREA, AREA, x.reshape(64, 3, 64, 3, 3), optimize=True).reshape(128, 128, 3)
            x, rng = blur(x, video.session["blur"]), np.random.default_rng((self.seed, s, o, number))
            grey = x.mean(2, keepdims=True)
            x = ((grey + (x - grey) * video.saturation) * video.white).clip(0, 1) ** video.gamma
            noise = blur(rng.standard_normal(x.shape, "f4") * .8 + rng.standard_normal((128, 128, 1), "f4") * .6, .5)
            yield (x * 255 + noise * 1.08 * video.session["noise"] * (1 - .5 * grey)).clip(0, 255).astype("u1")

    def draw(self, video, t, grip, behind, limbs, shadows):
        """The picture at time t, float32 (192, 192, 3) in 0..255."""
        S, (hand, thing, center, key), light = video.session, video.at(t, grip), video.light(t)
        models = [*((thing, *model) for model in self.object["models"]), *((hand, *limb) for limb in limbs)]
        put(self.flat, pan=video.pan(t), at=video.pan_at, tilt=S["tilt"], gain=1 + .05 * light[0])
        put(self.lit, key=key, center=center, exposure=S["exposure"], window=S["window"],
            **{name: (1 + .08 * light[1]) * np.array(S[name]) for name in ("sun", "sky", "ground")})
        for dark in (1, 0) if shadows else (0,):
            (self.shadow if dark else self.picture).use()
            self.gl.clear()
            (self.white if dark else self.depth).use(1)
            behind.use(0)
            self.quad.render(moderngl.TRIANGLE_STRIP)
            for place, mesh, texture, look in models:
                texture.use(0)
                put(self.lit, M=place, dark=dark, **look)
                mesh.render()
        return np.frombuffer(self.picture.color_attachments[0].read(), "u1").reshape(192, 192, 4)[::-1, :, :3].astype("f4")
