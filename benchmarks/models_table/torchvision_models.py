"""The models of torchvision: classification, detection and segmentation."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models import detection, efficientnet, segmentation

from benchmarks.models_table.subjects import Subject, by_state_dict, numbers

TOO_LARGE = ("regnet_y_128gf", "vit_h_14")  # more than 600 million weights
SIDES = {"inception_v3": 96, "maxvit_t": 224, "alexnet": 64}  # 32 otherwise
DOUBLE = ("efficientnet", "vgg16_bn")  # models in float64: roundings are amplified, or move an activation past a kink
RESIDUAL = (0.05, 0.35)  # scales at the end of EfficientNets' residual branches, where zero is a common start
BOXES = torch.tensor([[2.0, 2.0, 40.0, 40.0], [10.0, 20.0, 60.0, 50.0]])


class Raw(nn.Module):
    """A detector without the choice of boxes at its end, which no gradient passes: heads on two boxes per picture.

    Args:
        body: The detector.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return what the heads return, (pictures, ...) each, as one row per picture."""
        body: Any = self.body
        features = body.backbone(x)
        features = {"0": features} if isinstance(features, Tensor) else features
        if not hasattr(body, "rpn"):
            found = list(body.head(list(features.values())).values())
        else:
            objectness, deltas = body.rpn.head(list(features.values()))
            boxes, sizes = [BOXES.to(x.dtype)] * len(x), [tuple(x.shape[2:])] * len(x)
            roi = body.roi_heads
            found = [*objectness, *deltas, *roi.box_predictor(roi.box_head(roi.box_roi_pool(features, boxes, sizes)))]
            for part in ("mask", "keypoint"):
                if getattr(roi, f"{part}_head", None) is not None:
                    pooled = getattr(roi, f"{part}_roi_pool")(features, boxes, sizes)
                    found.append(getattr(roi, f"{part}_predictor")(getattr(roi, f"{part}_head")(pooled)))
        return [torch.cat([part.reshape(len(x), -1) for part in found], dim=1)]


def _classifier(name: str, side: int) -> nn.Module:
    more: dict[str, Any] = {"image_size": side} if name.startswith("vit_") else {}
    more |= {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **more)
    for block in model.modules():
        if isinstance(block, (efficientnet.MBConv, efficientnet.FusedMBConv)) and block.use_res_connect:
            nn.init.uniform_(block.block[-1][1].weight, *RESIDUAL)
    return model.double() if name.startswith(DOUBLE) else model


def subjects() -> Iterator[Subject]:
    """Yield every model with a constructor, except those that are too large."""
    for name in torchvision.models.list_models(module=torchvision.models):
        if name not in TOO_LARGE:
            side = SIDES.get(name, 32)
            yield _subject(name, partial(_classifier, name, side), side)
    for module, wrap, side in ((detection, Raw, 64), (segmentation, lambda body: body, 64)):
        for name in torchvision.models.list_models(module=module):
            yield _subject(name, partial(_dense, name, wrap), 300 if name == "ssd300_vgg16" else side)


def _dense(name: str, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return wrap(torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5))


def _subject(name: str, make: Callable[[], nn.Module], side: int) -> Subject:
    plain = numbers(3, side, side)
    double = (lambda seed: plain(seed).double()) if name.startswith(DOUBLE) else plain
    return Subject(name, "torchvision", make, double, by_state_dict)
