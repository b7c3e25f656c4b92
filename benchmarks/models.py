"""Models for timing collection, each as a study of some examples of the right shape.

Only cifar10's ResNet-20 has trained weights and real pictures, when COAR_DATA names the folder that
pipelines/cifar10.py reads; all others are random, which does not affect times. Every output is the margin of one class,
which for GPT-2 is the next token.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import coar
from pipelines import cifar10

TOKENS = 128  # length of a sequence


class NextToken(nn.Module):
    """A transformer of GPT-2's size (124 million parameters) that returns the logits of the token after the last.

    The layers of transformers are Conv1D, linear layers with a transposed weight. The same numbers are put into linear
    layers here, so that `coar.neurons` finds their neurons.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT2LMHeadModel(GPT2Config(use_cache=False))
        for path, module in list(self.gpt.named_modules()):
            if isinstance(module, Conv1D):
                parent, _, leaf = path.rpartition(".")
                setattr(self.gpt.get_submodule(parent), leaf, _linear(module))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (rows, length) tokens to (rows, vocabulary) logits."""
        return self.gpt(tokens, logits_to_keep=1).logits[:, 0]


def _linear(layer: Conv1D) -> nn.Linear:
    linear = nn.Linear(*layer.weight.shape)
    linear.weight.data.copy_(layer.weight.data.T)
    linear.bias.data.copy_(layer.bias.data)
    return linear


@dataclass(frozen=True)
class Subject:
    """A model to time.

    Attributes:
        study: Makes the study of a number of examples.
        examples: Numbers of examples, few and many; many takes a few seconds per mask on two cores.
    """

    study: Callable[[int], coar.Study]
    examples: tuple[int, int]


def resnet20(examples: int) -> coar.Study:
    """Study cifar10's ResNet-20 on up to 256 pictures, or on random numbers and weights if the data is missing."""
    if "COAR_DATA" in os.environ:
        study = cifar10.study(ablation="zero")
        few = study.examples.subset(range(min(examples, len(study.examples))))
        return coar.Study(model=study.model, examples=few, components=study.components)
    net = _seeded(cifar10.CifarResNet)
    return coar.Study(model=net, examples=_pictures(examples, 32, 10), components=coar.conv_filters(net))


def resnet18(examples: int) -> coar.Study:
    """Study the filters of torchvision's ResNet-18."""
    net = _seeded(torchvision.models.resnet18)
    return coar.Study(model=net, examples=_pictures(examples, 224, 1000), components=coar.conv_filters(net))


def resnet50(examples: int) -> coar.Study:
    """Study the filters of torchvision's ResNet-50."""
    net = _seeded(torchvision.models.resnet50)
    return coar.Study(model=net, examples=_pictures(examples, 224, 1000), components=coar.conv_filters(net))


def vit(examples: int) -> coar.Study:
    """Study the neurons in the perceptrons of torchvision's ViT-B/16."""
    net = _seeded(torchvision.models.vit_b_16)
    nn.init.normal_(net.heads.head.weight, std=0.02, generator=torch.Generator().manual_seed(0))  # zeros give no output
    neurons = coar.neurons(net, include="*.mlp.*")
    return coar.Study(model=net, examples=_pictures(examples, 224, 1000), components=neurons)


def gpt2(examples: int) -> coar.Study:
    """Study the neurons in the perceptrons of a transformer of GPT-2's size, on sequences of 128 random tokens."""
    net = _seeded(NextToken)
    words = net.gpt.config.vocab_size
    tokens = torch.randint(words, (examples, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    sequences = coar.Examples(inputs=tokens[:, :-1].contiguous(), targets=tokens[:, -1].contiguous())
    return coar.Study(model=net, examples=sequences, components=coar.neurons(net, include="*.mlp.*"))


SUBJECTS: dict[str, Subject] = {
    "resnet20": Subject(resnet20, (4, 256)),
    "resnet18": Subject(resnet18, (4, 64)),
    "resnet50": Subject(resnet50, (4, 32)),
    "vit-b-16": Subject(vit, (4, 16)),
    "gpt2": Subject(gpt2, (4, 16)),
}


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def _pictures(examples: int, side: int, classes: int) -> coar.Examples:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(examples, 3, side, side, generator=generator)
    return coar.Examples(inputs=pictures, targets=torch.randint(classes, (examples,), generator=generator))
