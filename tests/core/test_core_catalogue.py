import sys
from dataclasses import replace
from types import ModuleType

import pytest
from pydantic import Field

from secateur.api import methods
from secateur.core import catalogue
from secateur.core.catalogue import canonical, collect, find
from secateur.core.errors import SettingsError, UnknownNameError
from secateur.core.method import Settings

OWN = methods()["wanda"]


class Described(Settings):
    strength: float = Field(0.5, description="how strong")


class Undescribed(Settings):
    fine: int = Field(1, description="described")
    strength: float = 0.5


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two methods, one of them in a sub-package, and a module without one."""
    for path, text in {
        "__init__.py": "",
        "one.py": "from secateur.methods.weights.random import method",
        "helper.py": "method = 'no Method'",
        "deeper/__init__.py": "",
        "deeper/two.py": "from secateur.methods.llm.wanda import method",
    }.items():
        (tmp_path / "fakemethods" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fakemethods" / path).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "fakemethods"
    for name in [name for name in sys.modules if name.startswith("fakemethods")]:
        del sys.modules[name]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make distributions with entry points importable, the way pip leaves them."""

    def fake(name, value, **objects):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[secateur.methods]\n{name} = {value}\n")
        if objects:
            module = ModuleType(value.partition(":")[0])
            vars(module).update(objects)
            monkeypatch.setitem(sys.modules, module.__name__, module)

    monkeypatch.syspath_prepend(tmp_path)
    return fake


def test_methods_are_found_in_all_rooms_and_sorted(package):
    assert list(collect("fakemethods")) == ["random", "wanda"]


def test_two_methods_of_one_name_are_refused(package):
    (package / "again.py").write_text("from secateur.methods.llm.wanda import method")
    with pytest.raises(SettingsError, match=r"fakemethods\.deeper\.two: a method named 'wanda' exists already"):
        collect("fakemethods")


@pytest.mark.parametrize("value", ["thirdparty", "thirdparty:method", "thirdparty:other"])
def test_third_parties_register_by_entry_point(package, install, value):
    theirs = replace(OWN, name="their_method", settings=Described)
    install("theirs", value, **{value.partition(":")[2] or "method": theirs})
    found = collect("fakemethods")
    assert list(found) == ["random", "their_method", "wanda"]
    assert found["their_method"] is theirs


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "wanda"}, "thirdparty: a method named 'wanda' exists already"),
        ({"name": "their-method"}, "thirdparty: write the name 'their-method' as 'their_method'"),
        ({"name": "TheirMethod"}, "thirdparty: write the name 'TheirMethod' as 'theirmethod'"),
        ({"name": "x", "settings": Undescribed}, "thirdparty: setting 'strength' has no description"),
        ({"name": "x", "tags": {"when": "after"}}, "thirdparty: tags must be a Tags record"),
    ],
)
def test_what_third_parties_may_not_do(package, install, change, says):
    install("theirs", "thirdparty", method=replace(OWN, **change))
    with pytest.raises(SettingsError, match=says):
        collect("fakemethods")


def test_something_else_than_a_method_is_refused(package, install):
    install("theirs", "thirdparty:number", number=3)
    with pytest.raises(SettingsError, match="thirdparty:number is not a Method"):
        collect("fakemethods")


@pytest.mark.parametrize("value", ["no_such_module_of_theirs", "thirdparty:missing"])
def test_a_third_party_that_cannot_be_loaded_is_named(package, install, value):
    install("theirs", value, **({"other": 1} if ":" in value else {}))
    with pytest.raises(SettingsError, match=f"method 'theirs' \\({value}\\) .*cannot be loaded.*uninstall"):
        collect("fakemethods")


def test_hyphens_underscores_and_case_are_the_same():
    assert canonical(" Global-Magnitude ") == "global_magnitude"
    for name in ("global-magnitude", "global_magnitude", "Global_Magnitude"):
        assert find(methods(), name) is methods()["global_magnitude"]


def test_unknown_names_give_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown method 'global-magnitud'; did you mean global_magnitude"):
        find(methods(), "global-magnitud")
    with pytest.raises(UnknownNameError, match=r"unknown method 'wnada'; did you mean wanda\b"):
        find(methods(), "wnada")
    with pytest.raises(UnknownNameError, match=r"unknown method 'qqqq'; known: .*sparsegpt.*wanda"):
        find(methods(), "qqqq")


def test_entries_carry_what_the_command_line_promises():
    for name, method in methods().items():
        entry = method.to_json()
        assert {"name", "paper", "title", "kind", "tags", "settings"} <= entry.keys()
        assert entry["name"] == name == canonical(name)
        assert all(entry[key] for key in ("paper", "title", "citation", "formula", "kind"))
        assert all(row["help"] and {"name", "type", "default"} <= row.keys() for row in entry["settings"])


def test_the_group_of_entry_points_is_the_documented_one():
    assert catalogue.ENTRY_POINTS == "secateur.methods"
