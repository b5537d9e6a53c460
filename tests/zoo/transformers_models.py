"""transformers architectures, made small from their configuration classes; random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

from tests.zoo.case import Case, Model

VOCABULARY = 99

# Sizes of a small model, for whatever configuration has an attribute of that name.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "n_embed": 32,
    "dim": 32,
    "embedding_size": 16,
    "projection_dim": 16,
    "hidden_dim": 64,
    "n_inner": 64,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "d_ff": 64,
    "d_kv": 8,
    "d_inner": 64,
    "d_head": 8,
    "head_dim": 8,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_source_positions": 64,
    "max_target_positions": 64,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "image_size": 32,
    "patch_size": 8,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "state_size": 8,
    "num_mel_bins": 16,
}


def small_config(kind: type[PreTrainedConfig], **more: Any) -> PreTrainedConfig:
    """A configuration of `kind` with SMALL where it applies, in its parts too, then `more`."""
    default = kind()
    given = {name: size for name, size in SMALL.items() if _takes(default, name)}
    for name, part in kind.sub_configs.items():
        if "model_type" in more.get(name, {}):
            continue
        inner = more.pop(name, {})
        if isinstance(part, type) and part is not PreTrainedConfig and "Auto" not in part.__name__:
            given[name] = small_config(part, **inner).to_dict()
        elif isinstance(getattr(default, name, None), PreTrainedConfig):
            given[name] = small_config(type(getattr(default, name)), **inner).to_dict()
    return kind(**(given | more))


def _takes(default: PreTrainedConfig, name: str) -> bool:
    name = default.attribute_map.get(name, name)
    if name not in default.to_dict():
        return False
    value, small = getattr(default, name), SMALL.get(name)
    return isinstance(value, (list, tuple)) == isinstance(small, tuple) and value is not dict


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape)


def text(config: Any) -> dict[str, Any]:
    ids = tokens(2, 12)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def text_pair(config: Any) -> dict[str, Any]:
    return text(config) | {"decoder_input_ids": tokens(2, 7)}


def ids_only(config: Any) -> dict[str, Any]:
    return {"input_ids": tokens(2, 12)}


def image(config: Any) -> dict[str, Any]:
    size = getattr(config, "image_size", None) or 32
    size = size if isinstance(size, (tuple, list)) else (size, size)
    return {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), *size)}


def image64(config: Any) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 64, 64)}


def waveform(config: Any) -> dict[str, Any]:
    return {"input_values": torch.randn(2, 1600)}


def image_and_text(config: Any) -> dict[str, Any]:
    vision = getattr(config, "vision_config", config)
    return text(config) | image(vision)


def sizes(**dims: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda inputs: dims


_BY_SEQUENCE = {0: "batch", 1: "sequence"}
DYNAMIC: dict[Callable[..., Any], dict[str, Any]] = {
    text: {"input_ids": _BY_SEQUENCE, "attention_mask": _BY_SEQUENCE},
    text_pair: {
        "input_ids": _BY_SEQUENCE,
        "attention_mask": _BY_SEQUENCE,
        "decoder_input_ids": {0: "batch", 1: "target"},
    },
    ids_only: {"input_ids": _BY_SEQUENCE},
    image: {"pixel_values": {0: "batch"}},
    image64: {"pixel_values": {0: "batch"}},
    waveform: {"input_values": {0: "batch"}},
    image_and_text: {
        "input_ids": _BY_SEQUENCE,
        "attention_mask": _BY_SEQUENCE,
        "pixel_values": {0: "batch"},
    },
}


def resized(inputs: dict[str, Any], dynamic: dict[str, Any]) -> dict[str, Any]:
    """`inputs` with one more in every size that varies."""
    grown = dict(inputs)
    for name, dims in dynamic.items():
        for dim in dims:
            tensor = grown[name]
            grown[name] = torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
    return grown


def build(
    class_name: str, inputs: Callable[[Any], dict[str, Any]], fixed: bool, more: dict[str, Any]
) -> Model:
    kind = getattr(importlib.import_module("transformers"), class_name)
    module = kind(small_config(kind.config_class, **more)).eval()
    made = inputs(module.config)
    dynamic = None if fixed else DYNAMIC.get(inputs)
    other = resized(made, dynamic) if dynamic else None
    return Model(module, (), made, dynamic, other)


def entry(
    class_name: str,
    family: str,
    inputs: Callable[[Any], dict[str, Any]] = text,
    *,
    fixed: bool = False,
    tolerance: float = 1e-5,
    **more: Any,
) -> Case:
    return Case(class_name, family, lambda: build(class_name, inputs, fixed, dict(more)), tolerance)


def resnet(*stages: int) -> dict[str, Any]:
    """A small backbone that is not of timm."""
    return {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 16, 32, 32],
            "depths": [1, 1, 1, 1],
            "out_features": [f"stage{stage}" for stage in stages],
        },
    }


CASES: list[Case] = [
    # encoders
    entry("BertModel", "encoder"),
    entry("DistilBertModel", "encoder"),
    entry("RobertaModel", "encoder"),
    entry("AlbertModel", "encoder"),
    entry("ElectraModel", "encoder"),
    entry("DebertaModel", "encoder"),
    entry("DebertaV2Model", "encoder"),
    entry("XLNetModel", "encoder"),
    entry("LongformerModel", "encoder", attention_window=4),
    entry("BigBirdModel", "encoder", attention_type="original_full"),
    entry("FunnelModel", "encoder", block_sizes=[1, 1], fixed=True),
    entry("FNetModel", "encoder", ids_only),
    entry("NystromformerModel", "encoder", num_landmarks=4, segment_means_seq_len=12),
    entry("MobileBertModel", "encoder", true_hidden_size=32, intra_bottleneck_size=32),
    entry("MPNetModel", "encoder"),
    entry("ConvBertModel", "encoder"),
    entry("CamembertModel", "encoder"),
    entry("XLMRobertaModel", "encoder"),
    entry("XLMModel", "encoder", emb_dim=32),
    entry("FlaubertModel", "encoder", emb_dim=32),
    entry("ErnieModel", "encoder"),
    entry("RoFormerModel", "encoder"),
    entry("SqueezeBertModel", "encoder"),
    entry("LayoutLMModel", "encoder"),
    entry("MegatronBertModel", "encoder"),
    entry("IBertModel", "encoder"),
    entry("CanineModel", "encoder"),
    entry("RemBertModel", "encoder", input_embedding_size=16, output_embedding_size=16),
    entry("LukeModel", "encoder", entity_vocab_size=9, entity_emb_size=16),
    entry("SplinterModel", "encoder"),
    entry("NomicBertModel", "encoder"),
    entry("ModernBertModel", "encoder"),
    entry("EuroBertModel", "encoder"),
    entry("EsmModel", "encoder", mask_token_id=3),
    entry("YosoModel", "encoder"),
    entry("MraModel", "encoder"),
    entry("BertForSequenceClassification", "encoder"),
    entry("RobertaForTokenClassification", "encoder"),
    entry("DistilBertForQuestionAnswering", "encoder"),
    entry("ElectraForPreTraining", "encoder"),
    entry(
        "PerceiverModel",
        "encoder",
        lambda c: {"inputs": torch.randn(2, 12, 32)},
        fixed=True,
        d_latents=32,
        num_latents=8,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
    ),
    # decoders
    entry("GPT2LMHeadModel", "decoder"),
    entry("OpenAIGPTLMHeadModel", "decoder"),
    entry("GPTNeoForCausalLM", "decoder", attention_types=[[["global", "local"], 1]]),
    entry("GPTNeoXForCausalLM", "decoder"),
    entry("GPTJForCausalLM", "decoder", rotary_dim=4),
    entry("GPTBigCodeForCausalLM", "decoder"),
    entry("CodeGenForCausalLM", "decoder", rotary_dim=4),
    entry("CTRLLMHeadModel", "decoder", dff=64),
    entry("OPTForCausalLM", "decoder", word_embed_proj_dim=32),
    entry("BloomForCausalLM", "decoder"),
    entry("FalconForCausalLM", "decoder"),
    entry("MptForCausalLM", "decoder"),
    entry("PhiForCausalLM", "decoder"),
    entry("Phi3ForCausalLM", "decoder"),
    entry("LlamaForCausalLM", "decoder"),
    entry("MistralForCausalLM", "decoder"),
    entry("Qwen2ForCausalLM", "decoder"),
    entry("Qwen3ForCausalLM", "decoder"),
    entry("GemmaForCausalLM", "decoder"),
    entry("Gemma2ForCausalLM", "decoder"),
    entry("Gemma3ForCausalLM", "decoder"),
    entry("Gemma3nForCausalLM", "decoder"),
    entry("StableLmForCausalLM", "decoder"),
    entry("OlmoForCausalLM", "decoder"),
    entry("Olmo2ForCausalLM", "decoder"),
    entry("Olmo3ForCausalLM", "decoder"),
    entry("CohereForCausalLM", "decoder"),
    entry("Cohere2ForCausalLM", "decoder"),
    entry("GraniteForCausalLM", "decoder"),
    entry("StarCoder2ForCausalLM".replace("StarC", "Starc"), "decoder"),
    entry("PersimmonForCausalLM", "decoder"),
    entry("NemotronForCausalLM", "decoder"),
    entry("SmolLM3ForCausalLM", "decoder"),
    entry("GlmForCausalLM", "decoder"),
    entry("Glm4ForCausalLM", "decoder"),
    entry("Exaone4ForCausalLM", "decoder"),
    entry("HeliumForCausalLM", "decoder"),
    entry("ArceeForCausalLM", "decoder"),
    entry("ApertusForCausalLM", "decoder"),
    entry("SeedOssForCausalLM", "decoder"),
    entry("MinistralForCausalLM", "decoder"),
    entry("DiffLlamaForCausalLM", "decoder"),
    entry("BitNetForCausalLM", "decoder"),
    entry("XGLMForCausalLM", "decoder", attention_heads=4),
    entry("BioGptForCausalLM", "decoder"),
    entry(
        "ReformerModelWithLMHead",
        "decoder",
        fixed=True,
        axial_pos_embds=False,
        is_decoder=True,
        attn_layers=["local", "local"],
        feed_forward_size=64,
    ),
    # mixtures of experts
    entry("MixtralForCausalLM", "experts"),
    entry("Qwen2MoeForCausalLM", "experts", shared_expert_intermediate_size=32),
    entry("Qwen3MoeForCausalLM", "experts"),
    entry("OlmoeForCausalLM", "experts"),
    entry(
        "DeepseekV2ForCausalLM",
        "experts",
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        num_key_value_heads=4,
    ),
    entry(
        "DeepseekV3ForCausalLM",
        "experts",
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        num_key_value_heads=4,
    ),
    entry("GraniteMoeForCausalLM", "experts"),
    entry("PhimoeForCausalLM", "experts"),
    entry("GptOssForCausalLM", "experts"),
    entry("Glm4MoeForCausalLM", "experts", n_group=1, topk_group=1, first_k_dense_replace=1),
    entry("JetMoeForCausalLM", "experts", kv_channels=8),
    entry("Ernie4_5_MoeForCausalLM", "experts"),
    entry("SwitchTransformersForConditionalGeneration", "experts", text_pair),
    entry("NllbMoeForConditionalGeneration", "experts", text_pair),
    # state spaces and other recurrences
    entry("MambaForCausalLM", "state space", fixed=True),
    entry(
        "Mamba2ForCausalLM",
        "state space",
        fixed=True,
        num_heads=8,
        head_dim=8,
        n_groups=1,
        chunk_size=8,
    ),
    entry("FalconMambaForCausalLM", "state space", fixed=True),
    entry("RwkvForCausalLM", "state space", ids_only, fixed=True, attention_hidden_size=32),
    entry(
        "JambaForCausalLM",
        "state space",
        fixed=True,
        mamba_d_state=8,
        mamba_dt_rank=4,
        attn_layer_offset=1,
        attn_layer_period=2,
        use_mamba_kernels=False,
    ),
    entry(
        "BambaForCausalLM",
        "state space",
        fixed=True,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    entry(
        "RecurrentGemmaForCausalLM",
        "state space",
        num_hidden_layers=3,
        fixed=True,
        lru_width=32,
        attention_window_size=8,
    ),
    entry("Lfm2ForCausalLM", "state space"),
    entry(
        "FalconH1ForCausalLM",
        "state space",
        fixed=True,
        mamba_d_ssm=64,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    entry(
        "Qwen3NextForCausalLM",
        "state space",
        num_hidden_layers=4,
        fixed=True,
        shared_expert_intermediate_size=32,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    entry(
        "GraniteMoeHybridForCausalLM",
        "state space",
        fixed=True,
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
        shared_intermediate_size=32,
    ),
    entry("xLSTMForCausalLM", "state space", ids_only, fixed=True, chunk_size=4),
    entry("MiniMaxForCausalLM", "state space", block_size=4, fixed=True),
    # encoder-decoders
    entry("T5ForConditionalGeneration", "encoder-decoder", text_pair),
    entry("MT5ForConditionalGeneration", "encoder-decoder", text_pair),
    entry("UMT5ForConditionalGeneration", "encoder-decoder", text_pair),
    entry("LongT5ForConditionalGeneration", "encoder-decoder", text_pair, local_radius=4),
    entry("BartForConditionalGeneration", "encoder-decoder", text_pair),
    entry("MBartForConditionalGeneration", "encoder-decoder", text_pair),
    entry("PegasusForConditionalGeneration", "encoder-decoder", text_pair),
    entry(
        "PegasusXForConditionalGeneration",
        "encoder-decoder",
        text_pair,
        block_size=4,
        num_global_tokens=4,
        fixed=True,
    ),
    entry("MarianMTModel", "encoder-decoder", text_pair),
    entry("BlenderbotForConditionalGeneration", "encoder-decoder", text_pair),
    entry("BlenderbotSmallForConditionalGeneration", "encoder-decoder", text_pair),
    entry(
        "LEDForConditionalGeneration",
        "encoder-decoder",
        text_pair,
        attention_window=[4, 4],
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    entry(
        "ProphetNetForConditionalGeneration",
        "encoder-decoder",
        text_pair,
        num_encoder_layers=2,
        num_decoder_attention_heads=4,
        num_encoder_attention_heads=4,
        encoder_ffn_dim=64,
    ),
    entry(
        "BigBirdPegasusForConditionalGeneration",
        "encoder-decoder",
        text_pair,
        attention_type="original_full",
    ),
    entry("M2M100ForConditionalGeneration", "encoder-decoder", text_pair),
    entry("PLBartForConditionalGeneration", "encoder-decoder", text_pair),
    entry("MvpForConditionalGeneration", "encoder-decoder", text_pair),
    entry("T5GemmaForConditionalGeneration", "encoder-decoder", text_pair),
    # vision
    entry("ViTModel", "vision", image),
    entry("ViTForImageClassification", "vision", image),
    entry("ViTMAEModel", "vision", lambda c: image(c) | {"noise": torch.rand(2, 16)}, fixed=True),
    entry("ViTMSNModel", "vision", image),
    entry("DeiTModel", "vision", image),
    entry("BeitModel", "vision", image),
    entry("Data2VecVisionModel", "vision", image),
    entry("Dinov2Model", "vision", image),
    entry("Dinov2WithRegistersModel", "vision", image),
    entry("DINOv3ViTModel", "vision", image),
    entry("IJepaModel", "vision", image),
    entry(
        "SwinModel",
        "vision",
        image,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=4,
    ),
    entry(
        "Swinv2Model",
        "vision",
        image,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=4,
    ),
    entry(
        "Swin2SRForImageSuperResolution",
        "vision",
        image,
        patch_size=1,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=4,
        image_size=16,
    ),
    entry("ConvNextModel", "vision", image64, hidden_sizes=[8, 16, 32, 32], depths=[1, 1, 1, 1]),
    entry("ConvNextV2Model", "vision", image64, hidden_sizes=[8, 16, 32, 32], depths=[1, 1, 1, 1]),
    entry(
        "ResNetModel",
        "vision",
        image64,
        hidden_sizes=[8, 16, 32, 32],
        depths=[1, 1, 1, 1],
        embedding_size=8,
    ),
    entry(
        "BitModel",
        "vision",
        image64,
        hidden_sizes=[8, 16, 32, 32],
        depths=[1, 1, 1, 1],
        embedding_size=8,
        num_groups=2,
    ),
    entry(
        "RegNetModel",
        "vision",
        image64,
        hidden_sizes=[8, 16, 32, 32],
        depths=[1, 1, 1, 1],
        embedding_size=8,
        groups_width=8,
    ),
    entry(
        "EfficientNetModel",
        "vision",
        image64,
        image_size=64,
        width_coefficient=0.25,
        depth_coefficient=0.25,
        hidden_dim=1280,
        depth_divisor=8,
    ),
    entry("MobileNetV1Model", "vision", image64, depth_multiplier=0.25),
    entry("MobileNetV2Model", "vision", image64, depth_multiplier=0.25),
    entry(
        "MobileViTModel",
        "vision",
        image64,
        image_size=64,
        patch_size=2,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 64],
    ),
    entry(
        "MobileViTV2Model", "vision", image64, image_size=64, patch_size=2, width_multiplier=0.25
    ),
    entry(
        "PoolFormerModel",
        "vision",
        image64,
        hidden_sizes=[8, 16, 32, 32],
        depths=[1, 1, 1, 1],
        patch_size=16,
    ),
    entry(
        "SegformerForSemanticSegmentation",
        "vision",
        image64,
        hidden_sizes=[8, 16, 32, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 4, 4],
        decoder_hidden_size=16,
    ),
    entry(
        "LevitModel",
        "vision",
        image64,
        image_size=64,
        hidden_sizes=[16, 32, 48],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        patch_size=16,
    ),
    entry(
        "CvtModel", "vision", image64, embed_dim=[16, 32, 32], num_heads=[1, 2, 4], depth=[1, 1, 1]
    ),
    entry(
        "PvtModel",
        "vision",
        image64,
        image_size=64,
        hidden_sizes=[8, 16, 32, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 4, 4],
    ),
    entry(
        "PvtV2Model",
        "vision",
        image64,
        image_size=64,
        hidden_sizes=[8, 16, 32, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 4, 4],
    ),
    entry(
        "FocalNetModel",
        "vision",
        image64,
        image_size=64,
        embed_dim=16,
        depths=[1, 1],
        patch_size=4,
        focal_levels=[1, 1],
        focal_windows=[3, 3],
    ),
    entry(
        "SwiftFormerModel",
        "vision",
        image64,
        image_size=64,
        embed_dims=[8, 16, 32, 32],
        depths=[1, 1, 1, 1],
    ),
    entry(
        "HieraModel",
        "vision",
        image64,
        image_size=[64, 64],
        embed_dim=16,
        depths=[1, 1, 1],
        num_heads=[1, 2, 4],
    ),
    entry("DinatModel", "vision", image64),
    entry("HGNetV2Backbone", "vision", image64),
    entry("ImageGPTModel", "vision", ids_only),
    entry(
        "TimesformerModel",
        "vision",
        lambda c: {"pixel_values": torch.randn(2, 2, 3, 32, 32)},
        fixed=True,
        num_frames=2,
    ),
    entry(
        "VideoMAEModel",
        "vision",
        lambda c: {"pixel_values": torch.randn(2, 2, 3, 32, 32)},
        fixed=True,
        num_frames=2,
    ),
    entry(
        "VivitModel",
        "vision",
        lambda c: {"pixel_values": torch.randn(2, 2, 3, 32, 32)},
        fixed=True,
        num_frames=2,
        tubelet_size=[2, 16, 16],
    ),
    # detection, segmentation, depth
    entry("DetrForObjectDetection", "detection", image64, num_queries=5, **resnet(4)),
    entry("ConditionalDetrForObjectDetection", "detection", image64, num_queries=5, **resnet(4)),
    entry(
        "DeformableDetrForObjectDetection",
        "detection",
        image64,
        num_queries=5,
        fixed=True,
        **resnet(2, 3, 4),
    ),
    entry("TableTransformerForObjectDetection", "detection", image64, num_queries=5, **resnet(4)),
    entry("DabDetrForObjectDetection", "detection", image64, num_queries=5, **resnet(4)),
    entry("RTDetrV2ForObjectDetection", "detection", image64, num_queries=5, fixed=True),
    entry(
        "YolosForObjectDetection", "detection", image, image_size=[32, 32], num_detection_tokens=5
    ),
    entry(
        "DPTForDepthEstimation",
        "detection",
        image,
        neck_hidden_sizes=[8, 8, 16, 16],
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        fusion_hidden_size=16,
    ),
    entry("ZoeDepthForDepthEstimation", "detection", image, fixed=True),
    entry(
        "GLPNForDepthEstimation",
        "detection",
        image64,
        hidden_sizes=[8, 16, 32, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 4, 4],
        decoder_hidden_size=16,
    ),
    entry(
        "SamModel",
        "detection",
        lambda c: {
            "pixel_values": torch.randn(1, 3, 32, 32),
            "input_points": torch.rand(1, 1, 2, 2),
        },
        fixed=True,
        vision_config={
            "image_size": 32,
            "patch_size": 8,
            "output_channels": 16,
            "global_attn_indexes": [1],
            "window_size": 2,
            "num_pos_feats": 16,
        },
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "iou_head_hidden_dim": 16},
        prompt_encoder_config={
            "hidden_size": 16,
            "image_size": 32,
            "patch_size": 8,
            "mask_input_channels": 4,
            "image_embedding_size": 4,
        },
    ),
    entry("SuperPointForKeypointDetection", "detection", image64, fixed=True),
    entry("VitPoseForPoseEstimation", "detection", image, fixed=True),
    entry("UperNetForSemanticSegmentation", "detection", image64, fixed=True, hidden_size=16),
    # multimodal
    entry("CLIPModel", "multimodal", image_and_text),
    entry("CLIPTextModel", "multimodal"),
    entry("CLIPVisionModel", "multimodal", image),
    entry("CLIPSegModel", "multimodal", image_and_text),
    entry("ChineseCLIPModel", "multimodal", image_and_text),
    entry("AltCLIPModel", "multimodal", image_and_text),
    entry("SiglipModel", "multimodal", image_and_text),
    entry(
        "Siglip2VisionModel",
        "multimodal",
        lambda c: {
            "pixel_values": torch.randn(2, 16, 192),
            "pixel_attention_mask": torch.ones(2, 16),
            "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
        },
        fixed=True,
        num_patches=16,
    ),
    entry("BlipModel", "multimodal", image_and_text),
    entry("BlipForConditionalGeneration", "multimodal", image_and_text),
    entry(
        "LlavaForConditionalGeneration",
        "multimodal",
        lambda c: {
            "input_ids": torch.cat([torch.full((2, 16), 98), tokens(2, 6)], 1),
            "pixel_values": torch.randn(2, 3, 32, 32),
        },
        fixed=True,
        image_token_index=98,
        vision_feature_select_strategy="default",
    ),
    entry(
        "PaliGemmaForConditionalGeneration",
        "multimodal",
        lambda c: {
            "input_ids": torch.cat([torch.full((2, 16), 98), tokens(2, 6)], 1),
            "pixel_values": torch.randn(2, 3, 32, 32),
        },
        fixed=True,
        image_token_index=98,
        projection_dim=32,
    ),
    entry(
        "OwlViTModel",
        "multimodal",
        lambda c: {
            "input_ids": tokens(4, 12),
            "attention_mask": torch.ones(4, 12, dtype=torch.long),
            "pixel_values": torch.randn(2, 3, 32, 32),
        },
        fixed=True,
    ),
    entry(
        "OwlViTForObjectDetection",
        "multimodal",
        lambda c: {
            "input_ids": tokens(4, 12),
            "attention_mask": torch.ones(4, 12, dtype=torch.long),
            "pixel_values": torch.randn(2, 3, 32, 32),
        },
        fixed=True,
    ),
    entry(
        "Owlv2Model",
        "multimodal",
        lambda c: {
            "input_ids": tokens(4, 12),
            "attention_mask": torch.ones(4, 12, dtype=torch.long),
            "pixel_values": torch.randn(2, 3, 32, 32),
        },
        fixed=True,
    ),
    entry(
        "GroupViTModel",
        "multimodal",
        image_and_text,
        fixed=True,
        vision_config={"depths": [1, 1], "num_group_tokens": [4, 2], "num_output_groups": [4, 2]},
    ),
    entry("BridgeTowerModel", "multimodal", image_and_text, fixed=True),
    entry("FlavaModel", "multimodal", image_and_text, fixed=True),
    entry("ViltModel", "multimodal", image_and_text, fixed=True),
    entry("AlignModel", "multimodal", image_and_text, fixed=True),
    entry("GitModel", "multimodal", image_and_text, fixed=True),
    entry(
        "LayoutLMv3Model",
        "multimodal",
        image_and_text,
        fixed=True,
        input_size=32,
        coordinate_size=6,
        shape_size=4,
    ),
    entry(
        "LxmertModel",
        "multimodal",
        lambda c: {
            "input_ids": tokens(2, 12),
            "visual_feats": torch.randn(2, 5, 2048),
            "visual_pos": torch.rand(2, 5, 4),
        },
        l_layers=1,
        x_layers=1,
        r_layers=1,
        fixed=True,
    ),
    entry(
        "VisualBertModel",
        "multimodal",
        lambda c: {"input_ids": tokens(2, 12), "visual_embeds": torch.randn(2, 5, 16)},
        fixed=True,
        visual_embedding_dim=16,
    ),
    entry(
        "XCLIPModel",
        "multimodal",
        lambda c: {
            "input_ids": tokens(2, 12),
            "attention_mask": torch.ones(2, 12, dtype=torch.long),
            "pixel_values": torch.randn(2, 2, 3, 32, 32),
        },
        fixed=True,
    ),
    entry("CLIPSegForImageSegmentation", "multimodal", image_and_text, fixed=True),
    entry("TrOCRForCausalLM", "multimodal"),
    entry(
        "Pix2StructVisionModel",
        "multimodal",
        lambda c: {"flattened_patches": torch.rand(2, 12, 194)},
        fixed=True,
        patch_embed_hidden_size=192,
    ),
    # audio
    entry("Wav2Vec2Model", "audio", waveform),
    entry("Wav2Vec2ForCTC", "audio", waveform),
    entry("Wav2Vec2ConformerModel", "audio", waveform),
    entry(
        "Wav2Vec2BertModel",
        "audio",
        lambda c: {"input_features": torch.randn(2, 20, 160)},
        fixed=True,
    ),
    entry("HubertModel", "audio", waveform),
    entry("WavLMModel", "audio", waveform),
    entry("Data2VecAudioModel", "audio", waveform, conv_pos_kernel_size=5),
    entry("UniSpeechModel", "audio", waveform),
    entry("UniSpeechSatModel", "audio", waveform),
    entry("SEWModel", "audio", waveform),
    entry("SEWDModel", "audio", waveform),
    entry(
        "ASTModel",
        "audio",
        lambda c: {"input_values": torch.randn(2, 32, 16)},
        fixed=True,
        max_length=32,
    ),
    entry(
        "WhisperForConditionalGeneration",
        "audio",
        lambda c: {"input_features": torch.randn(2, 16, 128), "decoder_input_ids": tokens(2, 7)},
        fixed=True,
    ),
    entry(
        "Speech2TextForConditionalGeneration",
        "audio",
        lambda c: {"input_features": torch.randn(2, 40, 16), "decoder_input_ids": tokens(2, 7)},
        fixed=True,
        input_feat_per_channel=16,
        conv_channels=16,
    ),
    entry(
        "SpeechT5ForSpeechToText",
        "audio",
        lambda c: {"input_values": torch.randn(2, 1600), "decoder_input_ids": tokens(2, 7)},
        fixed=True,
    ),
    entry(
        "MoonshineForConditionalGeneration",
        "audio",
        lambda c: {"input_values": torch.randn(2, 2000), "decoder_input_ids": tokens(2, 7)},
        fixed=True,
    ),
    entry(
        "EncodecModel",
        "audio",
        lambda c: {"input_values": torch.randn(1, 1, 640)},
        fixed=True,
        num_filters=4,
        codebook_size=16,
        codebook_dim=32,
    ),
    entry(
        "DacModel",
        "audio",
        lambda c: {"input_values": torch.randn(1, 1, 640)},
        fixed=True,
        encoder_hidden_size=8,
        decoder_hidden_size=32,
        codebook_size=16,
    ),
    entry(
        "MimiModel",
        "audio",
        lambda c: {"input_values": torch.randn(1, 1, 3840)},
        fixed=True,
        num_filters=4,
        codebook_size=16,
        codebook_dim=16,
        vector_quantization_hidden_dimension=16,
    ),
    entry("ClapModel", "audio", fixed=True),
    entry("VitsModel", "audio", ids_only, fixed=True),
    entry(
        "UnivNetModel",
        "audio",
        lambda c: {
            "input_features": torch.randn(1, 20, 100),
            "noise_sequence": torch.randn(1, 20, 64),
        },
        fixed=True,
        model_hidden_channels=8,
    ),
    entry(
        "SpeechT5HifiGan",
        "audio",
        lambda c: {"spectrogram": torch.randn(2, 20, 80)},
        fixed=True,
        upsample_initial_channel=32,
    ),
    entry("MusicgenForCausalLM", "audio", lambda c: {"input_ids": tokens(8, 6)}, fixed=True),
    # time series
    entry(
        "TimeSeriesTransformerModel",
        "time series",
        lambda c: {
            "past_values": torch.randn(2, 19),
            "past_time_features": torch.randn(2, 19, 2),
            "past_observed_mask": torch.ones(2, 19),
            "future_values": torch.randn(2, 4),
            "future_time_features": torch.randn(2, 4, 2),
        },
        fixed=True,
        prediction_length=4,
        context_length=12,
        num_time_features=2,
    ),
    entry(
        "InformerModel",
        "time series",
        lambda c: {
            "past_values": torch.randn(2, 19),
            "past_time_features": torch.randn(2, 19, 2),
            "past_observed_mask": torch.ones(2, 19),
            "future_values": torch.randn(2, 4),
            "future_time_features": torch.randn(2, 4, 2),
        },
        fixed=True,
        prediction_length=4,
        context_length=12,
        num_time_features=2,
    ),
    entry(
        "AutoformerModel",
        "time series",
        lambda c: {
            "past_values": torch.randn(2, 19),
            "past_time_features": torch.randn(2, 19, 2),
            "past_observed_mask": torch.ones(2, 19),
            "future_values": torch.randn(2, 4),
            "future_time_features": torch.randn(2, 4, 2),
        },
        fixed=True,
        prediction_length=4,
        context_length=12,
        num_time_features=2,
        label_length=4,
        moving_average=3,
    ),
    entry(
        "PatchTSTModel",
        "time series",
        lambda c: {"past_values": torch.randn(2, 32, 3)},
        fixed=True,
        num_input_channels=3,
        context_length=32,
        patch_length=4,
        patch_stride=4,
    ),
    entry(
        "PatchTSMixerModel",
        "time series",
        lambda c: {"past_values": torch.randn(2, 32, 3)},
        fixed=True,
        num_input_channels=3,
        context_length=32,
        patch_length=4,
        patch_stride=4,
    ),
    entry(
        "TimesFmModel",
        "time series",
        lambda c: {
            "past_values": torch.randn(2, 64),
            "past_values_padding": torch.zeros(2, 64),
            "freq": torch.zeros(2, 1, dtype=torch.long),
        },
        fixed=True,
    ),
    entry(
        "DecisionTransformerModel",
        "reinforcement",
        lambda c: {
            "states": torch.randn(2, 5, 17),
            "actions": torch.randn(2, 5, 4),
            "rewards": torch.randn(2, 5, 1),
            "returns_to_go": torch.randn(2, 5, 1),
            "timesteps": torch.arange(5).expand(2, 5),
            "attention_mask": torch.ones(2, 5),
        },
        fixed=True,
        max_ep_len=16,
    ),
]
