"""report.html in a browser without a network: a screenshot shows all of it, in a wide and in a narrow window."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest
from PIL import Image

from fastkd import Trainer, TrainOptions
from fastkd.methods import KD

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.libraries, pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")]
OFFLINE = ["--proxy-server=127.0.0.1:1", "--host-resolver-rules=MAP * ~NOTFOUND"]
NARROWEST = 500  # pixels of a window; narrower pages are in a frame
FRAME = """<!DOCTYPE html>
<body style="margin: 0"><iframe style="border: 0; width: WIDTHpx; height: HEIGHTpx" srcdoc="PAGE"></iframe>
<script>
document.querySelector("iframe").onload = event => {
  const page = event.target.contentDocument, boxes = {};
  for (const name of ["#curves svg", "#table table", "#confusion svg", "#pictures img", "polyline", "pre", "header"])
    boxes[name] = [...page.querySelectorAll(name)].map(each => {
      const box = each.getBoundingClientRect();
      return [box.left, box.top, box.right, box.bottom, each.naturalWidth === 0];
    });
  const {scrollWidth, scrollHeight, clientWidth} = page.documentElement;
  const found = {boxes, width: clientWidth, scroll: scrollWidth, height: scrollHeight};
  document.body.append(Object.assign(document.createElement("output"), {textContent: JSON.stringify(found)}));
};
</script>"""
BLUE, ORANGE = (46, 110, 210), (214, 84, 32)


@pytest.fixture
def page(tiny_net, tiny_loaders, tmp_path):
    """The page of a run with a table."""
    about = {"student": "resnet8", "teacher": ["resnet14"], "method": "kd"}
    options = TrainOptions(epochs=2, lr=0.05, out=str(tmp_path / "run"), device="cpu")
    trainer = Trainer(KD(tiny_net(0), tiny_net(1)), *tiny_loaders(), options, about)
    trainer.fit()
    rows = [["teacher", "resnet14", "11.22", "175,258"], ["student, kd", "resnet8", "33.44", "78,042"]]
    alone = [row | {"top1": row["top1"] / 2} for row in trainer.history]
    trainer.report.page.add_table(["", "network", "top-1 %", "parameters"], rows, alone)
    return trainer.report.out / "report.html"


def browse(folder, *words: str) -> str:
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", profile, *OFFLINE]
    return subprocess.run([*command, *words], capture_output=True, text=True, check=True, timeout=300).stdout


def framed(page, folder, width, height):
    """A page that shows `page`, as it is, in a frame of this size, and measures it."""
    values = {"WIDTH": str(width), "HEIGHT": str(height), "PAGE": escape(page.read_text())}
    file = folder / "frame.html"
    file.write_text(re.sub("WIDTH|HEIGHT|PAGE", lambda found: values[found[0]], FRAME))
    return file.as_uri()


def measured(page, folder, width):
    """Width and height of the page, and the boxes of its parts."""
    dom = browse(folder, f"--window-size={max(width, NARROWEST)},900", "--dump-dom", framed(page, folder, width, 900))
    return json.loads(unescape(re.search(r"<output>(.*?)</output>", dom)[1]))


def screenshot(page, folder, width, height) -> Image.Image:
    file, window = folder / "page.png", f"--window-size={max(width, NARROWEST)},{height}"
    browse(folder, window, f"--screenshot={file}", framed(page, folder, width, height))
    return Image.open(file).convert("RGB").crop((0, 0, width, height))


def colours(picture, box) -> set[tuple[int, ...]]:
    region = picture.crop([round(value) for value in box[:4]])
    return {colour for _, colour in region.getcolors(region.width * region.height)}


@pytest.mark.parametrize("width", [1280, 400])
def test_everything_is_seen(page, tmp_path, width):
    found = measured(page, tmp_path, width)
    assert found["width"] == width and found["scroll"] <= width, "the page scrolls sideways"
    boxes = found["boxes"]
    assert {name: len(each) for name, each in boxes.items()} == {
        **{"#curves svg": 6, "#table table": 1, "#confusion svg": 1, "#pictures img": 12, "pre": 1, "header": 1},
        "polyline": 3 + 2 + 4,  # accuracy: two, and that of the student alone; ce and kd; one in each other chart
    }
    for name in ("#curves svg", "#confusion svg", "#pictures img", "header"):
        for left, top, right, bottom, is_broken in boxes[name]:
            assert 0 <= left < right <= width and bottom - top > 40 and not is_broken, name
    picture = screenshot(page, tmp_path, width, found["height"])
    for box in boxes["#curves svg"]:
        assert BLUE in colours(picture, box)
    assert ORANGE in colours(picture, boxes["#curves svg"][0])  # the second line: top-5
    assert len(colours(picture, boxes["#confusion svg"][0])) > 10
    for box in boxes["#pictures img"]:
        assert len(colours(picture, box)) > 30  # random pixels


def test_the_policy_of_the_page_lets_no_script_run(page, tmp_path):
    script = "<script>document.body.append(document.createElement('output'))</script></body>"
    text = page.read_text().replace("</body>", script)
    copy = tmp_path / "copy.html"
    copy.write_text(text)
    assert "<output>" not in browse(tmp_path, "--dump-dom", copy.as_uri())
    copy.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text))
    assert "<output>" in browse(tmp_path, "--dump-dom", copy.as_uri())
