"""The page: well-formed, self-contained, escaped, complete, and written whole or not at all."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import samples

from secateur.core.errors import OutputError
from secateur.core.files import MARK
from secateur.report import Record, ReportError, render, write
from secateur.report.record import Layer, Measure

VOID = {"meta", "br", "link", "img", "hr", "input"}
SETS = {
    "one": [samples.digits_resnet()],
    "three": [samples.llama_wanda(), samples.llama_depth(), samples.digits_resnet()],
    "many layers": [samples.many_layers(300)],
}


class Checker(HTMLParser):
    """Collects what is wrong with the nesting, all ids, links and tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert not checker.wrong, checker.wrong[:3]
    assert not checker.open, checker.open
    return checker


@pytest.mark.parametrize("name", SETS)
def test_well_formed_and_self_contained(name: str) -> None:
    text = render(SETS[name])
    found = checked(text)
    assert len(found.ids) == len(set(found.ids))
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(found.tags)
    assert all(value.startswith("#") for key, value in found.attributes if key in ("href", "src"))
    assert all(value[1:] in found.ids for key, value in found.attributes if key == "href")
    assert not any(key.startswith("on") for key, _ in found.attributes)
    assert not [word for word in ("http://", "https://", "@import", "url(", "//cdn") if word in text.lower()]


def test_the_checker_sees_a_wrong_page() -> None:
    with pytest.raises(AssertionError):
        checked("<div><b></div>")


@pytest.mark.parametrize("name", SETS)
def test_charts_carry_text_for_screen_readers(name: str) -> None:
    found = checked(render(SETS[name]))
    charts = found.tags.count("svg")
    assert charts > 4
    assert sum(key == "role" and value == "img" for key, value in found.attributes) == charts
    assert sum(key == "aria-label" and value != "" for key, value in found.attributes) >= charts


def test_hostile_text_is_escaped_everywhere() -> None:
    evil = '</style><script>alert("1")</script><img src=x onerror=y>'
    record = samples.digits_resnet()
    layers = [Layer(site=evil, kind=evil, units=4, kept=2, sparsity=0.5, facts={evil: 1.0}) for _ in range(20)]
    quality = record.quality.model_copy(update={"metric": evil, "unit": evil, "data": evil})
    settings = {evil: [evil, {evil: evil}], "text": evil}
    hostile = record.model_copy(
        update={
            "title": evil,
            "layers": layers,
            "quality": quality,
            "warnings": [evil],
            "advice": [evil],
            "model": record.model.model_copy(update={"name": evil}),
            "method": record.method.model_copy(update={"name": evil, "citation": evil, "formula": evil}),
            "reproduce": record.reproduce.model_copy(update={"command": evil, "python": evil, "settings": settings}),
        }
    )
    clean = checked(render(SETS["three"]))
    for records in ([hostile], [hostile, hostile]):
        found = checked(render(records))
        assert not {"script", "img"} & set(found.tags)
        assert set(found.tags) <= set(clean.tags)
        assert not any(key == "onerror" for key, _ in found.attributes)
        assert any(evil in value for key, value in found.attributes if key == "aria-label")


def test_numbers_settings_and_sentences_are_on_the_page() -> None:
    record = samples.digits_resnet()
    text = render([record])
    expected = [
        "98.89 %", "98.06 %", "81.39 %", "173,706", "19,551", "699,420 bytes", "3,211,264 bytes", "0.612 ms",
        "95.3 % of the lost accuracy came back", record.warnings[0], record.reproduce.command, "arXiv 2209.14624",
        record.model.fingerprint, "minimum_threshold", "learning_rate", "2.13.0", "sparsity 0.9", "0.0817", "3.71x",
        "stage3.1.conv2", "batch 16", "2 threads", "float32", "one image of 1x8x8", "What to try next",
    ]  # fmt: skip
    assert [item for item in expected if item not in text] == []


def test_several_results_are_compared_first() -> None:
    text = render(SETS["three"])
    first = text.index('id="result-1"')
    for record in SETS["three"]:
        assert text.index(record.title) < first
        assert text.count(record.title) >= 3
    assert text.index('class="scatter"') < first
    assert 'class="scatter"' not in render(SETS["one"])


def test_what_was_not_measured_is_said() -> None:
    record = samples.digits_resnet()
    sizes = record.sizes.model_copy(update={"flops": None, "file_bytes": None})
    bare = record.model_copy(update={"latency": None, "sizes": sizes})
    assert "Not measured." in render([bare])
    assert render([bare, bare]).count("not measured") == 6  # FLOPs, latency and file of two rows


def test_a_ruined_model_has_a_page() -> None:
    record = samples.llama_wanda()
    for value in (math.inf, math.nan):
        quality = record.quality.model_copy(update={"pruned": Measure(value=value)})
        text = render([record.model_copy(update={"quality": quality})])
        checked(text)
        assert "not measurable" in text


def test_equal_records_give_equal_bytes() -> None:
    again = [Record.model_validate_json(record.model_dump_json()) for record in SETS["three"]]
    assert render(again) == render(SETS["three"])


def test_no_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="at least one result"):
        write([], tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_write_makes_folders_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "report.html"
    write(SETS["three"], target)
    assert write(SETS["one"], target) == target
    assert target.read_text(encoding="utf-8") == render(SETS["one"])
    assert list(target.parent.iterdir()) == [target]


def test_a_failed_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write(SETS["one"], tmp_path / "report.html")
    old = target.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="disk full"):
        write(SETS["three"], target)
    assert target.read_bytes() == old
    assert list(tmp_path.iterdir()) == [target]


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="could not be written"):
        write(SETS["one"], tmp_path / "file" / "report.html")


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    left = tmp_path / f".report.html{MARK}{int(gone.stdout)}-x"
    left.mkdir()
    living = tmp_path / f".report.html{MARK}{os.getpid()}-x"
    living.mkdir()
    write(SETS["one"], tmp_path / "report.html")
    assert not left.exists()
    assert living.exists()


def test_importing_the_report_loads_no_template_engine() -> None:
    code = "import sys, secateur.report; print(sorted({'jinja2', 'PIL', 'transformers', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
