"""Nets with every kind of convolution and of batch norm, which live on random weights."""

import math

import torch
from torch import nn

from tests.oracles import rough


def lively(model, gain):
    """Draw all weights so that signals neither die out nor explode on their way through a deep net."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.modules():
            if "Conv" in type(layer).__name__:
                taps = math.prod(layer.kernel_size) / (math.prod(layer.stride) if layer.transposed else 1)
                deviation = gain / math.sqrt(taps * layer.in_channels / layer.groups)
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * deviation)


class PlanarNet(nn.Module):
    """Grouped, depthwise, transposed and grouped transposed 2-d convolutions, with and without bias and batch norm."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.bare = nn.Conv2d(6, 6, 3, stride=2, bias=False)
        self.grouped_up = nn.ConvTranspose2d(6, 8, 3, groups=2)
        self.bare_up = nn.ConvTranspose2d(8, 6, 3, groups=2, bias=False)
        self.last = nn.Linear(6, 5)
        lively(self, gain=1.6)

    def forward(self, x):
        x = torch.relu(self.grouped(x))
        x = torch.relu(self.norm(self.depthwise(x)))
        x = torch.tanh(self.up(x))
        x = torch.tanh(self.bare(x))
        x = torch.tanh(self.grouped_up(x))
        return self.last(torch.tanh(self.bare_up(x)).amax((2, 3)) * 3)


class LineAndVolumeNet(nn.Module):
    """1-d and 3-d convolutions, transposed and grouped ones among them."""

    def __init__(self):
        super().__init__()
        self.line = nn.Conv1d(3, 6, 3, groups=3)
        self.line_norm = nn.BatchNorm1d(6)
        self.line_up = nn.ConvTranspose1d(6, 4, 3, bias=False)
        self.volume = nn.Conv3d(4, 6, 3, padding=1, bias=False)
        self.volume_norm = nn.BatchNorm3d(6)
        self.volume_up = nn.ConvTranspose3d(6, 4, 2, groups=2)
        self.last = nn.Linear(4, 5)
        lively(self, gain=1.6)

    def forward(self, x):
        x = torch.relu(self.line_norm(self.line(x)))
        x = torch.tanh(self.line_up(x)).unflatten(2, (4, 2, 2))
        x = torch.relu(self.volume_norm(self.volume(x)))
        return self.last(torch.tanh(self.volume_up(x)).amax((2, 3, 4)) * 3)


class Wired(nn.Module):
    """Two 1 x 1 convolutions and two batch norms, wired up by a function of (net, x)."""

    def __init__(self, wiring):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 4)
        self.wiring = wiring
        rough(self)

    def forward(self, x):
        return self.last(torch.tanh(self.wiring(self, x)).mean((2, 3)) * 3)


def read_elsewhere(net, x):
    y = net.one(x)
    return net.norm(y) + torch.relu(y) + net.other(net.two(x))


def read_elsewhere_where_negative(net, x):
    y = net.one(x)
    return net.norm(y) + torch.relu(-y) + net.other(net.two(x))


def norm_reads_something_else_too(net, x):
    y = net.norm(net.one(x))
    return net.norm(y) + net.other(net.two(x))


WIRINGS = {  # with the batch norm that alone reads a convolution's output, for each convolution that has one
    "plain": (lambda net, x: net.norm(net.one(x)) + net.other(net.two(x)), {"one": "norm", "two": "other"}),
    "one after the other": (
        lambda net, x: net.other(net.two(net.norm(net.one(x))[:, 1:])),
        {"one": "norm", "two": "other"},
    ),
    "read elsewhere": (read_elsewhere, {"two": "other"}),
    "read elsewhere where negative": (read_elsewhere_where_negative, {"two": "other"}),
    "norm shared by two": (lambda net, x: net.norm(net.one(x)) + 2 * net.norm(net.two(x)), {}),
    "norm reads something else too": (norm_reads_something_else_too, {"two": "other"}),
    "convolution used twice": (
        lambda net, x: net.norm(net.one(x)) + net.one(2 * x) + net.other(net.two(x)),
        {"two": "other"},
    ),
    "changed on the way": (lambda net, x: net.norm(torch.sin(net.one(x))) + net.other(net.two(x)), {"two": "other"}),
    "changed in place": (lambda net, x: net.norm(torch.relu_(net.one(x))) + net.other(net.two(x)), {"two": "other"}),
    "shifted in place": (lambda net, x: net.norm(net.one(x).add_(0.5)) + net.other(net.two(x)), {"two": "other"}),
}


class OneStage(nn.Module):
    """The net on CIFAR-10 of the paper's authors: nine convolutions of 256 filters (their mini_resnet.py)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.linear = nn.Conv2d(3, 256, 3), nn.Linear(4096, 10)
        convolutions = lambda: {"conv1": nn.Conv2d(256, 256, 3), "conv2": nn.Conv2d(256, 256, 3)}  # noqa: E731
        self.layer = nn.Sequential(*[nn.ModuleDict(convolutions()) for _ in range(4)])
        for i, block in enumerate(self.layer):
            setattr(self, f"block{i}", block)  # a second name, under which nothing may be found again
