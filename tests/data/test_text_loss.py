"""The loss of a batch of text: which tokens it predicts, and that padding has no part in it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.core.errors import DataError
from secateur.core.method import Batch
from secateur.data.batches import loss_of, task_loss


class Bigram(nn.Module):
    """Logits of the next token from the token alone, whatever else it is given."""

    def __init__(self, vocabulary=9):
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)

    def forward(self, input_ids=None, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None):
        return self.table(input_ids if decoder_input_ids is None else decoder_input_ids)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Bigram()


def ids(rows=2, length=6, seed=0):
    return torch.randint(1, 9, (rows, length), generator=torch.Generator().manual_seed(seed))


def plain(model, tokens):
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def test_a_mask_of_ones_changes_nothing_and_is_not_taken_for_the_tokens(model):
    tokens = ids()
    batch = Batch(kwargs={"attention_mask": torch.ones_like(tokens), "input_ids": tokens})
    assert torch.equal(task_loss(model, batch), task_loss(model, Batch((tokens,))))
    torch.testing.assert_close(task_loss(model, batch), plain(model, tokens))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float32])
def test_a_padded_sequence_has_the_loss_that_it_has_alone(model, side, kind):
    tokens, padding = ids(1), torch.zeros(1, 4, dtype=torch.int64)
    parts = [padding, tokens] if side == "left" else [tokens, padding]
    padded = torch.cat(parts, 1)
    batch = Batch(kwargs={"input_ids": padded, "attention_mask": (padded != 0).to(kind)})
    torch.testing.assert_close(task_loss(model, batch), plain(model, tokens))


def test_every_real_token_counts_the_same_whatever_its_sequence(model):
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[1, 3:] = 0
    losses = [*plain_each(model, tokens[:1]), *plain_each(model, tokens[1:, :3])]
    found = task_loss(model, Batch(kwargs={"input_ids": tokens, "attention_mask": mask}))
    torch.testing.assert_close(found, torch.stack(losses).mean())


def plain_each(model, tokens):
    return F.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:], reduction="none")


def test_a_sequence_of_padding_costs_nothing(model):
    tokens = ids(1)
    batch = Batch(kwargs={"input_ids": tokens, "attention_mask": torch.zeros_like(tokens)})
    assert task_loss(model, batch) == 0


def test_a_decoder_is_judged_by_its_own_tokens(model):
    tokens, other = ids(2, 6), ids(2, 6, seed=1)
    mask = torch.ones_like(tokens)
    mask[:, 2:] = 0  # the encoder's
    batch = Batch(kwargs={"input_ids": other, "attention_mask": mask, "decoder_input_ids": tokens})
    torch.testing.assert_close(task_loss(model, batch), plain(model, tokens))


def test_neither_labels_nor_text_is_refused():
    for batch in (Batch((torch.zeros(2, 3),)), Batch(kwargs={"attention_mask": torch.ones(2, 3, dtype=torch.int64)})):
        with pytest.raises(DataError, match="no labels and is not text"):
            loss_of(torch.zeros(2, 3, 4), batch)
