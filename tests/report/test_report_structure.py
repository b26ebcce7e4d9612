"""The picture of couplings: every layer has its line, every group its lane, and no two lanes touch."""

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from secateur.core.errors import OutputError
from secateur.report.lanes import arrange, condensed, describe, draw, render_structure, write_structure
from secateur.report.structure import Fixed, Group, Role, Row, StructureView, Touch, Unruled, by_reason, few


def group(name, kind, units, **touches):
    return Group(
        name=f"{name}:{kind}",
        kind=kind,
        units=units,
        cost=10,
        width=1,
        multiple=8,
        parameters_share=0.1,
        flops_share=0.2,
        touches=tuple(Touch(module=m.replace("__", "."), role=role) for m, role in touches.items()),
        coupled=(),
        occurrences=(),
    )


def fixed(parameter, reason="it is an output of the model", units=5):
    return Fixed(parameter=parameter, dim=0, units=units, parameters=40, reason=reason)


def model(blocks=2, frozen=(), unknown=()):
    """An embedding, blocks of two layers, a head."""
    names = [f"layers.{i}.{part}" for i in range(blocks) for part in ("up", "down")]
    rows = [Row(module=m, parameters=100, reads="8", makes="16") for m in ["embed", *names, "head"]]
    stream = {name.replace(".", "__"): Role.READS if name.endswith("up") else Role.MAKES for name in names}
    sites = [group("embed", "embedding", 8, embed=Role.MAKES, **stream, head=Role.READS)]
    for i in range(blocks):
        ends = {f"layers__{i}__up": Role.MAKES, f"layers__{i}__down": Role.READS, f"layers__{i}__norm": Role.CARRIES}
        sites.append(group(f"layers.{i}.up", "neuron", 16, **ends))
    return StructureView(
        model="a <model>",
        kind="Net",
        inputs="a test",
        parameters=1000,
        flops=2000.0,
        halved_parameters=300,
        halved_flops=500.0,
        rows=tuple(rows),
        sites=tuple(sites),
        frozen=tuple(frozen),
        unknown=tuple(unknown),
    )


def test_short_lanes_share_the_first_column_and_long_ones_stand_outside():
    picture = arrange(model(4))
    assert [lane.column for lane in picture.lanes] == [1, 0, 0, 0, 0]
    stream, first, *_ = picture.lanes
    assert (stream.first, stream.last, len(stream.marks)) == (0, 9, 10)
    assert first.marks == [(1, Role.MAKES), (2, Role.READS)]  # the norm has no line of its own


def test_lanes_of_one_column_never_touch():
    chain = [f"conv{i}" for i in range(9)]
    pairs = [group(a, "channel", 4, **{a: Role.MAKES, b: Role.READS}) for a, b in pairwise(chain)]
    rows = tuple(Row(module=name, parameters=1, reads="4", makes="4") for name in chain)
    picture = arrange(model().model_copy(update={"rows": rows, "sites": tuple(pairs)}))
    assert picture.columns == 2
    for one in picture.lanes:
        others = [lane for lane in picture.lanes if lane is not one and lane.column == one.column]
        assert all(one.last < other.first or other.last < one.first for other in others)


def test_repeated_blocks_are_drawn_once_and_counted():
    view = model(60)
    lines = condensed(view.rows)
    names = [line.module if isinstance(line, Row) else line for line in lines]
    shown = [f"layers.{i}.{part}" for i in (0, 1) for part in ("up", "down")]
    assert names == ["embed", *shown, 114, "layers.59.up", "layers.59.down", "head"]
    picture = arrange(view)
    assert [lane.group.name for lane in picture.lanes] == [
        "embed:embedding",
        *(f"layers.{i}.up:neuron" for i in (0, 1, 59)),
    ]
    assert picture.lanes[0].last == 8
    assert "114 more layers" in draw(view)


def test_a_block_that_differs_is_never_left_out():
    rows = list(model(60).rows)
    rows[41] = rows[41].model_copy(update={"makes": "12"})  # layers.20.up
    names = [line.module for line in condensed(rows) if isinstance(line, Row)]
    assert "layers.20.up" in names
    assert condensed(model(4).rows) == list(model(4).rows)


def test_the_picture_names_everything_that_one_points_at():
    drawn = draw(model(frozen=[fixed("head.weight")]))
    titles = re.findall("<title>(.*?)</title>", drawn, re.DOTALL)
    assert any("layers.1.up:neuron: 16 neurons, 10 parameters each" in title for title in titles)
    assert any("5 fixed units of head.weight" in title and "it is an output" in title for title in titles)
    assert drawn.count('class="lane neuron"') == 2
    assert drawn.count('class="fixed"') == 1


def test_a_group_is_described_by_who_does_what():
    one = group(
        "a", "kv_group", 4, a=Role.MAKES, b=Role.BOTH, c=Role.CARRIES, **{f"r{i}": Role.READS for i in range(8)}
    )
    said = describe(one)
    assert "4 kv groups" in said
    assert "made by a\nread by r0, r1, r2, r3, r4, r5 +2\nread and made by b\na value for each in c" in said
    assert one.layers(Role.MAKES) == ["a", "b"]
    assert one.module == "a"


def test_reasons_are_grouped_without_their_places():
    looked, out = "units are looked up by index in '{}' (embedding)", "it is an output of the model"
    axes = [fixed("a.weight", looked.format("a")), fixed("b.weight", looked.format("b")), fixed("head.weight", out)]
    first, second = by_reason(axes)
    assert (first.text, len(first.axes), first.units, first.parameters) == ("units are looked up by index", 2, 10, 80)
    assert second.text == out


def test_few_names():
    assert few(["a", "b"]) == "a, b"
    assert few(["a", "b", "c", "d", "e"]) == "a, b, c +2"


class Tags(HTMLParser):
    """Open and closed tags balance; nothing is loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.stack, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in ("meta",):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_escaped_and_needs_nothing_else():
    gap = Unruled(module="m", operator="aten::odd", reason="no rule for this operator")
    page = render_structure(model(frozen=[fixed("head.weight")], unknown=[gap]))
    tags = Tags()
    tags.feed(page)
    assert tags.stack == []
    assert "a <model>" in tags.text
    assert "<model>" not in page
    for text in ("layers.1.up:neuron", "aten::odd", "30.0 % left", "1 axis", "3 groups"):
        assert text in tags.text
    assert "http" not in page
    assert "<script" not in page


def test_a_model_without_sites_or_flops_has_a_page_too():
    bare = model().model_copy(update={"sites": (), "flops": 0.0, "halved_flops": 0.0})
    assert "0 groups" in render_structure(bare)
    assert "<svg" in render_structure(bare.model_copy(update={"rows": ()}))


def test_the_page_replaces_an_older_one_or_says_why_not(tmp_path):
    target = tmp_path / "new" / "page.html"
    write_structure(model(), target)
    write_structure(model(3), target)
    assert "layers.2.up" in target.read_text()
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another place"):
        write_structure(model(), tmp_path / "file" / "page.html")
