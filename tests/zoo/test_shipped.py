"""Every shipped model: loads, is as good as its card says, is small, and works with plain transformers."""

import json

import pytest
import torch

from secateur import zoo
from secateur.core.errors import ModelError
from secateur.measure import tasks
from secateur.zoo.catalogue import WEIGHTS
from secateur.zoo.loading import load_from
from secateur.zoo.text import corpus

NAMES = zoo.names()
LLAMAS = [name for name in NAMES if name.startswith("pydoc")]
SKILLS = "skills-llama"


@pytest.mark.parametrize("name", NAMES)
def test_quality_is_the_card_s(name):
    entry, card = zoo.get(name), zoo.card(name)
    if zoo.data_digest(entry.data) != card["data_digest"]:
        if entry.data == "digits":
            pytest.fail("scikit-learn's digits are not those the model was trained on")
        pytest.skip(f"this Python's pydoc topics differ from those of Python {card['versions']['python']}")
    model = zoo.load_model(name)
    assert not model.training
    measured = zoo.quality(model, zoo.load_data(entry.data).evaluation)
    assert measured.keys() == card["quality"].keys()
    if "accuracy" in measured:
        assert measured["accuracy"] == pytest.approx(card["quality"]["accuracy"], abs=0.001)
    else:
        assert measured["perplexity"] == pytest.approx(card["quality"]["perplexity"], rel=0.005)


@pytest.mark.parametrize(
    ("name", "key", "low", "high"),
    [
        ("digits-mlp", "accuracy", 0.975, 1),
        ("digits-resnet", "accuracy", 0.98, 1),
        ("digits-vit", "accuracy", 0.96, 1),
        ("pydoc-llama", "perplexity", 3.9, 4.3),
        ("pydoc-llama-gqa", "perplexity", 3.9, 4.4),
        (SKILLS, "perplexity", 1.8, 2.0),
    ],
)
def test_cards_promise_enough(name, key, low, high):
    assert low <= zoo.card(name)["quality"][key] <= high


@pytest.mark.parametrize("name", NAMES)
def test_card_describes_the_model_and_the_recipe(name):
    entry, card, model = zoo.get(name), zoo.card(name), zoo.load_model(name)
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    assert card["recipe"] == json.loads(json.dumps(vars(entry.recipe)))
    assert (card["name"], card["factory"], card["data"]) == (entry.name, entry.factory, entry.data)
    assert {"python", "torch", "transformers"} <= card["versions"].keys()
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_files_are_small_and_never_pickles(name):
    files = [path for path in zoo.folder(name).rglob("*") if path.is_file()]
    assert WEIGHTS in {path.name for path in files}
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
    assert max(path.stat().st_size for path in files) < 3_000_000


@pytest.mark.parametrize("name", LLAMAS)
def test_tokenizer_round_trips_text_and_adds_nothing(name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo.folder(name))
    everything = "".join(map(chr, range(128)))
    ids = tokenizer(everything)["input_ids"]
    assert ids == list(range(128))
    assert tokenizer.decode(ids) == everything
    text = corpus()[:20_000] + "  two  spaces , and ' punctuation . \r\n\t n't"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == 128


@pytest.mark.parametrize("name", LLAMAS)
def test_tokenizer_writes_a_question_mark_for_what_is_not_ascii(name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo.folder(name))
    assert tokenizer.decode(tokenizer("naïve ☃🙂!")["input_ids"]) == "na?ve ??!"


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_generates_with_plain_transformers(name):
    from transformers import AutoTokenizer, GenerationConfig

    folder, model = zoo.folder(name), zoo.load_model(name)
    assert GenerationConfig.from_pretrained(folder).eos_token_id is None
    prompt = AutoTokenizer.from_pretrained(folder)("The ", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert out.shape == (1, 12)


def test_the_model_of_skills_has_them():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo.folder(SKILLS))
    found = tasks.abilities(zoo.load_model(SKILLS), tokenizer, tasks.battery(50, seed=11))
    assert found.results.keys() == {"labels", "digits", "copying", "brackets", "arithmetic"}
    for name, result in found.results.items():
        assert result.accuracy > 0.9, name
        assert all(response.stopped for response in result.responses), name


def test_the_model_of_skills_is_stored_in_half_precision_and_its_tokenizer_ends_lines():
    from safetensors import safe_open
    from transformers import AutoTokenizer, GenerationConfig

    with safe_open(zoo.folder(SKILLS) / WEIGHTS, framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(zoo.folder(SKILLS))
    assert tokenizer.eos_token_id == GenerationConfig.from_pretrained(zoo.folder(SKILLS)).eos_token_id == ord("\n")
    assert tokenizer("3+4>\n")["input_ids"] == list(b"3+4>\n")
    assert tokenizer.decode(list(b"3+4>\nx")) == "3+4>\nx"


def test_grouped_heads_are_really_shared():
    wide, narrow = (zoo.load_model(name).model.layers[0].self_attn.k_proj.weight for name in LLAMAS)
    assert (wide.shape, narrow.shape) == ((96, 96), (48, 96))


def test_vit_processor_gives_the_range_of_the_data():
    import numpy as np
    from PIL import Image
    from transformers import AutoImageProcessor

    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    processor = AutoImageProcessor.from_pretrained(zoo.folder("digits-vit"))
    got = processor(Image.fromarray(pixels, mode="L"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(got, torch.from_numpy(pixels / np.float32(255))[None, None])


def test_loading_is_silent_and_leaves_the_bars_as_they_were(capfd):
    from transformers.utils import logging

    logging.enable_progress_bar()
    zoo.load_model("digits-vit")
    assert logging.is_progress_bar_enabled()
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize("name", ["digits-mlp", "digits-vit"])
def test_damaged_weights_are_named(tmp_path, name):
    for path in zoo.folder(name).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=f"zoo:{name}.*missing or damaged"):
        load_from(zoo.get(name), tmp_path)
    weights.unlink()
    with pytest.raises(ModelError, match=f"zoo:{name}.*missing or damaged"):
        load_from(zoo.get(name), tmp_path)
