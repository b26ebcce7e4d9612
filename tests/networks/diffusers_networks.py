"""Denoisers and autoencoders of diffusers, built from tiny configurations."""

from typing import Any

import torch
from network_tools import BATCH, Inputs, Network, entry, images
from torch import nn

SMALL: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": 16,
    },
    "UNet2DConditionModel": {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
    },
    "AutoencoderKL": {
        "sample_size": 32,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "norm_num_groups": 8,
    },
    "DiTTransformer2DModel": {
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_embeds_ada_norm": 10,
        "out_channels": 8,
    },
    "PixArtTransformer2DModel": {
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "cross_attention_dim": 64,
        "caption_channels": 24,
        "use_additional_conditions": False,
    },
    "FluxTransformer2DModel": {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "axes_dims_rope": (4, 6, 6),
    },
    "SD3Transformer2DModel": {
        "sample_size": 8,
        "in_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "joint_attention_dim": 24,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 20,
        "out_channels": 4,
        "pos_embed_max_size": 16,
    },
}


def _build(kind: str) -> nn.Module:
    import diffusers

    return getattr(diffusers, kind)(**SMALL[kind])


def _steps() -> torch.Tensor:
    return torch.tensor([3, 700])


def _unet() -> Inputs:
    return (torch.randn(BATCH, 3, 16, 16), _steps()), {}


def _conditional_unet() -> Inputs:
    return (torch.randn(BATCH, 4, 16, 16), _steps(), torch.randn(BATCH, 5, 24)), {}


def _dit() -> Inputs:
    return (torch.randn(BATCH, 4, 8, 8),), {"timestep": _steps(), "class_labels": torch.tensor([1, 7])}


def _pixart() -> Inputs:
    captions = {"encoder_hidden_states": torch.randn(BATCH, 5, 24), "timestep": _steps()}
    return (torch.randn(BATCH, 4, 8, 8),), captions


def _flux() -> Inputs:
    places = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1)
    return (), {
        "hidden_states": torch.randn(BATCH, 16, 16),
        "encoder_hidden_states": torch.randn(BATCH, 5, 24),
        "pooled_projections": torch.randn(BATCH, 20),
        "timestep": torch.tensor([0.1, 0.8]),
        "img_ids": places.reshape(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def _sd3() -> Inputs:
    return (), {
        "hidden_states": torch.randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": torch.randn(BATCH, 5, 24),
        "pooled_projections": torch.randn(BATCH, 20),
        "timestep": _steps(),
    }


def diffusers_networks() -> list[Network]:
    """All of the above; nothing is imported before one is built."""
    table = {
        "unet2d": ("UNet2DModel", _unet),
        "unet2d_condition": ("UNet2DConditionModel", _conditional_unet),
        "autoencoder_kl": ("AutoencoderKL", images(32)),
        "dit": ("DiTTransformer2DModel", _dit),
        "pixart": ("PixArtTransformer2DModel", _pixart),
        "flux": ("FluxTransformer2DModel", _flux),
        "sd3": ("SD3Transformer2DModel", _sd3),
    }
    return [entry("diffusers", name, lambda kind=kind: _build(kind), inputs) for name, (kind, inputs) in table.items()]
