"""The picture of a model's couplings: layers are rows in the order of execution, groups of units are lanes beside them.

A lane runs from the first to the last layer in which its units occur. Short lanes, such as the
channels between two convolutions, stand next to the names; long ones, such as a residual stage,
further out. A stack of many equal blocks is drawn by its first two and its last.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log2
from pathlib import Path

from secateur.report.figures import OPERATIONS, percent, plural, short
from secateur.report.markup import Html, element
from secateur.report.page import HERE, environment, put
from secateur.report.structure import Fixed, Group, Role, Row, StructureView, by_reason, few

LINE = 20.0  # height of a row
NARROW, WIDE, ROOM = 12.0, 22.0, 260.0  # distance of two lanes, and the room that they share if they can
LETTER = 7.3  # width of a letter of a name
BAR = 240.0  # the longest bar of a row's parameters
LONGEST = 46  # letters of a name
MANY = 100  # rows, from which on repeated blocks are drawn once
SHOWN = 2  # of a run of equal blocks: the first two, and the last
VERBS = {
    Role.MAKES: "made by",
    Role.READS: "read by",
    Role.BOTH: "read and made by",
    Role.CARRIES: "a value for each in",
}
BLOCK = re.compile(r"^(.*?)(\d+)\.(.*)$")


@dataclass
class Lane:
    """A group as a line: where it is seen, and in which column it stands.

    Attributes:
        marks: (line of the picture, role) of its visible layers.
        first, last: lines where it begins and ends.
    """

    group: Group
    marks: list[tuple[int, Role]]
    first: int
    last: int
    column: int = 0


@dataclass
class Picture:
    """What is drawn: for each line a row, or how many were left out there."""

    lines: list[Row | int]
    lanes: list[Lane]
    fixed: dict[str, list[Fixed]] = field(default_factory=dict)

    @property
    def columns(self) -> int:
        """How many lanes stand side by side."""
        return max((lane.column for lane in self.lanes), default=-1) + 1


# --- what goes where ------------------------------------------------------------------------------


def arrange(view: StructureView) -> Picture:
    """Rows, lanes and their columns."""
    lines: list[Row | int] = condensed(view.rows) if len(view.rows) > MANY else [*view.rows]
    place = _places(view.rows, lines)
    hidden = {index for index, line in enumerate(lines) if isinstance(line, int)}
    lanes = []
    for group in view.sites:
        seen = [(place[touch.module], touch.role) for touch in group.touches if touch.module in place]
        marks = [mark for mark in seen if mark[0] not in hidden]
        if marks:
            ends = [index for index, _ in seen]
            lanes.append(Lane(group, marks, min(ends), max(ends)))
    pack(lanes)
    fixed: dict[str, list[Fixed]] = {}
    for axis in view.frozen:
        fixed.setdefault(axis.module, []).append(axis)
    return Picture(lines, lanes, fixed)


def condensed(rows: Sequence[Row]) -> list[Row | int]:
    """The rows with the middle of every run of equal blocks replaced by its number of rows."""
    blocks: dict[tuple[str, int], list[tuple[object, ...]]] = {}
    for row in rows:
        if found := BLOCK.match(row.module):
            key = found[1], int(found[2])
            blocks.setdefault(key, []).append((found[3], row.parameters, row.reads, row.makes))
    dropped = {key for run in _runs(blocks) for key in run[SHOWN:-1] if len(run) > SHOWN + 2}
    lines: list[Row | int] = []
    for row in rows:
        found = BLOCK.match(row.module)
        if found and (found[1], int(found[2])) in dropped:
            before = lines.pop() if isinstance(lines[-1], int) else 0
            assert isinstance(before, int)
            lines.append(before + 1)
        else:
            lines.append(row)
    return lines


def _runs(blocks: dict[tuple[str, int], list[tuple[object, ...]]]) -> list[list[tuple[str, int]]]:
    runs: list[list[tuple[str, int]]] = []
    for (name, index), content in blocks.items():
        if runs and runs[-1][-1] == (name, index - 1) and blocks[runs[-1][-1]] == content:
            runs[-1].append((name, index))
        else:
            runs.append([(name, index)])
    return runs


def _places(rows: Sequence[Row], lines: Sequence[Row | int]) -> dict[str, int]:
    """Module -> its line; rows that were left out lie on the line that stands for them."""
    places: dict[str, int] = {}
    waiting = iter(rows)
    for index, line in enumerate(lines):
        for _ in range(line if isinstance(line, int) else 1):
            places[next(waiting).module] = index
    return places


def pack(lanes: Sequence[Lane]) -> None:
    """Give every lane the first column that is free from its first to its last line, short lanes first."""
    columns: list[list[Lane]] = []
    for lane in sorted(lanes, key=lambda lane: (lane.last - lane.first, lane.first)):
        found = next((column for column in columns if all(_apart(lane, other) for other in column)), None)
        if found is None:
            columns.append(found := [])
        found.append(lane)
    for index, column in enumerate(columns):
        for lane in column:
            lane.column = index


def _apart(one: Lane, other: Lane) -> bool:
    return one.last < other.first or other.last < one.first


# --- drawing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Where things lie, in pixels."""

    names: float
    columns: int
    widths: float
    most: int

    @property
    def gutter(self) -> float:
        """Marks of what is fixed."""
        return self.names + 14

    def lane(self, column: int) -> float:
        """A lane's middle."""
        return self.gutter + 20 + min(max(ROOM / max(self.columns, 1), NARROW), WIDE) * column

    @property
    def text(self) -> float:
        """Where the widths are written."""
        return self.lane(self.columns) + 8

    @property
    def bars(self) -> float:
        """Where the bars of parameters begin."""
        return self.text + self.widths + 16

    def bar(self, parameters: int) -> float:
        """Length of such a bar."""
        return max(BAR * parameters / self.most, 1)

    @staticmethod
    def y(line: int) -> float:
        """A row's middle."""
        return LINE * (line + 0.5) + 4


