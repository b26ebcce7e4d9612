"""Families of transformers, built from tiny configurations: text, images, sound, and mixtures of them."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tr
from network_tools import BATCH, Inputs, Network, entry, images, tensors, tokens
from torch import nn

VOCABULARY, LENGTH, WIDTH = 64, 12, 64
TEXT: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
PLAIN = TEXT | SIZES
GROUPED = PLAIN | {"num_key_value_heads": 2}
EXPERTS = GROUPED | {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}
TOWER: dict[str, Any] = {key: value for key, value in VISION.items() if key != "num_labels"}
LATENT: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}

Model = tuple[str, str, dict[str, Any]]
"""Model class, configuration class, what the configuration is made with; both without their common ending."""

LANGUAGE: dict[str, Model] = {
    "bert": ("BertForMaskedLM", "Bert", PLAIN),
    "bert_classifier": ("BertForSequenceClassification", "Bert", PLAIN),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBert",
        TEXT | {"dim": WIDTH, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    ),
    "roberta": ("RobertaForMaskedLM", "Roberta", PLAIN),
    "albert": ("AlbertForMaskedLM", "Albert", PLAIN | {"embedding_size": 32}),
    "electra": ("ElectraForPreTraining", "Electra", PLAIN | {"embedding_size": 32}),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        "DebertaV2",
        PLAIN | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "mobilebert": (
        "MobileBertForMaskedLM",
        "MobileBert",
        PLAIN | {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2", TEXT | {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeo",
        TEXT
        | {"hidden_size": WIDTH, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64, "window_size": 4}
        | {"attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoX", PLAIN | {"rotary_pct": 0.25}),
    "gptj": (
        "GPTJForCausalLM",
        "GPTJ",
        TEXT | {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPT",
        PLAIN | {"ffn_dim": 96, "word_embed_proj_dim": WIDTH},
    ),
    "bloom": ("BloomForCausalLM", "Bloom", TEXT | {"hidden_size": WIDTH, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconForCausalLM", "Falcon", PLAIN | {"multi_query": True, "ffn_hidden_size": 96}),
    "falcon_grouped": (
        "FalconForCausalLM",
        "Falcon",
        PLAIN | {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 96},
    ),
    "llama_mha": ("LlamaForCausalLM", "Llama", PLAIN | {"num_key_value_heads": 4}),
    "llama_gqa": ("LlamaForCausalLM", "Llama", GROUPED),
    "llama_mqa": ("LlamaForCausalLM", "Llama", PLAIN | {"num_key_value_heads": 1}),
    "llama_head_dim": ("LlamaForCausalLM", "Llama", GROUPED | {"head_dim": 24}),
    "mistral": ("MistralForCausalLM", "Mistral", GROUPED | {"sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3", GROUPED | {"head_dim": 24}),
    "gemma": ("GemmaForCausalLM", "Gemma", GROUPED | {"head_dim": 24}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2", GROUPED | {"head_dim": 24, "sliding_window": 4}),
    "phi": ("PhiForCausalLM", "Phi", PLAIN | {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3ForCausalLM", "Phi3", GROUPED),
    "stablelm": ("StableLmForCausalLM", "StableLm", GROUPED | {"partial_rotary_factor": 0.25}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2", GROUPED),
    "mixtral": ("MixtralForCausalLM", "Mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2Moe",
        EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 48},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3Moe", EXPERTS | {"num_experts": 4, "head_dim": 24}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3",
        EXPERTS | LATENT | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "mamba": ("MambaForCausalLM", "Mamba", TEXT | {"hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 8}),
}
"""One stack, called with token numbers."""

SEQUENCE: dict[str, Model] = {
    "t5": (
        "T5ForConditionalGeneration",
        "T5",
        TEXT | {"d_model": WIDTH, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "t5_gated": (
        "T5ForConditionalGeneration",
        "T5",
        TEXT
        | {"d_model": WIDTH, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
        | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "Bart",
        TEXT
        | {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64},
    ),
}
"""Encoder and decoder, called with two sequences of token numbers."""

IMAGE: dict[str, Model] = {
    "vit": ("ViTForImageClassification", "ViT", VISION),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiT", VISION),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2", VISION | {"mlp_ratio": 2}),
    "swin": (
        "SwinForImageClassification",
        "Swin",
        {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [4, 8], "window_size": 4},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNext",
        {"num_stages": 3, "hidden_sizes": [32, 48, 64], "depths": [1, 2, 1], "image_size": 32},
    ),
    "resnet": (
        "ResNetForImageClassification",
        "ResNet",
        {"embedding_size": 32, "hidden_sizes": [64, 96, 128], "depths": [2, 2, 1]},
    ),
    "regnet": (
        "RegNetForImageClassification",
        "RegNet",
        {"embedding_size": 32, "hidden_sizes": [32, 64, 96], "depths": [1, 2, 1], "groups_width": 16},
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "Segformer",
        {"hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [4, 4, 4, 4]}
        | {"decoder_hidden_size": 32, "num_labels": 5},
    ),
    "mobilevit": (
        "MobileViTForImageClassification",
        "MobileViT",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [16, 16, 32, 48, 64, 64, 64]},
    ),
    "clip_vision": ("CLIPVisionModelWithProjection", "CLIPVision", TOWER | {"projection_dim": 32}),
    "siglip_vision": ("SiglipVisionModel", "SiglipVision", TOWER),
}
"""Called with `pixel_values` of the configuration's size, 64 where it has none."""


