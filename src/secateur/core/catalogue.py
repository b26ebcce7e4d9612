"""The catalogue: every method, found by scanning a package and the entry points of third parties."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from types import ModuleType

from secateur.core.errors import SettingsError, UnknownNameError
from secateur.core.method import Method
from secateur.core.tags import Tags

ENTRY_POINTS = "secateur.methods"


def canonical(name: str) -> str:
    """Hyphens and underscores in names are the same."""
    return name.strip().lower().replace("-", "_")


def collect(package: str) -> dict[str, Method]:
    """All methods below `package` and in the entry-point group, by name, sorted.

    A method is a module-level `method = Method(...)`. A third party's entry point names the module
    or the object itself.

    Raises:
        SettingsError: two methods share a name, a name is not canonical, or a setting is not described.
    """
    found: dict[str, Method] = {}
    for origin, method in (*_own(importlib.import_module(package)), *_third_party()):
        _check(method, origin)
        if method.name in found:
            raise SettingsError(f"{origin}: a method named '{method.name}' exists already")
        found[method.name] = method
    return dict(sorted(found.items()))


def _own(package: ModuleType) -> Iterator[tuple[str, Method]]:
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not info.ispkg:
            module = importlib.import_module(info.name)
            if isinstance(found := getattr(module, "method", None), Method):
                yield info.name, found


def _third_party() -> Iterator[tuple[str, Method]]:
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            loaded = entry.load()
        except Exception as error:
            raise SettingsError(
                f"method '{entry.name}' ({entry.value}) of an installed package cannot be loaded: "
                f"{type(error).__name__}: {error}; repair or uninstall that package"
            ) from error
        yield entry.value, getattr(loaded, "method", loaded)


def _check(method: object, origin: str) -> None:
    if not isinstance(method, Method):
        raise SettingsError(f"{origin} is not a Method")
    if not isinstance(method.tags, Tags):
        raise SettingsError(f"{origin}: tags must be a Tags record")
    if method.name != canonical(method.name):
        raise SettingsError(f"{origin}: write the name '{method.name}' as '{canonical(method.name)}'")
    undescribed = [row["name"] for row in method.describe_settings() if not row["help"]]
    if undescribed:
        raise SettingsError(f"{origin}: setting '{undescribed[0]}' has no description")


def find(methods: Mapping[str, Method], name: str) -> Method:
    """The method of that name; hyphen or underscore.

    Raises:
        UnknownNameError: gives the nearest names.
    """
    try:
        return methods[canonical(name)]
    except KeyError:
        raise UnknownNameError("method", name, methods) from None


def select(methods: Mapping[str, Method], tags: Mapping[str, str]) -> dict[str, Method]:
    """The methods that carry all the given tags, e.g. `{"when": "after_training"}`."""
    return {
        name: method
        for name, method in methods.items()
        if all(method.tags.matches(axis, value) for axis, value in tags.items())
    }
