"""Draws the frames of a video with OpenGL: background, object, hand and forearm, shadows, and what a camera does to them."""
import moderngl
import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, map_coordinates

from benchmarks.standin.meshes import Hand, arm, asset, load_object
from benchmarks.standin.placement import HERE, SESSIONS, Video

SIZE = 192                                                      # pixels drawn, 1.5 for one of the frame's
AREA = np.array([[1, .5, 0], [0, .5, 1]], "f4") / 1.5           # of three drawn pixels in two of the frame's
BRICKS = "robosuite/models/assets/textures/white-bricks.png"


def blur(x, sigma):
    """Each channel of x (n, n, channels) blurred."""
    return gaussian_filter(x, (sigma, sigma, 0))


def fractal(n, rng, sigmas, stretch=(1, 1)):
    """Noise (n, n, 1) with as much of each size, mean 0 and variance 1."""
    x = sum(gaussian_filter(rng.standard_normal((n, n)), (s * stretch[0], s * stretch[1]), mode="wrap") * s for s in sigmas)
    return ((x - x.mean()) / x.std())[..., None]


def tiles(path, n, scale, upended=False):
    """A texture (n, n, 3) repeated over n x n pixels."""
    im, s = Image.open(asset(path)).convert("RGB"), int(n * scale)
    im = im.rotate(90, expand=True) if upended else im
    x = np.asarray(im.resize((s, s * im.height // im.width), Image.LANCZOS), float) / 255
    return np.tile(x, (-(-n // len(x)), -(-n // s), 1))[:n, :n]


def floor(texture, pitch, yaw, height):
    """A texture (n, n, 3) as a floor seen from above; pitch and yaw in degrees."""
    n, p, q = len(texture), np.radians(pitch), np.radians(yaw)
    y, x = np.mgrid[1:-1:n * 1j, -1:1:n * 1j] * np.tan(np.radians(32))
    down, ahead = np.sin(p) - y * np.cos(p), np.cos(p) + y * np.sin(p)
    x, y = (height * n / 2 * a / np.where(down > .04, down, 1) for a in (x, ahead))
    at = [(x * np.sin(q) + y * np.cos(q)) % n, (x * np.cos(q) - y * np.sin(q)) % n]
    return np.stack([map_coordinates(c, at, order=1, mode="grid-wrap") for c in np.moveaxis(blur(texture, .8), 2, 0)], -1)


def background(s, rng, n=640):
    """The background of session s, uint8 (n, n, 3): a texture or noise, perhaps as a floor, and shapes on it."""
    S, (row, column) = SESSIONS[s], np.mgrid[0:n, 0:n, 0:1][:2] / n
    noise = lambda *sigmas: fractal(n, rng, sigmas)
    over = lambda x, other, level, rough, size, soft: x + (other - x) * blur((row < level + rough * noise(size)).astype(float), soft)
    if s == 4:      # grass and a hedge
        x = (.42, .54, .30) + fractal(n, rng, (.8, 2, 7), (2.2, .7)) * .09 * (1, 1.1, .8) + noise(40) * .03
        x = over(x, (.10, .14, .07) + noise(2, 6) * .05, .17, .02, 20, 3)
    elif s == 6:    # a carpet
        d = sum(np.abs(a % 1 - .5) for a in (row * 9 + column * 9, row * 9 - column * 9))
        x = np.where(d > .62, (.30, .12, .12), np.where(d < .25, (.62, .52, .42), (.58, .22, .20))) + noise(1, 2) * .05
    else:
        x = tiles(S["texture"], n, S["repeat"], s == 1) * S["tint"]
    x = floor(x, *S["floor"]) if "floor" in S else x * (.82 + .36 * column) if s == 8 else x
    if s == 10:     # leaves
        x = over(x, (.22, .32, .12) + noise(2, 5, 12) * .14 * (1, 1, .6), .36, .05, 25, 2)
    elif s == 11:   # a wall
        x = np.where(row < .4, tiles(BRICKS, n, .35) * (.86, .70, .55), x)
    for shape in S["shapes"]:
        light = shape.get("light")              # outside, what is added inside, blur in pixels; or a colour
        im = Image.new("L", (n, n)) if light else Image.fromarray((x.clip(0, 1) * 255 + 1e-6).astype("u1"))
        ImageDraw.Draw(im).polygon([n * a for a in shape["points"]], fill=shape.get("colour", 255))
        im = np.asarray(im, float) / 255
        x = x * (light[0] + light[1] * blur(im[..., None], light[2])) if light else im
    x = blur(x, 2.5) if s == 6 else x + noise(1.5, 4) * .025 if s == 11 else x
    x = blur(x, 2.2).clip(0, 1)
    x = x.mean((0, 1)) * .25 + x * .75          # real ones have less contrast and less colour
    return ((x.mean(2, keepdims=True) * .15 + x * .85) * 255).astype("u1")


def camera(x, video, rng):
    """A frame, uint8 (128, 128, 3), of a picture in 0..1: less sharp, with a camera's colours and noise."""
    x = np.einsum("ia,jb,yaxbc->yixjc", AREA, AREA, x.reshape(64, 3, 64, 3, 3), optimize=True).reshape(128, 128, 3)
    x = blur(x, video.session["blur"])
    grey = x.mean(2, keepdims=True)
    x = ((grey + (x - grey) * video.saturation) * video.white).clip(0, 1) ** video.gamma
    noise = rng.standard_normal(x.shape, "f4") * .8 + rng.standard_normal((128, 128, 1), "f4") * .6
    return (x * 255 + blur(noise, .5) * 1.08 * video.session["noise"] * (1 - .5 * grey)).clip(0, 255).astype("u1")


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
        self.picture = gl.framebuffer([gl.texture((SIZE, SIZE), 4)], gl.depth_renderbuffer((SIZE, SIZE)))
        self.depth = gl.depth_texture((256, 256))
        self.depth.compare_func, self.depth.repeat_x, self.depth.repeat_y = "", False, False
        self.shadow = gl.framebuffer(depth_attachment=self.depth)
        self.lit, self.dark, self.flat = (gl.program(*((HERE / f"shaders/{name}.{kind}").read_text() for kind in ("vert", "frag")))
                                          for name in ("scene", "shadow", "background"))
        self.lit["shade"] = 1
        self.quad = gl.vertex_array(self.flat, gl.buffer(np.array([-1, -1, 1, -1, -1, 1, 1, 1], "f4")), "p")
        self.mottle = self.texture((fractal(256, np.random.default_rng(5), (2, 5, 14)) * 14 + 200).clip(60, 255).repeat(3, 2))
        self.white = self.texture(np.full((4, 4, 3), 255))

    def texture(self, image):
        """An image (height, width, 3) as OpenGL wants it."""
        x = np.asarray(image).astype("u1")
        texture = self.gl.texture(x.shape[1::-1], 3, x.tobytes(), alignment=1)
        texture.build_mipmaps()
        texture.filter = moderngl.LINEAR_MIPMAP_LINEAR, moderngl.LINEAR
        return texture

    def mesh(self, v, n, uv, f):
        """A mesh, to be drawn lit and as a shadow."""
        b, i = self.gl.buffer(np.hstack([v, n, uv]).astype("f4")), self.gl.buffer(f.astype("i4"))
        return (self.gl.vertex_array(self.lit, [(b, "3f 3f 2f", "p", "n", "t")], i),
                self.gl.vertex_array(self.dark, [(b, "3f 20x", "p")], i))

    def frames(self, s, o, numbers):
        """Yields frames of object o in session s, uint8 (128, 128, 3); numbers: 0 to 299 within the video."""
        if s not in self.scenes:
            rng = np.random.default_rng((self.seed, s, 77))
            self.scenes[s] = self.texture(background(s, rng)), rng.uniform((.74, .50, .40), (.84, .60, .50)) ** 2.2
        if self.object["object"] != o:
            self.object = load_object(o)
            look = {"tint": (1, 1, 1), "rough": self.object["roughness"], "skin": 0}
            self.object["models"] = [(self.mesh(*mesh), self.texture(image), look) for *mesh, image in self.object["parts"]]
        video, (behind, tint) = Video(self.seed, s, o, self.object, self.hand), self.scenes[s]
        bare, sleeve, F = (self.mottle, {"tint": tint, "rough": .55, "skin": 1}), video.session["sleeve"], video.mirror
        limb = lambda v, n, f: self.mesh(v @ F, n @ F, v[:, [0, 2]] * 7 + v[:, 1:2] * 3, f)
        forearm = limb(*arm(sleeve)), *((self.white, {"tint": video.cloth, "rough": .8, "skin": 0}) if sleeve else bare)
        limbs = [[(limb(v, n, self.hand.f), *bare), forearm] for *_, v, n in video.grips]
        for number in numbers:
            grip, t = np.searchsorted(video.cuts, number / 300), number / 300
            pictures = [self.draw(video, t + dt, grip, behind, limbs[grip], dt == 0) for dt in (0, .0035)]
            yield camera(sum(pictures) / 510, video, np.random.default_rng((self.seed, s, o, number)))

    def draw(self, video, t, grip, behind, limbs, shadows):
        """The picture at time t, float32 (SIZE, SIZE, 3) in 0..255."""
        S, (hand, thing, center, key), light = video.session, video.at(t, grip), video.light(t)
        models = [*((thing, *model) for model in self.object["models"]), *((hand, *limb) for limb in limbs)]
        if shadows:
            self.shadow.use()
            self.shadow.clear(depth=1.)
            put(self.dark, key=key, center=center)
            for place, (_, mesh), *_ in models:
                put(self.dark, M=place)
                mesh.render()
        self.picture.use()
        self.picture.clear(0, 0, 0, 1)
        put(self.flat, pan=video.pan(t), at=video.pan_at, tilt=S["tilt"], gain=1 + .05 * light[0])
        behind.use(0)
        self.quad.render(moderngl.TRIANGLE_STRIP)
        self.depth.use(1)
        put(self.lit, key=key, center=center, exposure=S["exposure"], window=S["window"],
            **{name: (1 + .08 * light[1]) * np.array(S[name]) for name in ("sun", "sky", "ground")})
        for place, (mesh, _), texture, look in models:
            texture.use(0)
            put(self.lit, M=place, **look)
            mesh.render()
        return np.frombuffer(self.picture.color_attachments[0].read(), "u1").reshape(SIZE, SIZE, 4)[::-1, :, :3].astype("f4")
