"""The models of transformers: one tiny configuration for each architecture."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.models_table.subjects import ROWS, Subject, by_pretrained

WORDS, TOKENS = 96, 6
SIZES = {  # the value that a field of a configuration gets where it has a larger one
    32: """hidden_size d_model n_embd dim embed_dim embedding_size embed_dims hidden_dim model_dim projection_dim
        emb_dim text_embed_dim vision_embed_dim out_hidden_size word_embed_proj_dim projection_size output_hidden_size
        n_embed encoder_hidden_size decoder_hidden_size attention_dim pooler_hidden_size image_size lin_dim""",
    2: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers depth
        num_encoder_layers decoder_num_hidden_layers layers num_key_value_heads num_kv_heads n_kv_heads
        num_global_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k
        num_selected_experts experts_per_token""",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads heads
        decoder_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts
        num_routed_experts""",
    8: """head_dim d_kv attention_head_dim d_head qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels
        linear_key_head_dim linear_value_head_dim qk_head_dim global_head_dim mamba_d_head attention_head_size
        mamba_head_dim swa_head_dim rotary_dim patch_size mamba_chunk_size chunk_size state_size ssm_state_size""",
    48: """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner ffn_hidden_size dim_feedforward
        moe_intermediate_size shared_expert_intermediate_size decoder_intermediate_size d_inner mlp_dim
        moe_shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp""",
    WORDS: """vocab_size encoder_vocab_size decoder_vocab_size src_vocab_size tgt_vocab_size text_vocab_size
        vocab_size_per_layer_input""",
    64: """max_position_embeddings n_positions max_target_positions n_ctx max_seq_len max_sequence_length seq_length
        original_max_position_embeddings""",
    1: "n_shared_experts n_group topk_group first_k_dense_replace num_expert_group",
    16: "q_lora_rank kv_lora_rank hidden_size_per_layer_input num_mel_bins",
}
SIZE_OF = {field: size for size, fields in SIZES.items() for field in fields.split()}
STAGES = ("hidden_sizes", "embed_dims", "encoder_hidden_sizes", "dims", "embed_dim", "neck_hidden_sizes")
MORE: dict[str, dict[str, Any]] = {  # what a configuration needs in addition
    "deepseek_v2": {"num_experts_per_tok": 2, "num_key_value_heads": 4, "qk_rope_head_dim": 4, "head_dim": 4},
    "deepseek_v3": {"num_key_value_heads": 4, "qk_rope_head_dim": 4, "head_dim": 4},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1], "num_decoder_layers": 1},
    "swin": {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 16, "window_size": 2, "patch_size": 4},
    "swinv2": {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 16, "window_size": 2, "patch_size": 4},
    "squeezebert": {"embedding_size": 32},
    "falcon": {"new_decoder_architecture": False},
    "hiera": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]},
    "focalnet": {"embed_dim": 16},
    "reformer": {"is_decoder": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "rwkv": {"attention_hidden_size": 32, "use_cache": False},
    "pvt": {"hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 2, 2, 4]},
    "pvt_v2": {"hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 2, 2, 4]},
    "mobilebert": {"intra_bottleneck_size": 16, "true_hidden_size": 16, "num_feedforward_networks": 2},
}
CAUSAL = """gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj codegen openai-gpt opt bloom falcon mpt xglm biogpt
    persimmon phi phi3 stablelm starcoder2 llama mistral ministral3 qwen2 qwen3 gemma gemma2 gemma3_text olmo
    olmo2 olmo3 cohere cohere2 glm glm4 granite helium smollm3 exaone4 apertus arcee diffllama nanochat seed_oss jais2
    bitnet vaultgemma doge rwkv mamba falcon_mamba modernbert-decoder mixtral qwen2_moe qwen3_moe qwen3_next gpt_oss
    olmoe granitemoe phimoe jetmoe ernie4_5_moe glm4_moe minimax flex_olmo llama4_text deepseek_v2 deepseek_v3 hy_v3
    afmoe lfm2 exaone_moe nemotron_h xlnet xlm rembert bert roberta electra megatron-bert roformer big_bird"""
ENCODERS = """albert distilbert mpnet convbert deberta deberta-v2 funnel fnet nystromformer squeezebert mobilebert
    longformer layoutlm modernbert nomic_bert eurobert ibert tapas"""
BOTH = """t5 umt5 longt5 switch_transformers bart mbart pegasus blenderbot marian m2m_100 fsmt led prophetnet pegasus_x
    nllb-moe t5gemma2"""
IMAGES = """vit deit beit dinov2 dinov2_with_registers swin swinv2 convnext convnextv2 resnet regnet segformer
    poolformer mobilevit mobilenet_v2 focalnet hiera siglip clip vit_msn ijepa imagegpt swiftformer data2vec-vision pvt
    pvt_v2"""
OTHERS = """wav2vec2 hubert wavlm unispeech wav2vec2-conformer sew data2vec-audio dinov3_vit dinov3_convnext vit_mae dpt
    vitdet splinter clip_text_model siglip_vision_model chinese_clip_vision_model llava paligemma flava"""
SPEECH = "whisper speech_to_text"
AUTOS = {
    "AutoModelForCausalLM": CAUSAL,
    "AutoModelForSequenceClassification": ENCODERS,
    "AutoModelForSeq2SeqLM": BOTH,
    "AutoModelForImageClassification": IMAGES,
    "AutoModelForSpeechSeq2Seq": SPEECH,
    "AutoModel": OTHERS,
}


def tiny(kind: type[Any], more: dict[str, Any]) -> Any:
    """Return a configuration of this class with small sizes."""
    plain = kind()
    fields = {name: value for name, value in vars(plain).items() if not name.startswith("_")}
    sizes = {name: small for name, value in fields.items() if (small := _small(name, value)) is not None}
    layers = sizes.get("num_hidden_layers", getattr(plain, "num_hidden_layers", None))
    for name in ("layer_types", "mlp_layer_types"):
        kinds = fields.get(name)
        if isinstance(kinds, list) and isinstance(layers, int) and len(kinds) > layers:
            different = list(dict.fromkeys(kinds))
            sizes[name] = (different * layers)[:layers] if name == "layer_types" else kinds[-layers:]
    return kind(**(sizes | more))


def _small(name: str, value: Any) -> Any:
    """Return a small value for a field of a configuration; None where it stays."""
    if isinstance(value, transformers.PretrainedConfig):
        return tiny(type(value), {})
    if name.endswith(("token_id", "token_index")) and type(value) is int and value >= WORDS:
        return 1 if name == "pad_token_id" else 0
    if type(value) is int:
        return SIZE_OF[name] if value > SIZE_OF.get(name, value) else None
    if not isinstance(value, list | tuple) or not value or any(type(one) is not int for one in value):
        return None
    if name in ("depths", "conv_dim"):
        return type(value)([1 if name == "depths" else 32] * len(value))
    return type(value)(min(one, 16 * (i + 1)) for i, one in enumerate(value)) if name in STAGES else None


def _make(name: str, auto: str) -> nn.Module:
    return _kind(name, auto)(tiny(CONFIG_MAPPING[name], MORE.get(name, {})))  # type: ignore[no-any-return]


def _kind(name: str, auto: str) -> Any:
    """Return the class that an `AutoModel...` makes of a configuration, the first where there are several."""
    named = getattr(modeling_auto, MAPPINGS[auto])[name]
    return getattr(transformers, named if isinstance(named, str) else named[0])


def _inputs(name: str, auto: str) -> Callable[[int], dict[str, Tensor]]:
    """Return a maker of inputs, by what the model's forward takes."""

    def made(seed: int) -> dict[str, Tensor]:
        config = tiny(CONFIG_MAPPING[name], MORE.get(name, {}))
        model = _kind(name, auto)
        takes, main = inspect.signature(model.forward).parameters, model.main_input_name
        generator = torch.Generator().manual_seed(seed)

        def words(length: int) -> Tensor:
            return torch.randint(3, WORDS - 6, (ROWS, length), generator=generator)

        found: dict[str, Tensor] = {}
        if "input_ids" in takes and (main == "input_ids" or name == "flava"):
            found["input_ids"] = words(TOKENS)
        if main == "pixel_values" or ("pixel_values" in takes and "input_ids" not in takes):
            inside = next((getattr(config, part) for part in ("vision_config",) if hasattr(config, part)), config)
            side = getattr(inside, "image_size", None) or 32
            side = side if isinstance(side, int) else side[0]
            shape = (ROWS, getattr(inside, "num_channels", 3), side, side)
            found["pixel_values"] = torch.randn(shape, generator=generator)
        if main == "input_values":
            found["input_values"] = torch.randn(ROWS, 2000, generator=generator)
        if main == "input_features":
            length = 2 * getattr(config, "max_source_positions", 50) if name == "whisper" else 40
            width = getattr(config, "input_feat_per_channel", None) or config.num_mel_bins
            shape = (ROWS, config.num_mel_bins, length) if name == "whisper" else (ROWS, length, width)
            found["input_features"] = torch.randn(shape, generator=generator)
        if config.is_encoder_decoder and "decoder_input_ids" in takes:
            found["decoder_input_ids"] = words(5)
        if "bbox" in takes:
            found["bbox"] = torch.randint(0, 50, (ROWS, TOKENS, 2), generator=generator).repeat(1, 1, 2)
        return found

    return made


MAPPINGS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModel": "MODEL_MAPPING_NAMES",
}


def subjects() -> Iterator[Subject]:
    """Yield one tiny model for each architecture."""
    for auto, names in AUTOS.items():
        for name in names.split():
            yield Subject(name, "transformers", partial(_make, name, auto), _inputs(name, auto), by_pretrained)
