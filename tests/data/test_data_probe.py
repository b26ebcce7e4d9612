"""Made-up inputs fit the models they are made for, and the models are left as they were."""

import pytest
import torch
import transformers as tr
from torch import nn

from secateur.data.batches import run
from secateur.data.probe import probe_for
from secateur.data.running import evaluating

TEXT = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER = SIZES | {"image_size": 32, "patch_size": 8}
PARTS = ("encoder", "decoder")
TWO = {f"{part}_{name}": n for part in PARTS for name, n in (("layers", 1), ("ffn_dim", 48), ("attention_heads", 2))}


def llama(**more):
    return tr.LlamaForCausalLM(tr.LlamaConfig(**TEXT, **SIZES, **more))


def t5():
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    return tr.T5ForConditionalGeneration(tr.T5Config(**TEXT, **sizes))


def whisper():
    places = {"max_source_positions": 20, "max_target_positions": 32, "num_mel_bins": 16, "d_model": 32}
    return tr.WhisperForConditionalGeneration(tr.WhisperConfig(**TEXT, **TWO, **places, decoder_start_token_id=1))


def clip():
    text = TEXT | SIZES | {"max_position_embeddings": 20}
    return tr.CLIPModel(tr.CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=8))


def llava():
    vision, text = tr.CLIPVisionConfig(**TOWER), tr.LlamaConfig(**TEXT | SIZES)
    return tr.LlavaForConditionalGeneration(
        tr.LlavaConfig(vision_config=vision, text_config=text, image_token_index=49, vision_feature_layer=-1)
    )


def wav2vec2():
    convs = {"conv_dim": (8, 8), "conv_stride": (5, 5), "conv_kernel": (10, 3)}
    places = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "group"}
    return tr.Wav2Vec2ForCTC(tr.Wav2Vec2Config(**TEXT, **SIZES, **convs, **places))


def spectrogram():
    return tr.ASTForAudioClassification(tr.ASTConfig(**SIZES, max_length=64, num_mel_bins=16, num_labels=3))


def video():
    return tr.VideoMAEForVideoClassification(tr.VideoMAEConfig(**TOWER, num_frames=4))


TRANSFORMERS = {
    "llama": (llama, [(2, 16)]),
    "short": (lambda: llama(max_position_embeddings=6), [(2, 6)]),
    "t5": (t5, [(2, 8), (2, 16)]),
    "whisper": (whisper, [(2, 16), (2, 16, 40)]),
    "clip": (clip, [(2, 16), (2, 3, 32, 32)]),
    "llava": (llava, [(2, 32), (2, 3, 32, 32)]),
    "vit": (lambda: tr.ViTForImageClassification(tr.ViTConfig(**TOWER)), [(2, 3, 32, 32)]),
    "wav2vec2": (wav2vec2, [(2, 16000)]),
    "spectrogram": (spectrogram, [(2, 64, 16)]),
    "video": (video, [(2, 4, 3, 32, 32)]),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformers_model_s_config_says_what_it_takes(name):
    make, shapes = TRANSFORMERS[name]
    model = make()
    probe = probe_for(model)
    assert [tuple(tensor.shape) for tensor in probe.tensors] == shapes
    with evaluating(model):
        run(model, probe)


def lenet(size):
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * size**2, 3))


class Timm(nn.Module):
    """What a timm model shows of itself."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.pretrained_cfg = {"input_size": (3, 40, 48)}

    def forward(self, x):
        assert x.shape[2:] == (40, 48)
        return self.conv(x).mean((2, 3))


class Sequence(nn.Module):
    """A linear layer that wants [samples, time, features]."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 8)

    def forward(self, x):
        samples, time, _ = x.shape
        return self.first(x).view(samples * time, 8)


MODULES = {
    "any size": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1)), (2, 2, 224, 224)),
    "digits": (lambda: lenet(28), (2, 1, 28, 28)),
    "tiny": (lambda: lenet(8), (2, 1, 8, 8)),
    "timm": (Timm, (2, 3, 40, 48)),
    "linear": (lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU()), (2, 12)),
    "sequence": (Sequence, (2, 16, 12)),
    "sound": (lambda: nn.Conv1d(2, 4, 3), (2, 2, 256)),
    "volume": (lambda: nn.Conv3d(1, 4, 3), (2, 1, 8, 64, 64)),
    "recurrent": (lambda: nn.LSTM(6, 4, batch_first=True), (2, 16, 6)),
    "tokens": (lambda: nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 3)), (2, 16)),
    "bag": (lambda: nn.Sequential(nn.EmbeddingBag(30, 8), nn.Linear(8, 3)), (2, 16)),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_s_first_layer_and_the_usual_sizes_say_what_it_takes(name):
    make, shape = MODULES[name]
    model = make()
    before = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in model.state_dict().items()}
    (found,) = probe_for(model).tensors
    assert tuple(found.shape) == shape
    model(found)
    for key, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[key][0]
        assert torch.equal(tensor, before[key][1])


def test_trying_sizes_leaves_no_trace_in_a_model_that_remembers():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.seen = nn.Conv2d(1, 2, 3), {}

        def forward(self, x):
            self.seen[x.shape] = x
            return self.conv(x)

    model = Remembers()
    assert probe_for(model) is not None
    assert model.seen == {}
    assert model.training


def test_values_come_in_the_model_s_dtype_and_without_weights():
    model = nn.Conv2d(3, 4, 3, dtype=torch.bfloat16, device="meta")
    (found,) = probe_for(model).tensors
    assert (found.dtype, found.device.type) == (torch.bfloat16, "cpu")


def test_no_guess_without_a_clear_input():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    assert probe_for(Two()) is None
    assert probe_for(nn.ReLU()) is None