def _build(model: Model) -> nn.Module:
    kind, config, values = model
    return getattr(tr, kind)(getattr(tr, f"{config}Config")(**values))


def _sequences() -> Inputs:
    ids = tokens(VOCABULARY, LENGTH)()[0][0]
    return (), {"input_ids": ids, "decoder_input_ids": tokens(VOCABULARY, LENGTH - 4)()[0][0]}


def _pictures_and_text() -> Inputs:
    """The last token is the highest, where CLIP reads the text."""
    ids = tokens(VOCABULARY - 1, LENGTH)()[0][0]
    ids[:, -1] = VOCABULARY - 1
    return (), {"input_ids": ids, "pixel_values": torch.randn(BATCH, 3, 32, 32)}


def _clip() -> nn.Module:
    text = PLAIN | {"eos_token_id": VOCABULARY - 1}
    return tr.CLIPModel(tr.CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=32))


def _siglip() -> nn.Module:
    return tr.SiglipModel(tr.SiglipConfig(text_config=PLAIN | {"projection_size": WIDTH}, vision_config=TOWER))


def _blip() -> nn.Module:
    text = PLAIN | {"encoder_hidden_size": WIDTH, "projection_dim": 32, "sep_token_id": 2}
    return tr.BlipForConditionalGeneration(tr.BlipConfig(text_config=text, vision_config=TOWER, projection_dim=32))


IMAGE_TOKEN = VOCABULARY  # none that `tokens` draws


def _llava() -> nn.Module:
    config = tr.LlavaConfig(
        vision_config=tr.CLIPVisionConfig(**TOWER),
        text_config=tr.LlamaConfig(**GROUPED | {"vocab_size": VOCABULARY + 1}),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    return tr.LlavaForConditionalGeneration(config)


class Question(nn.Module):
    """A picture's place in the text is fixed: one token for each of its 16 patches, in front."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> Any:
        places = torch.full((input_ids.shape[0], 16), IMAGE_TOKEN)
        return self.model(input_ids=torch.cat([places, input_ids], 1), pixel_values=pixel_values)


def _whisper() -> nn.Module:
    sizes = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 16}
    places = {"max_source_positions": 20, "max_target_positions": 32, "decoder_start_token_id": 1}
    return tr.WhisperForConditionalGeneration(tr.WhisperConfig(**TEXT, **sizes, **heads, **places))


def _sound_and_text() -> Inputs:
    ids = tokens(VOCABULARY, LENGTH)()[0][0]
    return (), {"input_features": torch.randn(BATCH, 16, 40), "decoder_input_ids": ids}


def _wav2vec2() -> nn.Module:
    convs = {"conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3)}
    places = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    return tr.Wav2Vec2ForCTC(tr.Wav2Vec2Config(**PLAIN, **convs, **places))


def _detr() -> nn.Module:
    backbone = tr.ResNetConfig(
        embedding_size=32, hidden_sizes=[64, 96], depths=[1, 1], out_features=["stage2"], num_channels=3
    )
    sizes = {"d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 6, "num_labels": 5}
    own = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    return tr.DetrForObjectDetection(tr.DetrConfig(backbone_config=backbone, **own, **sizes, **heads))


def _vit_mae() -> nn.Module:
    decoder = {"decoder_hidden_size": 32, "decoder_intermediate_size": 48, "decoder_num_hidden_layers": 2}
    return tr.ViTMAEForPreTraining(tr.ViTMAEConfig(**TOWER, **decoder, decoder_num_attention_heads=4))


def _masked_picture() -> Inputs:
    """The noise decides which patches are hidden; without it every call would hide others."""
    return (), {"pixel_values": torch.randn(BATCH, 3, 32, 32), "noise": torch.rand(BATCH, 16)}


OTHER: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "clip": (_clip, _pictures_and_text),
    "siglip": (_siglip, _pictures_and_text),
    "blip": (_blip, _pictures_and_text),
    "llava": (lambda: Question(_llava()), _pictures_and_text),
    "whisper": (_whisper, _sound_and_text),
    "wav2vec2": (_wav2vec2, tensors((400,), "input_values")),
    "detr": (_detr, images(64, name="pixel_values")),
    "vit_mae": (_vit_mae, _masked_picture),
}


def _listed(name: str, model: Model, inputs: Callable[[], Inputs]) -> Network:
    return entry("transformers", name, lambda: _build(model), inputs)


def transformers_networks() -> list[Network]:
    """All of the above."""
    text = tokens(VOCABULARY, LENGTH, "input_ids")
    found = [_listed(name, model, text) for name, model in LANGUAGE.items()]
    found += [_listed(name, model, _sequences) for name, model in SEQUENCE.items()]
    found += [
        _listed(name, model, images(model[2].get("image_size", 64), name="pixel_values"))
        for name, model in IMAGE.items()
    ]
    return found + [entry("transformers", name, make, inputs) for name, (make, inputs) in OTHER.items()]
