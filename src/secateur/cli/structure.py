"""Terminal output of `inspect`: the sites as a tree of modules, repeated layers once, and what is frozen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from secateur.cli import show
from secateur.report.figures import OPERATIONS, percent, short
from secateur.report.structure import Group, StructureView, by_reason, few

COLUMNS = ["site", "units", "parameters a unit", "-parameters", "-FLOPs", "coupled with"]
NOTE = (
    "-parameters, -FLOPs: share of the model's that vanishes if half of the site's units go; x8: keep a multiple of 8 "
    "units and widths stay multiples of 8"
)


@dataclass
class Node:
    """A module with the sites that it names and the modules inside it."""

    name: str
    sites: list[Group] = field(default_factory=list)
    children: dict[str, Node] = field(default_factory=dict)

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for modules whose sites are the same but for where they stand."""
        own = tuple((_label(site), site.units, site.cost, len(site.occurrences)) for site in self.sites)
        return own, tuple((name, child.signature) for name, child in self.children.items())

    def everything(self) -> Iterator[Group]:
        """All sites from here down."""
        yield from self.sites
        for child in self.children.values():
            yield from child.everything()


def grow(view: StructureView) -> Node:
    """The tree of all modules that name a site or hold one that does."""
    root = Node("")
    for site in view.sites:
        node = root
        for part in site.module.split(".") if site.module else []:
            node = node.children.setdefault(part, Node(part))
        node.sites.append(site)
    return root


def folded(node: Node, fold: bool) -> list[tuple[str, Node]]:
    """The children with labels; neighbours that are numbered and alike become one, such as `0..31`."""
    runs: list[list[Node]] = []
    for child in node.children.values():
        last = runs[-1][-1] if runs else None
        numbered = last is not None and last.name.isdigit() and child.name.isdigit()
        if fold and last is not None and numbered and last.signature == child.signature:
            runs[-1].append(child)
        else:
            runs.append([child])
    return [(_range(run), run[0]) for run in runs]


def _range(run: list[Node]) -> str:
    return run[0].name if len(run) == 1 else f"{run[0].name}..{run[-1].name} ({len(run)} alike, each)"


def lines(node: Node, depth: int | None, guide: str = "") -> Iterator[list[str]]:
    """The table's rows below a module.

    Args:
        node: the module.
        depth: how many levels of modules to show; None shows all, with repetitions folded.
        guide: what stands left of every row.
    """
    entries: list[Group | tuple[str, Node]] = [*node.sites, *folded(node, depth is None)]
    for index, entry in enumerate(entries):
        last = index == len(entries) - 1
        corner, below = ("└─ ", "   ") if last else ("├─ ", "│  ")
        if isinstance(entry, Group):
            yield _site_row(f"{guide}{corner}{_label(entry)}", entry)
            continue
        label, child = entry
        while (
            not (child.sites or label.endswith(")")) and len(child.children) == 1
        ):  # a chain of modules with nothing in between
            ((name, only),) = folded(child, depth is None)
            label, child = f"{label}.{name}", only
        if depth is not None and depth <= 1 and child.children:
            yield [f"{guide}{corner}{label}: {_summary(child)}", *[""] * 5]
        elif child.children or len(child.sites) > 1 or label.endswith(")"):
            yield [f"{guide}{corner}{label}", *[""] * 5]
            yield from lines(child, None if depth is None else depth - 1, guide + below)
        else:
            yield _site_row(f"{guide}{corner}{label}:{_label(child.sites[0])}", child.sites[0])


def _label(site: Group) -> str:
    """The kind, and the number of a second one of the kind."""
    return site.name.rpartition(":")[2]


def _summary(node: Node) -> str:
    kinds = Counter(site.kind for site in node.everything())
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def _site_row(label: str, site: Group) -> list[str]:
    units = f"{site.units:,}" + (f" x{site.multiple}" if site.multiple > 1 and site.units > site.multiple else "")
    shares = percent(site.parameters_share), percent(site.flops_share)
    return [label, units, f"{site.cost:,}", *shares, few([_relative(name, site.module) for name in site.coupled])]


def _relative(name: str, origin: str) -> str:
    """A module's name as seen from beside another one."""
    mine, theirs = name.split("."), origin.split(".")
    shared = 0
    while shared < min(len(mine) - 1, len(theirs)) and mine[shared] == theirs[shared]:
        shared += 1
    return ".".join(mine[shared:])


def print_structure(view: StructureView, depth: int | None, every: bool) -> None:
    """The tree, the frozen axes and the operators without a rule.

    Args:
        view: what to show.
        depth: levels of modules to show; None folds what repeats.
        every: list every frozen axis instead of their reasons.
    """
    show.table(f"{view.model} ({view.kind})", COLUMNS, lines(grow(view), depth), NOTE)
    if view.frozen:
        _print_frozen(view, every)
    if view.unknown:
        rows = [[gap.module, gap.operator, gap.reason] for gap in view.unknown]
        show.table("operators without a rule: what they touch is frozen", ["module", "operator", "why"], rows)
    show.say(totals(view))
    show.say(f"inputs: {view.inputs}")


def _print_frozen(view: StructureView, every: bool) -> None:
    if every:
        rows = [[f"{one.parameter}[{one.dim}]", f"{one.units:,}", one.reason] for one in view.frozen]
        show.table("frozen", ["axis", "units", "why"], rows)
        return
    shown = []
    for reason in by_reason(view.frozen):
        places = list(dict.fromkeys(axis.module or axis.parameter for axis in reason.axes))
        shown.append([reason.text, len(reason.axes), f"{reason.units:,}", f"{reason.parameters:,}", few(places)])
    show.table("frozen", ["why", "axes", "units", "in tensors of", "where"], shown, "--frozen lists every axis")


def totals(view: StructureView) -> str:
    """One sentence about the whole model."""
    left = view.halved_parameters / view.parameters
    flops = f" and {percent(view.halved_flops / view.flops)} of the FLOPs" if view.flops else ""
    return (
        f"{short(view.parameters)} parameters, {short(view.flops, OPERATIONS)} FLOPs a sample; {len(view.sites)} sites "
        f"and {len(view.frozen)} frozen axes; half of every site leaves {percent(left)} of the parameters{flops}"
    )
