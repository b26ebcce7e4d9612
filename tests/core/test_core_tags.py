import json
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.api import methods
from secateur.core import tags as t
from secateur.core.catalogue import select
from secateur.core.errors import SettingsError, UnknownNameError

PLAIN = t.Tags(
    speedup=frozenset({t.Speedup.STRUCTURED}),
    when=frozenset({t.When.AFTER_TRAINING}),
    criterion=frozenset({t.Criterion.MAGNITUDE, t.Criterion.RANDOM}),
    granularity=frozenset({t.Granularity.WEIGHT}),
    schedule=t.Schedule.ONE_SHOT,
    data=t.Data.DATA_FREE,
    weights=t.Weights.PRETRAINED,
    recovery=t.Recovery.NONE,
    allocation=t.Allocation.GLOBAL,
    supervision=t.Supervision.UNSUPERVISED,
    domain=frozenset({t.Domain.CNN}),
)


SURVEY = {  # Cheng, Zhang, Shi 2023: their axes for papers of the list
    "layer_lottery": {"speedup": "structured", "when": "before_training", "criterion": "sensitivity_saliency",
                      "granularity": {"layer", "block"}, "schedule": "one_shot", "weights": "initialized"},
    "trp": {"speedup": "structured", "when": "during_training", "criterion": "rank", "learn": "sparsity_regularization",
            "fusion": "tensor_decomposition", "granularity": {"matrix", "rank"}, "schedule": "iterative",
            "data": "data_free", "weights": "initialized"},
    "oracle": {"speedup": "structured", "when": "after_training", "criterion": "loss_change", "granularity": {"filter"},
               "schedule": "one_shot", "data": "data_driven", "weights": "pretrained"},
    "lapp": {"speedup": "structured", "when": "during_training", "criterion": "lp_norm", "granularity": {"filter"},
             "weights": "initialized"},
}  # fmt: skip


@pytest.mark.parametrize("name", SURVEY)
def test_methods_are_where_the_survey_has_them(name):
    tags = methods()[name].tags
    for axis, expected in SURVEY[name].items():
        found = getattr(tags, axis)
        values = {one.value for one in found} if isinstance(found, frozenset) else {found.value}
        assert {expected} <= values if isinstance(expected, str) else expected <= values, axis


@st.composite
def records(draw):
    values = {}
    for name, (kind, is_set) in t.axes().items():
        one = st.booleans() if kind is bool else st.sampled_from(list(kind))
        values[name] = draw(st.frozensets(one, max_size=3) if is_set else one)
    return t.Tags(**values)


@settings(deadline=None, max_examples=60)
@given(records())
def test_json_round_trip(record):
    text = json.dumps(record.to_json(), sort_keys=True)
    back = t.Tags.from_json(json.loads(text))
    assert back == record
    assert json.dumps(back.to_json(), sort_keys=True) == text
    assert all(values == sorted(values) for values in record.to_json().values() if isinstance(values, list))


@settings(deadline=None, max_examples=60)
@given(records())
def test_universal_means_structured_and_nothing_else(record):
    assert record.universal == (sorted(record.speedup) == ["structured"])


@settings(deadline=None, max_examples=40)
@given(records())
def test_matches_agrees_with_the_exported_record(record):
    for axis, values in record.to_json().items():
        kind = t.axes()[axis][0]
        allowed = ["true", "false"] if kind is bool else [member.value for member in kind]
        mine = [str(value).lower() for value in (values if isinstance(values, list) else [values])]
        assert [value for value in allowed if record.matches(axis, value)] == [v for v in allowed if v in mine]


def test_the_survey_s_values_are_all_there():
    survey = {
        "speedup": "unstructured semi_structured structured",
        "when": "before_training during_training after_training run_time early_training",
        "criterion": "magnitude lp_norm sensitivity_saliency loss_change random activation similarity entropy "
        "attention rank learned cost_model",
        "learn": "sparsity_regularization meta_learning graph_neural_network reinforcement_learning evolutionary "
        "bilevel end_to_end_mask",
        "fusion": "quantization tensor_decomposition nas distillation lora mixture_of_experts",
        "granularity": "layer filter channel neuron head block matrix embedding weight other expert rank token edge "
        "sample step agent condition",
        "schedule": "one_shot iterative",
        "data": "data_free data_driven",
        "weights": "initialized pretrained",
        "recovery": "scratch fine_tune rewind none",
        "task": "original transfer",
        "runtime": "static dynamic",
        "allocation": "local global learned searched",
        "supervision": "supervised semi self unsupervised",
        "domain": "cnn vit bert llm diffusion vlm detection other",
    }
    for axis, words in survey.items():
        allowed = {member.value for member in t.axes()[axis][0]} - {"not_applicable"}
        assert allowed == set(words.split()), axis
    assert t.axes().keys() == survey.keys() | {"physical", "post_training"}


def test_pruning_without_weights_can_say_so():
    for axis in ("speedup", "when", "schedule", "data", "weights", "recovery", "allocation", "supervision"):
        kind, is_set = t.axes()[axis]
        value = kind("not_applicable")
        record = replace(PLAIN, **{axis: frozenset({value}) if is_set else value})
        assert record.matches(axis, "not_applicable")