def draw(view: StructureView) -> Html:
    """The whole picture as one SVG."""
    picture = arrange(view)
    scale = _scale(picture)
    rows = [_line(picture, scale, index) for index in range(len(picture.lines))]
    lanes = [_lane(lane, scale) for lane in sorted(picture.lanes, key=lambda lane: -lane.column)]
    width, height = scale.bars + BAR + 60, LINE * len(picture.lines) + 8
    label = f"{len(picture.lanes)} groups of coupled units over {len(view.rows)} layers of {view.model}"
    attributes: dict[str, str | float] = {
        "class": "lanes",
        "viewBox": f"0 0 {width:.0f} {height:.0f}",
        "style": f"width:{width:.0f}px",
        "role": "img",
        "aria-label": label,
    }
    return element("svg", attributes, *rows, *lanes)


def _scale(picture: Picture) -> Scale:
    rows = [line for line in picture.lines if isinstance(line, Row)]
    return Scale(
        names=LETTER * max((min(len(row.module), LONGEST) for row in rows), default=0),
        columns=picture.columns,
        widths=LETTER * max((len(_widths(row)) for row in rows), default=0),
        most=max((row.parameters for row in rows), default=1),
    )


def _line(picture: Picture, scale: Scale, index: int) -> Html:
    line = picture.lines[index]
    if isinstance(line, int):
        text = f"{line} more layers, in blocks like these"
        return element("text", {"class": "gap", "x": 0, "y": scale.y(index) + 4}, text)
    before = picture.lines[index - 1] if index else None
    prefix = _shared(before.module, line.module) if isinstance(before, Row) else 0
    columns = [lane.column for lane in picture.lanes if any(place == index for place, _ in lane.marks)]
    fixed = _fixed_mark(picture.fixed.get(line.module, []), scale, scale.y(index))
    return element("g", {}, *_row(line, scale, index, max(columns, default=0)), _name(line, prefix, index), *fixed)


def _row(row: Row, scale: Scale, index: int, column: int) -> list[Html]:
    """A thin line up to the last lane that the layer touches, its widths and its parameters."""
    y, end = scale.y(index), scale.bars + scale.bar(row.parameters)
    bar = {"x": scale.bars, "y": y - 5, "width": scale.bar(row.parameters), "height": 10}
    return [
        element("title", {}, f"{row.module}: {row.parameters:,} parameters, {_widths(row)}"),
        element("path", {"class": "thread", "d": f"M{scale.names + 4:.1f} {y:.1f}H{scale.lane(column):.1f}"}),
        element("text", {"class": "width", "x": scale.text, "y": y + 4}, _widths(row)),
        element("rect", {"class": "weight", **bar}),
        element("text", {"class": "count", "x": end + 5, "y": y + 4}, short(row.parameters)),
    ]


