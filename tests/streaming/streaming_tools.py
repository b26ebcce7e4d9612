"""Small decoders of many families, and how streamed results are compared."""

import hashlib

import torch
import transformers as tf

BASE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**BASE, "intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES = {
    "llama": (tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**GROUPED)),
    "llama-tied": (tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "llama-deep": (tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**{**GROUPED, "num_hidden_layers": 10})),
    "mistral-window": (tf.MistralForCausalLM, lambda: tf.MistralConfig(**GROUPED, sliding_window=8)),
    "qwen2": (tf.Qwen2ForCausalLM, lambda: tf.Qwen2Config(**GROUPED)),
    "qwen3-wide-heads": (tf.Qwen3ForCausalLM, lambda: tf.Qwen3Config(**GROUPED, head_dim=16)),
    "gemma2": (tf.Gemma2ForCausalLM, lambda: tf.Gemma2Config(**GROUPED, head_dim=16, sliding_window=8)),
    "gemma3": (tf.Gemma3ForCausalLM, lambda: tf.Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=8)),
    "gpt-neox": (tf.GPTNeoXForCausalLM, lambda: tf.GPTNeoXConfig(**BASE, intermediate_size=48)),
    "gpt2": (tf.GPT2LMHeadModel, lambda: tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4)),
    "opt": (
        tf.OPTForCausalLM,
        lambda: tf.OPTConfig(**BASE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    ),
    "phi": (tf.PhiForCausalLM, lambda: tf.PhiConfig(**BASE, intermediate_size=48)),
    "phi3-fused": (tf.Phi3ForCausalLM, lambda: tf.Phi3Config(**BASE, intermediate_size=48, pad_token_id=0)),
    "llama-yarn": (
        tf.LlamaForCausalLM,
        lambda: tf.LlamaConfig(
            **GROUPED, max_position_embeddings=64, rope_scaling={"rope_type": "yarn", "factor": 4.0}
        ),
    ),
    "mixtral": (tf.MixtralForCausalLM, lambda: tf.MixtralConfig(**GROUPED, num_local_experts=4)),
    "qwen2-moe": (
        tf.Qwen2MoeForCausalLM,
        lambda: tf.Qwen2MoeConfig(
            **GROUPED,
            num_experts=4,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
            num_experts_per_tok=2,
        ),
    ),
}


def build(family, folder, seed=0, dtype=torch.float32):
    """A model with random weights, saved in several shards."""
    kind, config = FAMILIES[family]
    torch.manual_seed(seed)
    model = kind(config()).eval().to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB")
    return tf.AutoModelForCausalLM.from_pretrained(folder).eval()


def tokens(windows=12, length=24, seed=1):
    return torch.randint(1, 96, (windows, length), generator=torch.Generator().manual_seed(seed))


def digests(folder):
    """Relative name -> hash of every file but the ones that hold times."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "stream.json"
    }