@pytest.mark.parametrize("axis", [item.name for item in fields(t.Tags)])
def test_an_unknown_value_is_refused_with_the_allowed_ones(axis):
    kind, is_set = t.axes()[axis]
    allowed = "True, False" if kind is bool else ", ".join(kind)
    values = ["post-training", None, 3]
    if kind is not bool:
        values.append(next(iter(kind)).value)  # the right word as free text is still no member
    if is_set:
        values += [frozenset({"x"}), [next(iter(kind))], frozenset({next(iter(kind)), "x"})]
    for value in values:
        with pytest.raises(SettingsError) as error:
            replace(PLAIN, **{axis: value})
        assert f"tag {axis}=" in str(error.value)
        assert str(error.value).endswith(f"is not allowed; allowed: {allowed}")


def test_a_missing_axis_is_an_error_when_the_record_is_made():
    with pytest.raises(TypeError, match="schedule"):
        t.Tags(**{item.name: getattr(PLAIN, item.name) for item in fields(PLAIN) if item.name != "schedule"})


def test_stored_records_are_checked_too():
    stored = PLAIN.to_json()
    with pytest.raises(SettingsError, match="tag schedule='twice' is not allowed; allowed: one_shot, iterative"):
        t.Tags.from_json({**stored, "schedule": "twice"})
    with pytest.raises(SettingsError, match="tag when='later' is not allowed; allowed: before_training"):
        t.Tags.from_json({**stored, "when": ["after_training", "later"]})
    with pytest.raises(SettingsError, match="tag physical='false' is not allowed"):
        t.Tags.from_json({**stored, "physical": "false"})
    with pytest.raises(SettingsError, match="tag 'colour' is no tag"):
        t.Tags.from_json({**stored, "colour": "red"})
    with pytest.raises(SettingsError, match="tag 'when' is missing"):
        t.Tags.from_json({axis: value for axis, value in stored.items() if axis != "when"})


def test_a_single_value_stands_for_a_set_of_one():
    assert replace(PLAIN, domain=t.Domain.LLM).domain == frozenset({t.Domain.LLM})
    assert replace(PLAIN, domain={t.Domain.LLM, t.Domain.VIT}).domain == frozenset({t.Domain.LLM, t.Domain.VIT})
    assert hash(PLAIN) == hash(replace(PLAIN))


def test_granularity_codes_round_trip():
    codes = [word.code for word in t.Granularity]
    assert len(set(codes)) == len(codes)
    assert [t.Granularity.from_code(code) for code in codes] == list(t.Granularity)
    letters = {"L": "layer", "F": "filter", "C": "channel", "N": "neuron", "H": "head", "B": "block", "M": "matrix"}
    letters |= {"E": "embedding", "W": "weight", "Other": "other"}
    assert {code: t.Granularity.from_code(code).value for code in letters} == letters
    with pytest.raises(ValueError, match="X"):
        t.Granularity.from_code("X")


def test_unknown_axes_and_values_give_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown tag 'scedule'; did you mean schedule"):
        PLAIN.matches("scedule", "one_shot")
    with pytest.raises(UnknownNameError, match="value of the tag when 'after'; did you mean after_training"):
        PLAIN.matches("when", "after")
    assert PLAIN.matches("when", "After_Training")


# --- small-scale check 1 of the survey's note, over the whole catalogue --------------------------


def test_every_registered_method_has_every_tag():
    assert methods()
    for name, method in methods().items():
        stored = json.loads(json.dumps(method.to_json()))["tags"]
        assert stored.keys() == t.axes().keys(), name
        assert t.Tags.from_json(stored) == method.tags, name
        required = [axis for axis, (_, is_set) in t.axes().items() if is_set and axis not in ("learn", "fusion")]
        assert all(getattr(method.tags, axis) for axis in required), name
        assert method.tags.universal == (method.tags.speedup == {t.Speedup.STRUCTURED}), name


@pytest.mark.parametrize("axis", list(t.axes()))
def test_filtering_the_catalogue_partitions_it(axis):
    kind, is_set = t.axes()[axis]
    allowed = ["true", "false"] if kind is bool else [member.value for member in kind]
    found = {value: set(select(methods(), {axis: value})) for value in allowed}
    for name, method in methods().items():
        stored = method.tags.to_json()[axis]
        mine = {str(value).lower() for value in (stored if is_set else [stored])}
        assert {value for value in allowed if name in found[value]} == mine


def test_filters_combine_as_intersection():
    base = methods()["wanda"]
    some = {
        f"{schedule}_{data}": replace(base, tags=replace(PLAIN, schedule=schedule, data=data))
        for schedule in (t.Schedule.ONE_SHOT, t.Schedule.ITERATIVE)
        for data in (t.Data.DATA_FREE, t.Data.DATA_DRIVEN)
    }
    assert list(select(some, {"schedule": "iterative", "data": "data_free"})) == ["iterative_data_free"]
    assert list(select(some, {"schedule": "iterative"})) == ["iterative_data_free", "iterative_data_driven"]
    # every value of a set counts
    assert len(select(some, {"criterion": "magnitude"})) == len(select(some, {"criterion": "random"})) == 4
    assert select(some, {"criterion": "magnitude", "data": "not_applicable"}) == {}
    assert select(some, {}) == some
