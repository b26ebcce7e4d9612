"""Small models of many families with random weights, and two batches with different padding for each."""

import torch
import transformers as tr
from torch import nn
from torch.nn import functional as F

from secateur.core.method import Batch

VOCABULARY, LENGTH = 40, 10
TEXT = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}


def llama(**more):
    return tr.LlamaForCausalLM(tr.LlamaConfig(**TEXT, **SIZES | {"num_key_value_heads": 2} | more))


def gpt2():
    return tr.GPT2LMHeadModel(tr.GPT2Config(**TEXT, n_embd=16, n_layer=3, n_head=2, n_positions=32))


def opt():
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 3}
    return tr.OPTForCausalLM(tr.OPTConfig(**TEXT, **sizes, num_attention_heads=2, max_position_embeddings=32))


def bert():
    return tr.BertForMaskedLM(tr.BertConfig(**TEXT, **SIZES, max_position_embeddings=32))


def vit():
    return tr.ViTForImageClassification(tr.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=5))


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2}
    return tr.T5ForConditionalGeneration(tr.T5Config(**TEXT, **sizes, decoder_start_token_id=0))


def mixtral():
    experts = {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    return tr.MixtralForCausalLM(tr.MixtralConfig(**TEXT, **SIZES, **experts))


def gemma3():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    own = {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4, "layer_types": kinds}
    return tr.Gemma3ForCausalLM(tr.Gemma3TextConfig(**TEXT, **SIZES, **own))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, 2)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmLikeViT(nn.Module):
    """Patch embedding by convolution, class token, `blocks` a Sequential, fused qkv: timm's shape."""

    def __init__(self, width=16, depth=3):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1))
        return self.head(self.norm(x)[:, 0])


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        plain = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if plain else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """A stem and two stages of two blocks each; the first block of the second stage shrinks the image."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.stage1 = nn.Sequential(Residual(4, 4), Residual(4, 4))
        self.stage2 = nn.Sequential(Residual(4, 8, 2), Residual(8, 8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.stage2(self.stage1(self.stem(x))).mean((2, 3)))


# name -> (factory, names of the stacks in which a hidden state flows)
MODELS = {
    "llama": (llama, ["model.layers"]),
    "gpt2": (gpt2, ["transformer.h"]),
    "opt": (opt, ["model.decoder.layers"]),
    "bert": (bert, ["bert.encoder.layer"]),
    "vit": (vit, ["vit.layers"]),
    "t5": (t5, ["encoder.block", "decoder.block"]),
    "mixtral": (mixtral, ["model.layers"]),
    "gemma3": (gemma3, ["model.layers"]),
    "timm-like": (TimmLikeViT, ["blocks"]),
    "resnet": (ResNet, ["stage1", "stage2"]),
}
IMAGES = {"vit", "timm-like", "resnet"}


def build(name):
    """The model with random weights strong enough that every block matters, in eval mode."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def tokens(count, seed=0, length=LENGTH):
    """Random token ids without the padding id."""
    return torch.randint(1, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def batches_for(name):
    """Two batches of different size; in text other samples of other lengths are padded, left and right."""
    if name in IMAGES:
        images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        return [Batch((images[:3],)), Batch((images[3:],))]
    ids = tokens(5)
    mask = torch.ones_like(ids)
    mask[0, 7:], mask[1, :2], mask[3, :4], mask[4, 5:] = 0, 0, 0, 0
    batches = []
    for part in (slice(0, 3), slice(3, 5)):
        kwargs = {"input_ids": ids[part], "attention_mask": mask[part]}
        if name == "t5":
            kwargs["decoder_input_ids"] = tokens(5, seed=2, length=6)[part]
        batches.append(Batch(kwargs=kwargs))
    return batches
