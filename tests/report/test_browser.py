"""A real browser draws the page: the bars have the colours and the lengths that the numbers ask for."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest
import samples
from PIL import Image

from secateur.report import Record, page, write

WIDTH, HEIGHT = 1200, 4200
SCHEMES = {"dark": 0, "light": 1}
# appended to a copy of the page, as the report itself holds no script: where everything came to lie
PROBE = """<script>
const boxes = [...document.querySelectorAll("svg, .card, .warnings")].map(e => {
  const b = e.getBoundingClientRect();
  return {style: e.getAttribute("class"), label: e.getAttribute("aria-label"),
          x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height};
});
const probe = document.createElement("pre");
probe.id = "probe";
probe.textContent = JSON.stringify({boxes, inner: innerWidth, wide: document.documentElement.scrollWidth,
                                    background: getComputedStyle(document.body).backgroundColor});
document.body.append(probe);
</script>"""


@dataclass(frozen=True)
class Box:
    """Where one element lies on the screenshot, in pixels."""

    style: str
    label: str
    x: float
    y: float
    width: float
    height: float


@pytest.fixture(scope="module")
def chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        if os.environ.get("SECATEUR_REQUIRE_CHROMIUM") == "1":
            pytest.fail(f"SECATEUR_REQUIRE_CHROMIUM=1, but there is none of {', '.join(names)} on the path")
        pytest.skip(f"no browser: none of {', '.join(names)} is on the path")
    return found


def browse(chromium: str, file: Path, scheme: str, *extra: str, width: int = WIDTH) -> str:
    quiet = ["sync", "gpu", "background-networking", "component-update"]
    command = [chromium, "--headless", "--no-sandbox", "--hide-scrollbars", "--no-first-run"]
    command += [f"--disable-{feature}" for feature in quiet]
    command += [f"--user-data-dir={file.parent / 'profile'}", f"--window-size={width},{HEIGHT}"]
    command += [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", *extra, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def shoot(chromium: str, file: Path, scheme: str) -> Image.Image:
    picture = file.with_name(f"{file.stem}-{scheme}.png")
    browse(chromium, file, scheme, f"--screenshot={picture}")
    return Image.open(picture).convert("RGB")


def probe(chromium: str, file: Path, scheme: str = "light", width: int = WIDTH) -> dict[str, object]:
    copy = file.with_name(f"{file.stem}-probed.html")
    copy.write_text(file.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    dom = browse(chromium, copy, scheme, "--dump-dom", width=width)
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    assert found, "the probe did not run"
    answer: dict[str, object] = json.loads(unescape(found[1]))
    return answer


def boxes_of(answer: dict[str, object]) -> list[Box]:
    found = answer["boxes"]
    assert isinstance(found, list)
    return [Box(**{**box, "label": box["label"] or ""}) for box in found]


def colour(name: str, scheme: str) -> tuple[int, ...]:
    """The value of a CSS variable; the dark ones come second in the style sheet."""
    values = re.findall(rf"--{name}: #([0-9a-f]{{6}})", (page.HERE / "report.css").read_text())
    return tuple(bytes.fromhex(values[0 if scheme == "light" else 1]))


def share(picture: Image.Image, box: Box, wanted: tuple[int, ...], height: float) -> float:
    """Share of the pixels of one line of a box, `height` down from its top, that have a colour."""
    y = round(box.y + height * box.height)
    xs = range(round(box.x), round(box.x + box.width))
    return sum(picture.getpixel((x, y)) == wanted for x in xs) / len(xs)


def rendered(folder: Path, chromium: str, records: list[Record], scheme: str) -> tuple[Image.Image, list[Box]]:
    file = write(records, folder / "report.html")
    answer = probe(chromium, file, scheme)
    picture = shoot(chromium, file, scheme)
    assert picture.size == (WIDTH, HEIGHT)
    return picture, [box for box in boxes_of(answer) if box.y + box.height < HEIGHT]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bars_have_their_colour_and_length(tmp_path: Path, chromium: str, scheme: str) -> None:
    record = samples.digits_resnet()
    picture, boxes = rendered(tmp_path, chromium, [record], scheme)
    tracks = [box for box in boxes if box.style == "track"]
    quality = record.quality
    assert quality.recovered is not None
    assert record.latency is not None
    tops = [max(case.before.p90, case.after.p90) * 1.02 for case in record.latency.rows]
    expected = [
        ("before", quality.before.value / 100),
        ("middle", quality.pruned.value / 100),
        ("accent", quality.recovered.value / 100),
    ]
    for case, top in zip(record.latency.rows, tops, strict=True):
        expected += [("before", case.before.median / top), ("accent", case.after.median / top)]
    expected += [("accent", layer.kept / layer.units) for layer in record.layers]
    assert len(tracks) == len(expected)
    for box, (name, length) in zip(tracks, expected, strict=True):
        # a line near the top edge, above the whiskers; three pixels for round corners and smoothing
        assert share(picture, box, colour(name, scheme), 0.17) == pytest.approx(length, abs=3.5 / box.width), box.label


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_picture_of_many_layers_is_filled_as_much_as_is_kept(tmp_path: Path, chromium: str, scheme: str) -> None:
    record = samples.many_layers(60)
    picture, boxes = rendered(tmp_path, chromium, [record], scheme)
    (box,) = [box for box in boxes if box.style == "columns"]
    for height in (0.3, 0.5, 0.8):
        reaching = sum(layer.kept / layer.units > 1 - height for layer in record.layers) / len(record.layers)
        # a sixth of every column is the gap, and smoothing takes the columns' edges
        assert 0.65 * reaching < share(picture, box, colour("accent", scheme), height) <= 0.9 * reaching + 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_overview_of_several_results_has_content(tmp_path: Path, chromium: str, scheme: str) -> None:
    records = [samples.llama_wanda(), samples.llama_depth(), samples.digits_resnet()]
    picture, boxes = rendered(tmp_path, chromium, records, scheme)
    (box,) = [box for box in boxes if box.style == "scatter"]
    crop = picture.crop((round(box.x), round(box.y), round(box.x + box.width), round(box.y + box.height)))
    counts = {value: count for count, value in crop.getcolors(crop.width * crop.height) or []}
    assert counts[colour("accent", scheme)] > 3 * 120  # three filled marks
    assert counts[colour("before", scheme)] > 60  # the dense model
    assert counts[colour("line", scheme)] > 3 * 500  # grid lines
    assert counts[colour("panel", scheme)] > 0.7 * crop.width * crop.height
    assert len(counts) > 30  # text and its smoothing


def test_light_and_dark_differ_and_both_can_be_read(tmp_path: Path, chromium: str) -> None:
    file = write([samples.digits_resnet()], tmp_path / "report.html")
    corners = {scheme: shoot(chromium, file, scheme).getpixel((3, 3)) for scheme in SCHEMES}
    assert corners == {scheme: colour("page", scheme) for scheme in SCHEMES}
    assert luminance(colour("page", "light")) > 0.8
    assert luminance(colour("page", "dark")) < 0.02


@pytest.mark.parametrize("width", [560, 800, 1200])
def test_nothing_sticks_out_at_the_side(tmp_path: Path, chromium: str, width: int) -> None:
    records = [samples.llama_wanda(), samples.digits_resnet(), samples.many_layers(60)]
    answer = probe(chromium, write(records, tmp_path / "report.html"), width=width)
    assert answer["inner"] == width
    assert answer["wide"] == width


def luminance(value: tuple[int, ...]) -> float:
    """Relative luminance as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in value)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("front", "back", "least"),
    [
        ("ink", "page", 7), ("ink", "panel", 7), ("ink", "code", 7), ("soft", "page", 4.5), ("soft", "panel", 4.5),
        ("good", "good-bg", 4.5), ("bad", "bad-bg", 4.5), ("same", "same-bg", 4.5), ("warn", "warn-bg", 4.5),
        ("accent", "page", 4.5), ("accent", "ground", 3), ("mark", "before", 3), ("mark", "accent", 3),
        ("mark", "ground", 3), ("panel", "accent", 4.5),
    ],
)  # fmt: skip
def test_contrast(scheme: str, front: str, back: str, least: float) -> None:
    light, dark = sorted((luminance(colour(name, scheme)) for name in (front, back)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= least
