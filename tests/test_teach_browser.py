"""The page of --teach in a real browser, before a camera that shows a film of the demo's objects."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from helpers import REPO, write_weights
from streams.demo import draw_unit

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
Keys = webdriver.Keys
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium: apt-get install chromium "
                                                                  "chromium-driver")
OBJECTS = {"ball": 0, "box": 2}     # the first is red, the second blue
WIDTH, HEIGHT = 320, 240
SECONDS = 3         # of each object, at 10 frames a second
COMMAND = [sys.executable, "ar1star_lat_replay.py", "--set", "width=0.25", "--port", "0", "--device", "cpu"]


def film(path):
    """Writes the camera's film: two objects in one place, and in turn, as uncompressed video (Y4M)."""
    with open(path, "wb") as file:
        file.write(f"YUV4MPEG2 W{WIDTH} H{HEIGHT} F10:1 Ip A1:1 C420jpeg\n".encode())
        for label in OBJECTS.values():
            for frame in draw_unit(0, 0, label, SECONDS * 10, 96):
                picture = Image.new("RGB", (WIDTH, HEIGHT))
                picture.paste(Image.fromarray(frame).resize((HEIGHT, HEIGHT)), ((WIDTH - HEIGHT) // 2, 0))
                y, cb, cr = (np.array(band) for band in picture.convert("YCbCr").split())
                file.write(b"FRAME\n" + y.tobytes() + cb[::2, ::2].tobytes() + cr[::2, ::2].tobytes())


class Page:
    """A server, and a browser that has its page open."""

    def __init__(self, folder, video, weights):
        self.folder = folder
        self.command = [*COMMAND, "--weights", str(weights), "--teach", str(folder)]
        self.process = None
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
                     f"--use-file-for-fake-video-capture={video}"):
            options.add_argument(flag)
        self.browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))

    def serve(self):
        """Starts the server; its address."""
        self.process = subprocess.Popen(self.command, cwd=REPO, stderr=subprocess.PIPE, text=True,
                                        env=os.environ | {"OMP_NUM_THREADS": "1"})
        line = self.process.stderr.readline()
        found = re.search(r"http://localhost:(\d+)", line)
        assert found, line + self.process.stderr.read()
        self.command[self.command.index("--port") + 1] = found[1]       # the page asks there again
        return found[0]

    def end(self, number):
        """Ends the server by a signal; what it said."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=30)[1]

    def text(self, name):
        return self.browser.execute_script(f"return document.getElementById('{name}').textContent")

    def until(self, condition, what):
        """Waits until condition() holds."""
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, f"{what}: {self.text('said')}; {self.text('seen')}"
            time.sleep(0.05)

    def colour(self):
        """Mean red minus mean blue of what the camera shows, in its middle."""
        return self.browser.execute_script(
            "const c = document.createElement('canvas'); c.width = c.height = 20;"
            "const x = c.getContext('2d'); const v = document.getElementById('video');"
            "x.drawImage(v, 120, 80, 80, 80, 0, 0, 20, 20); let sum = 0;"
            "const d = x.getImageData(0, 0, 20, 20).data;"
            "for (let k = 0; k < d.length; k += 4) sum += d[k] - d[k + 2]; return sum / 400")

    def shows(self, name):
        """Whether the camera shows an object."""
        return (self.colour() < 0) == (name == "box")

    def record(self, name):
        """Records an object by the keyboard alone; it comes into the film when the countdown ends."""
        self.until(lambda: self.shows(name), name)
        self.until(lambda: not self.shows(name), "the other object")
        time.sleep(SECONDS - 1.9)
        self.browser.find_element("id", "name").send_keys(name, Keys.ENTER)
        self.until(lambda: "frame 12 " in self.text("said"), "a recording")
        self.browser.switch_to.active_element.send_keys(Keys.SPACE)
        self.until(lambda: self.text("said").startswith(f"Learned {name} from"), f"{name} learned")

    def give(self, paths):
        """Gives files to the page."""
        self.browser.find_element("id", "files").send_keys("\n".join(map(str, paths)))

    def names(self):
        """What stands in the table of objects."""
        return self.browser.execute_script("return [...document.querySelectorAll('#rows .name')]"
                                           ".map(cell => cell.textContent)")


@pytest.fixture
def page(tmp_path):
    film(tmp_path / "film.y4m")
    page = Page(tmp_path / "taught", tmp_path / "film.y4m", write_weights(tmp_path / "weights.pth"))
    try:
        yield page
    finally:
        page.browser.quit()
        if page.process and page.process.poll() is None:
            page.process.kill()
            page.process.communicate()


@pytest.fixture
def pictures(tmp_path):
    """Picture files of a third object."""
    paths = [tmp_path / f"{k}.png" for k in range(6)]
    for path, frame in zip(paths, draw_unit(0, 0, 5, 6, 96)):
        Image.fromarray(frame).save(path)
    return paths


def test_two_objects_are_taught_and_known_again(page, pictures):
    page.browser.get(page.serve())
    page.until(lambda: page.text("said").startswith("Ready") and page.browser.execute_script("return camera"),
               "the page")
    page.browser.find_element("tag name", "body").send_keys(Keys.SPACE)
    page.until(lambda: "name of the object first" in page.text("said"), "a name asked for")

    for name in OBJECTS:
        page.record(name)
    assert page.names() == list(OBJECTS)
    for name in ("box", "ball"):
        page.until(lambda name=name: page.shows(name) and page.text("seen") == name, f"{name} named")
    assert not page.browser.get_log("browser")      # no error of the page's own

    # reloaded, and with a server that was killed and started again, it goes on
    page.browser.refresh()
    page.until(lambda: page.names() == list(OBJECTS), "reloaded")
    page.end(signal.SIGKILL)
    page.until(lambda: "server has gone" in page.text("said"), "the server's end told")
    page.serve()
    page.until(lambda: page.text("said") == "Ready." and page.text("seen") in OBJECTS, "going on")

    # a third one, of pictures, and undone
    page.browser.find_element("id", "name").send_keys("can")
    page.give(pictures)
    page.until(lambda: page.names() == ["ball", "box", "can"], "an object from files")
    page.browser.find_element("id", "undo").click()
    page.until(lambda: page.names() == ["ball", "box"], "one undone")
    assert [path.name for path in sorted(page.folder.glob("t[er][sa][ti]*/*"))] == ["ball", "box", "1", "2"]
    assert "goes on with 2 objects" in page.end(signal.SIGINT) and page.process.returncode == 0


# instead of the browser's own; %s is the name of an error
NO_CAMERA = "navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('', '%s'))"

# answers the next recording as the server does that has to refuse it
REFUSING = ("const [told, status] = arguments; const real = window.fetch; window.fetch = (path, asked) => {"
            "  if (path !== '/teach') return real(path, asked);"
            "  window.fetch = real;"
            "  return Promise.resolve(new Response(JSON.stringify({ error: told }), { status })); }")


def test_what_is_wrong_is_told_with_a_way_out(page, pictures):
    """No camera, a recording that is refused, a second page, no server; objects are taught from files."""
    browser = page.browser
    address = page.serve()
    for error, what in (("NotAllowedError", "allow it"), ("NotReadableError", "close that one"),
                        ("NotFoundError", "plug one in")):
        script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument",
                                         {"source": NO_CAMERA % error})
        browser.get(address)
        page.until(lambda what=what: what in page.text("why") and "use files" in page.text("why"), error)
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
    page.until(lambda: page.text("said").startswith("Ready"), "the page")
    browser.find_element("id", "name").send_keys("can", Keys.ENTER)
    page.until(lambda: "camera gives no picture" in page.text("said"), "no recording without a camera")

    for told, status in (("it learns: wait a moment", 503), ("the disk is full: make room", 507)):
        browser.execute_script(REFUSING, told, status)
        page.give(pictures)
        page.until(lambda told=told: told[1:] in page.text("said"), told)
    assert page.names() == []
    field = browser.find_element("id", "name")
    field.send_keys("/can")
    page.give(pictures)
    assert browser.execute_script("return document.activeElement.matches('#name:invalid')")
    field.clear()
    field.send_keys("can")
    page.give(pictures)
    page.until(lambda: page.names() == ["can"], "an object from files")
    page.until(lambda: page.text("said").startswith("Learned can from 6 frames in"), "it told")
    field.send_keys("CAN")
    page.give(pictures)
    page.until(lambda: page.text("said").startswith("Added 6 frames to can in"), "more of it told")
    assert "--predict" in browser.find_element("id", "blind").text     # where nothing can be shown to it

    # a second page, with a camera, follows the first, and the first the second
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(address)
    page.until(lambda: page.text("seen") in ("can", "unknown"), "the second page sees")
    browser.find_element("id", "name").send_keys("cup")
    page.give(pictures)
    page.until(lambda: page.names() == ["can", "cup"], "the second page teaches")
    browser.close()
    browser.switch_to.window(first)
    page.until(lambda: page.names() == ["can", "cup"], "the first page follows")

    page.end(signal.SIGKILL)
    page.until(lambda: "start the same command again" in page.text("said"), "the server's end told")
    browser.execute_script("delete navigator.mediaDevices.getUserMedia")
    browser.find_element("id", "again").click()
    page.until(lambda: browser.execute_script("return camera"), "a camera after all")
