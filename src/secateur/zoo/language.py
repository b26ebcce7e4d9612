"""Untrained character models of the zoo's texts, and their tokenizer: the id of a character is its ASCII code."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from secateur.core.files import write_json
from secateur.zoo.skills import END
from secateur.zoo.text import WINDOW

CHARACTERS = 128


def _llama(key_value_heads: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=CHARACTERS,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=False,
        bos_token_id=None,  # the text is one stream of characters: nothing marks a start or an end
        eos_token_id=None,
        pad_token_id=None,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def pydoc_llama() -> nn.Module:
    """A `LlamaForCausalLM`: 128 tokens, width 96, feed-forward 256, 4 layers, 4 heads, untied."""
    return _llama(4)


def pydoc_llama_gqa() -> nn.Module:
    """The same with 2 key/value heads, each shared by 2 heads."""
    return _llama(2)


def skills_llama() -> nn.Module:
    """A `LlamaForCausalLM` of 8 layers, width 128, feed-forward 256, 4 heads, untied; a line's end stops it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=CHARACTERS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=ord(END),
        pad_token_id=None,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def write_tokenizer(folder: Path, end: str | None = None) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for `AutoTokenizer`.

    One token a character, id = ASCII code. A character outside ASCII becomes `?`.

    Args:
        folder: where.
        end: the character that is the end token; without one there are no special tokens.
    """
    from tokenizers import Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import BPE

    # BPE without merges splits into characters; the default decoder would put spaces between them
    tokenizer = Tokenizer(BPE(vocab={chr(i): i for i in range(CHARACTERS)}, merges=[], unk_token="?"))
    tokenizer.decoder = Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            **({} if end is None else {"eos_token": end}),
        },
    )
