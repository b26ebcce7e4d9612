"""The plan: what stays, where it came from. Every method makes one, everything else consumes one."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.core.errors import PlanError
from secateur.core.files import read_json, whole_folder, write_json
from secateur.core.fingerprint import mismatches
from secateur.core.masks import pack, unpack
from secateur.core.shards import shapes_of, write_shard
from secateur.core.units import Site, UnitKind

FORMAT = 2  # 2: structured units, with example and attributes
TENSORS, DOCUMENT = "plan.safetensors", "plan.json"


@cache
def versions() -> dict[str, str]:
    """Versions of what decides a result's bits."""
    found = {"python": platform.python_version()}
    for package in ("secateur", "torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclass(frozen=True)
class Provenance:
    """What made a plan: enough to make it again.

    Attributes:
        method: name in the catalogue.
        settings: every setting of the method with its value.
        budget: what was asked for.
        seed: seed of calibration sampling and of the method.
        model: class name and, where known, the source the model was loaded from.
        data: name, digest and number of samples of the calibration data; empty if none was used.
        versions: Python, torch, transformers, numpy, secateur.
    """

    method: str
    settings: Mapping[str, Any]
    budget: Mapping[str, Any]
    seed: int
    model: Mapping[str, str]
    data: Mapping[str, Any]
    versions: Mapping[str, str]


@dataclass
class Plan:
    """Keep-masks by site, new weights where the method compensates, and the provenance.

    Attributes:
        sites: name -> site; same keys as `masks`.
        masks: name -> bool tensor of the site's shape, True = keep.
        weights: parameter name -> new value, for methods that change the kept weights.
        scores: name -> the scores that decided, if they were asked for.
        provenance: one entry for each plan combined into this one.
        planned_on: parameter name -> dtype, shape and digest of the model planned on.
        applied: the same for parameters that the plan changes, after the change.
        warnings: what the user must know, e.g. a layer in which nothing was pruned.
        facts: per-site figures of the method, e.g. the solver's error.
        example: what the inputs looked like that the structure was found with, for structured units.
        attributes: module attributes that were changed when structured units were cut, for the loader.
        additions: modules that the model gets: shortcuts, factors, by-passes (`shrink.additions`); `weights` then hold
            every parameter that changes at its new size, and nothing is cut by the masks.
    """

    sites: dict[str, Site]
    masks: MutableMapping[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    provenance: tuple[Provenance, ...] = ()
    planned_on: dict[str, str] = field(default_factory=dict)
    applied: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    facts: dict[str, dict[str, float]] = field(default_factory=dict)
    example: dict[str, Any] | None = None
    attributes: tuple[dict[str, Any], ...] = ()
    additions: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.sites.keys() != self.masks.keys():
            raise PlanError(f"sites and masks differ: {sorted(self.sites.keys() ^ self.masks.keys())[:3]}")
        for name, mask in self.masks.items():
            if mask.dtype != torch.bool:
                raise PlanError(f"the mask of '{name}' is {mask.dtype}, it must be bool (True = keep)")
            if tuple(mask.shape) != self.sites[name].shape:
                raise PlanError(f"the mask of '{name}' is {list(mask.shape)}, its site {list(self.sites[name].shape)}")

    # --- counts -------------------------------------------------------------------------------

    def kept(self, name: str) -> int:
        """Units kept in one site."""
        return int(self.masks[name].sum())

    def units(self, kind: UnitKind | None = None) -> tuple[int, int]:
        """(kept, all) units over all sites, or over the sites of one kind."""
        names = [name for name, site in self.sites.items() if kind in (None, site.kind)]
        return sum(map(self.kept, names)), sum(self.sites[name].units for name in names)

    @property
    def sparsity(self) -> float:
        """Fraction of the units in the plan's sites that is removed; 0 for an empty plan."""
        kept, total = self.units()
        return 1 - kept / total if total else 0.0

    @property
    def kinds(self) -> tuple[UnitKind, ...]:
        """The kinds of unit the plan speaks of."""
        return tuple(sorted({site.kind for site in self.sites.values()}))

    def table(self) -> list[dict[str, Any]]:
        """One row per site: name, kind, units, kept, sparsity, and the method's facts."""
        return [
            {
                "site": name,
                "kind": site.kind.value,
                "shape": list(site.shape),
                "units": site.units,
                "kept": (kept := self.kept(name)),
                "sparsity": 1 - kept / site.units if site.units else 0.0,
                **self.facts.get(name, {}),
            }
            for name, site in self.sites.items()
        ]

    def __repr__(self) -> str:
        kept, total = self.units()
        methods = " & ".join(p.method for p in self.provenance) or "hand-made"
        kinds = "/".join(self.kinds) or "no"
        return f"Plan({methods}: keeps {kept:,} of {total:,} {kinds} units in {len(self.sites)} sites)"

    # --- combining and comparing --------------------------------------------------------------

    def __and__(self, other: Plan) -> Plan:
        """Keep what both keep. Sites that only one plan knows are taken over from it.

        Raises:
            PlanError: both give new values for the same weights, or were made for other models.
        """
        if self.additions or other.additions:
            raise PlanError(
                "a plan that adds modules to a model (shortcuts, factors, by-passes) goes with no other; apply "
                "it, then plan on the result"
            )
        both = self.weights.keys() & other.weights.keys()
        if both:
            raise PlanError(f"both plans change the kept weights of '{min(both)}'; apply one, then plan on the result")
        if self.planned_on and other.planned_on and self.planned_on != other.planned_on:
            raise PlanError("the plans were made for different models; plan both on the same one")
        masks = {name: mask.clone() for name, mask in self.masks.items()}
        for name, mask in other.masks.items():
            if name in masks and masks[name].shape != mask.shape:
                raise PlanError(f"the masks of '{name}' have shapes {list(masks[name].shape)} and {list(mask.shape)}")
            masks[name] = masks[name] & mask if name in masks else mask.clone()
        return Plan(
            sites={**self.sites, **other.sites},
            masks=masks,
            weights={**self.weights, **other.weights},
            provenance=self.provenance + other.provenance,
            planned_on=self.planned_on or other.planned_on,
            warnings=self.warnings + other.warnings,
            facts={**self.facts, **other.facts},
            example=self.example or other.example,
        )

    def diff(self, other: Plan) -> list[dict[str, Any]]:
        """One row per site of either plan: kept in both, only here, only there, and the overlap.

        `overlap` is |A and B| / |A or B| of the kept units. A site that a plan does not know is
        kept whole by it.
        """
        rows = []
        for name in {**self.sites, **other.sites}:
            site = self.sites.get(name) or other.sites[name]
            mine = self.masks.get(name, torch.ones(site.shape, dtype=torch.bool))
            theirs = other.masks.get(name, torch.ones(site.shape, dtype=torch.bool))
            if mine.shape != theirs.shape:
                raise PlanError(f"the masks of '{name}' have shapes {list(mine.shape)} and {list(theirs.shape)}")
            either = int((mine | theirs).sum())
            rows.append(
                {
                    "site": name,
                    "units": site.units,
                    "both": int((mine & theirs).sum()),
                    "only_first": int((mine & ~theirs).sum()),
                    "only_second": int((~mine & theirs).sum()),
                    "overlap": int((mine & theirs).sum()) / either if either else 1.0,
                }
            )
        return rows

    # --- identity -----------------------------------------------------------------------------

    def check_model(self, parameters: Mapping[str, Tensor], other_weights: bool = False) -> None:
        """Refuse a model that the plan was not made for. A hand-made plan only has to fit in names and shapes.

        Args:
            parameters: the model's named parameters.
            other_weights: accept the same architecture with other values (a retrained model).

        Raises:
            PlanError: names the first parameter that differs and how.
        """
        for name, site in self.sites.items():
            if site.kind is UnitKind.WEIGHT and (name not in parameters or tuple(parameters[name].shape) != site.shape):
                found = list(parameters[name].shape) if name in parameters else "missing"
                raise PlanError(f"the plan masks '{name}' {list(site.shape)}, which is {found} in this model")
        if not self.planned_on:
            return
        for name, what in mismatches(parameters, self.planned_on, self.applied):
            values_only = what == "has other values"
            if values_only and other_weights and not self.weights:
                continue
            advice = "use the model it was planned on"
            if not values_only and any(site.occurrences for site in self.sites.values()):
                advice += " (a plan that cuts units can be applied once; was it applied already?)"
            if values_only and not self.weights:
                advice += ", or pass other_weights=True (--other-weights) to put these masks on a retrained one"
            raise PlanError(f"this plan was made for another model: parameter '{name}' {what}; {advice}")

    # --- disk ---------------------------------------------------------------------------------

    def save(self, folder: str | Path, force: bool = False) -> Path:
        """Write `plan.safetensors` (one bit per unit) and `plan.json` into a new folder."""
        folder = Path(folder)
        with whole_folder(folder, force) as temporary:
            self.write_into(temporary)
        return folder

    def write_into(self, folder: Path) -> None:
        """Write the two files into an existing folder."""
        packed = {f"mask/{name}": (torch.uint8, ((site.units + 7) // 8,)) for name, site in self.sites.items()}
        others = {f"weight/{name}": value for name, value in self.weights.items()}
        others |= {f"score/{name}": value for name, value in self.scores.items()}

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name in self.sites:  # one at a time: masks may be on disk
                yield f"mask/{name}", pack(self.masks[name])
            yield from others.items()

        write_shard(folder / TENSORS, packed | shapes_of(others), tensors())
        write_json(folder / DOCUMENT, self.document())

    def document(self) -> dict[str, Any]:
        """Everything but the tensors, as plain data."""
        return {
            "format": FORMAT,
            "provenance": [asdict(entry) for entry in self.provenance],
            "sites": [site.to_json() for site in self.sites.values()],
            "planned_on": self.planned_on,
            "applied": self.applied,
            "warnings": list(self.warnings),
            "facts": self.facts,
            "example": self.example,
            "attributes": list(self.attributes),
            "additions": list(self.additions),
        }

    @classmethod
    def load(cls, folder: str | Path) -> Plan:
        """Read a plan's folder.

        Raises:
            PlanError: a file is missing, truncated, of another format, or the two do not fit.
        """
        folder = Path(folder)
        document = read_json(folder / DOCUMENT)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise PlanError(f"'{folder / DOCUMENT}' is not a plan of format {FORMAT}")
        try:
            sites = {item["name"]: Site.from_json(item) for item in document["sites"]}
            with safe_open(folder / TENSORS, framework="pt") as file:
                groups = _grouped({key: file.get_tensor(key) for key in list(file.keys())})
            if groups["mask"].keys() != sites.keys():
                differ = sorted(groups["mask"].keys() ^ sites.keys())
                raise PlanError(f"{TENSORS} and {DOCUMENT} disagree about the site '{differ[0]}'")
            masks = {name: unpack(groups["mask"][name], site.shape, name) for name, site in sites.items()}
            return cls(
                sites=sites,
                masks=masks,
                weights=groups["weight"],
                scores=groups["score"],
                provenance=tuple(Provenance(**entry) for entry in document["provenance"]),
                planned_on=document["planned_on"],
                applied=document["applied"],
                warnings=tuple(document["warnings"]),
                facts=document["facts"],
                example=document["example"],
                attributes=tuple(document["attributes"]),
                additions=tuple(document.get("additions", ())),
            )
        except (SafetensorError, OSError) as error:
            raise PlanError(f"'{folder / TENSORS}' is missing or damaged: {error}") from error
        except PlanError as error:
            raise PlanError(f"'{folder}' is damaged: {error}") from error
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise PlanError(f"'{folder}' is not a complete plan: {type(error).__name__} {error}") from error


def _grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {"mask": {}, "weight": {}, "score": {}}
    for key in sorted(tensors):
        group, _, name = key.partition("/")
        groups[group][name] = tensors[key]
    return groups
