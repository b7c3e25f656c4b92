"""The models of timm: a small one of each family, that is of each of its modules with models."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import timm
from torch import nn

from benchmarks.models_table.subjects import Subject, by_state_dict, numbers

ANY_SIDE = """mobileone_s1 convmixer_768_32 convnext_atto_rms cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s
    cspnext_tiny davit_tiny densenet121 dla46x_c dpn48b edgenext_xx_small tinynet_d efficientvim_m1 efficientvit_b0
    fasternet_t0 fastvit_s12 focalnet_tiny_srf gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0 sam2_hiera_tiny
    hrnet_w18_small iformer_s inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small
    lowformer_b0 mambaout_femto poolformerv2_s12 mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs
    naflexvit_base_patch16_siglip nasnetalarge nextvit_small nf_regnet_b0 pnasnet5large pvt_v2_b0 qwen3_vit_88m
    rdnet_tiny regnety_040_sgn repghostnet_050 repvit_m1 res2next50 resnest14d resnet18 resnetv2_18 rexnet_100
    selecsls42 legacy_seresnet18 shvit_s1 skresnet18 starnet_s050 tiny_vit_5m_224 tresnet_m vgg11
    ese_vovnet19b_slim_dw legacy_xception xception41p"""
SIDE_GIVEN = """beit_base_patch16_224 eca_botnext26ts_256 cait_xxs24_224 coat_tiny convit_tiny deit_tiny_patch16_224
    efficientformer_l1 efficientformerv2_s0 efficientvit_m0 eva02_tiny_patch14_224 gcvit_xxtiny hiera_tiny_224
    levit_384_s8 maxvit_pico_rw_256 gmlp_ti16_224 mvitv2_tiny nest_tiny pit_ti_224 sequencer2d_s swiftformer_xs
    swin_tiny_patch4_window7_224 swinv2_tiny_window16_256 swinv2_cr_tiny_224 tnt_s_legacy_patch16_224
    twins_svt_small visformer_tiny vit_small_patch8_224 vit_tiny_r_s16_p8_224 vit_srelpos_small_patch16_224
    samvit_base_patch16_224 vitamin_small_224 volo_d1_224 xcit_nano_12_p8_224"""
SIDES = {
    "crossvit_tiny_240": 240,
    "csatv2": 64,
    "efficientformer_l1": 224,
    "inception_resnet_v2": 96,
    "inception_v3": 96,
    "inception_v4": 96,
}  # 32 otherwise
MORE: dict[str, dict[str, Any]] = {  # fewer layers than the smallest of a family has
    "beit_base_patch16_224": {"depth": 2},
    "samvit_base_patch16_224": {"depth": 2},
    "gemma4_vit_167m": {"depth": 2},
    "qwen3_vit_88m": {"depth": 2},
}
# without deepseek_vit, whose smallest model has 412 million weights


def subjects() -> Iterator[Subject]:
    """Yield one model of each family."""
    for names, given in ((ANY_SIDE, False), (SIDE_GIVEN, True)):
        for name in names.split():
            side = SIDES.get(name, 32)
            more = {"img_size": side} if given else {}
            make = partial(_make, name, more | MORE.get(name, {}))
            yield Subject(name, "timm", make, numbers(3, side, side), by_state_dict)


def _make(name: str, more: dict[str, Any]) -> nn.Module:
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=10, **more)
    return model
