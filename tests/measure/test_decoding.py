import pytest
import torch
from torch import nn

from secateur import zoo
from secateur.core.errors import ModelError
from secateur.measure.decoding import decoding


def test_a_model_with_fewer_layers_decodes_faster():
    model, short = zoo.load_model("pydoc-llama"), zoo.load_model("pydoc-llama")
    short.model.layers = nn.ModuleList(list(short.model.layers)[:1])
    short.config.num_hidden_layers = 1
    found = decoding({"dense": model, "short": short}, prompt=32, tokens=8, rounds=3, batch=2)
    dense = found["dense"]
    assert found["short"].decode > dense.decode
    assert dense.prefill == pytest.approx(2 * 32 / (dense.first_token / 1e3))
    assert (dense.prompt, dense.tokens, dense.batch, dense.rounds) == (32, 8, 2, 3)
    assert set(dense.to_json()) >= {"prefill", "decode", "first_token"}


def test_the_cache_is_used():
    model = zoo.load_model("pydoc-llama")
    lengths = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    decoding({"a": model}, prompt=16, tokens=4, rounds=1)
    assert lengths == [16, 1, 1, 1] * 2  # one round to warm up


def test_models_without_a_cache_are_refused():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(8, 4)

        def get_input_embeddings(self):
            return self.embed

        def forward(self, ids, use_cache):
            return type("Out", (), {"logits": torch.zeros(*ids.shape, 8)})()

    with pytest.raises(ModelError, match="keeps no key/value cache"):
        decoding({"a": Plain()}, prompt=4, tokens=2, rounds=1)