def _name(row: Row, prefix: int, index: int) -> Html:
    """The name; what it shares with the row above is pale."""
    name = row.module
    cut = max(len(name) - LONGEST, 0)
    shown, prefix = (f"…{name[cut + 1 :]}", max(prefix - cut, 1)) if cut else (name, prefix)
    pale, plain = element("tspan", {"class": "pale"}, shown[:prefix]), element("tspan", {}, shown[prefix:])
    return element("text", {"class": "name", "x": 0, "y": Scale.y(index) + 4}, pale, plain)


def _shared(before: str, name: str) -> int:
    """Letters of the modules that both names begin with."""
    count = 0
    for mine, other in zip(name.split(".")[:-1], before.split("."), strict=False):
        if mine != other:
            break
        count += len(mine) + 1
    return count


def _widths(row: Row) -> str:
    return f"{row.reads} → {row.makes}" if row.reads else row.makes


def _fixed_mark(axes: Sequence[Fixed], scale: Scale, y: float) -> list[Html]:
    if not axes:
        return []
    lines = [f"{axis.units:,} fixed units of {axis.parameter} (dimension {axis.dim}): {axis.reason}" for axis in axes]
    mark = element("rect", {"class": "fixed", "x": scale.gutter - 4, "y": y - 4, "width": 8, "height": 8})
    return [element("g", {}, element("title", {}, "\n".join(lines)), mark)]


def _lane(lane: Lane, scale: Scale) -> Html:
    x, top, bottom = scale.lane(lane.column), scale.y(lane.first), scale.y(lane.last)
    thick = min(1.5 + 0.5 * log2(lane.group.units + 1), 8)
    line = f"M{x:.1f} {top - 0.01:.2f}V{bottom + 0.01:.2f}"
    marks = [_mark(role, x, scale.y(index), thick) for index, role in lane.marks]
    return element(
        "g",
        {"class": f"lane {lane.group.kind}"},
        element("title", {}, describe(lane.group)),
        element("path", {"class": "reach", "d": line}),
        element("path", {"class": "line", "stroke-width": thick, "d": line}),
        *marks,
    )


def _mark(role: Role, x: float, y: float, thick: float) -> Html:
    if role is Role.CARRIES:
        return element("path", {"class": role.value, "d": f"M{x - 5:.1f} {y:.1f}h10"})
    radius = 2.5 + thick / 3
    if role is Role.BOTH:
        rim, middle = (
            element("circle", {"class": "makes", "cx": x, "cy": y, "r": radius + 1}),
            element("circle", {"class": "hole", "cx": x, "cy": y, "r": radius / 2}),
        )
        return element("g", {}, rim, middle)
    return element("circle", {"class": role.value, "cx": x, "cy": y, "r": radius})


def describe(group: Group) -> str:
    """A group in a few lines, for whoever points at its lane."""
    lines = [
        f"{group.name}: {group.units:,} {plural(group.kind)}, {group.cost:,} parameters each",
        f"half of them: {percent(group.parameters_share)} of the parameters, {percent(group.flops_share)} of the FLOPs",
    ]
    names = {role: [touch.module for touch in group.touches if touch.role is role] for role in Role}
    return "\n".join([*lines, *(f"{VERBS[role]} {few(names[role], 6)}" for role in Role if names[role])])


# --- the page -------------------------------------------------------------------------------------


def render_structure(view: StructureView) -> str:
    """The page as text."""
    template = environment().get_template("structure.html")
    style = "".join((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "structure.css"))
    return template.render(
        style=Html(style),
        view=view,
        picture=draw(view),
        kinds=list(dict.fromkeys(group.kind for group in view.sites)),
        reasons=by_reason(view.frozen),
        operations=OPERATIONS,
        roles=Role,
    )


def write_structure(view: StructureView, path: str | Path) -> Path:
    """Write the page; the file appears whole or not at all.

    Raises:
        OutputError: the disk is full or the place not writable.
    """
    return put(render_structure(view), path)
