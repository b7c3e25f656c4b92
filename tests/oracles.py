"""Slow, obvious truths that import nothing of the package."""

import math
from copy import deepcopy

import numpy as np
import torch
from torch import nn

OUTPUTS = {
    "logsumexp": lambda row, y: row[y] - math.log(sum(math.exp(v) for c, v in enumerate(row) if c != y)),
    "largest": lambda row, y: row[y] - max(v for c, v in enumerate(row) if c != y),
    "logit": lambda row, y: row[y],
    "loss": lambda row, y: math.log(sum(math.exp(v) for v in row)) - row[y],
}


def read_outputs(logits, targets, kind):
    """One number per example, from plain Python numbers one row at a time."""
    return np.array([OUTPUTS[kind](row, int(y)) for row, y in zip(logits.tolist(), targets, strict=True)])


def forward(model, x):
    with torch.no_grad():
        return model(x)


def zeroed(model, rows):
    """A copy whose weights that make the given (module path, row) outputs are zero; biases stay."""
    copy = deepcopy(model)
    for path, row in rows:
        layer = copy.get_submodule(path)
        weight = layer.weight.detach().clone()
        if "Transpose" in type(layer).__name__:
            width = layer.out_channels // layer.groups
            for channel in range(layer.in_channels):
                if channel // (layer.in_channels // layer.groups) == row // width:
                    weight[channel, row % width] = 0
        else:
            weight[row] = 0
        layer.weight = nn.Parameter(weight)  # a parameter of its own, also where modules share one
    return copy


def features_zeroed(model, features):
    """A copy whose weights that read the given (module path, input feature) are zero."""
    copy = deepcopy(model)
    with torch.no_grad():
        for path, feature in features:
            layer = copy.get_submodule(path)
            if isinstance(layer, nn.Linear):
                layer.weight[:, feature] = 0
            else:  # transformers' Conv1D, whose weight is (inputs, outputs)
                layer.weight[feature] = 0
    return copy


class Reread(nn.Module):
    """Writes constants over some features of what it is given, and calls a module with it."""

    def __init__(self, inner, constants):
        super().__init__()
        self.inner, self.constants = inner, constants

    def forward(self, x):
        x = x.clone()
        for feature, value in self.constants.items():
            x[..., feature] = value
        return self.inner(x)


def features_replaced(model, constants):
    """A copy whose inputs at (module path, feature) are overwritten by the constants."""
    copy = deepcopy(model)
    for path in {path for path, _ in constants}:
        features = {feature: value for (other, feature), value in constants.items() if other == path}
        with_module(copy, path, lambda inner, features=features: Reread(inner, features))
    return copy


def feature_means(model, x, path):
    """Mean of each input feature of one module, over examples and positions."""
    given = []
    copy = deepcopy(model)
    copy.get_submodule(path).register_forward_pre_hook(lambda _module, args: given.append(args[0].double()))
    forward(copy, x)
    return [float(sum(column) / len(column)) for column in torch.cat([g.flatten(0, -2) for g in given]).T.numpy()]


def zeroed_outputs(model, x, y, rows, kind="logsumexp"):
    return read_outputs(forward(zeroed(model, rows), x), y, kind)


class Overwritten(nn.Module):
    """Calls a module and writes constants over some of its output channels."""

    def __init__(self, inner, constants):
        super().__init__()
        self.inner, self.constants = inner, constants

    def forward(self, x):
        y = self.inner(x).clone()
        channels = y.movedim(-1, 0) if isinstance(self.inner, nn.Linear) else y.transpose(0, 1)
        for row, value in self.constants.items():
            channels[row] = value
        return y


class Tap(nn.Module):
    """Calls a module and keeps what it returned."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.kept = inner, []

    def forward(self, x):
        self.kept.append(self.inner(x).clone())
        return self.kept[-1].clone()


def with_module(model, path, wrap):
    """Put `wrap(module)` in the module's place, in the model itself."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, wrap(model.get_submodule(path)))
    return model


def replaced(model, constants):
    """A copy whose outputs at (module path, row) are overwritten by the constants."""
    copy = deepcopy(model)
    for path in {path for path, _ in constants}:
        rows = {row: value for (other, row), value in constants.items() if other == path}
        with_module(copy, path, lambda inner, rows=rows: Overwritten(inner, rows))
    return copy


def replaced_outputs(model, x, y, constants, kind="logsumexp"):
    return read_outputs(forward(replaced(model, constants), x), y, kind)


class Gated(nn.Module):
    """Calls a module and blends the channels of each row with constants, by (rows, channels) gates."""

    def __init__(self, inner, gate, constants):
        super().__init__()
        self.inner, self.gate, self.constants = inner, nn.Parameter(gate), constants

    def forward(self, x):
        y = self.inner(x)
        ones = [1] * (y.ndim - 2)
        linear = isinstance(self.inner, nn.Linear)
        gate = self.gate.view(len(y), *ones, -1) if linear else self.gate.view(len(y), -1, *ones)
        constants = self.constants if linear else self.constants.view(-1, *ones)
        return constants + gate * (y - constants)


def gated_margins(model, x, y, gates, constants):
    """Margins in float64, each row under gates of its own, and their gradients by {path: (rows, channels)} gates."""
    copy = deepcopy(model).double()
    for path, gate in gates.items():
        parts = torch.as_tensor(gate).double(), torch.as_tensor(constants[path]).double()
        with_module(copy, path, lambda inner, parts=parts: Gated(inner, *parts))
    logits = copy(x.double())
    margins = [row[t] - torch.cat([row[:t], row[t + 1 :]]).logsumexp(0) for row, t in zip(logits, y, strict=True)]
    sum(margins).backward()
    gradients = {path: copy.get_submodule(path).gate.grad.numpy() for path in gates}
    return np.array([float(margin.detach()) for margin in margins]), gradients


def channel_means(model, x, path):
    """Mean of each output channel of one module, over examples and positions."""
    copy = with_module(deepcopy(model), path, Tap)
    forward(copy, x)
    tap = copy.get_submodule(path)
    axis = -1 if isinstance(tap.inner, nn.Linear) else 1
    values = torch.cat([y.double().movedim(axis, 0).flatten(1) for y in tap.kept], dim=1)
    return [float(sum(channel) / len(channel)) for channel in values.numpy()]


def snapshot(model):
    """Everything a gate could disturb: the tensors and their identity, bytes, and every hook table."""
    tensors = {
        (path, kind, name): (id(value), None if value is None else value.detach().clone())
        for path, module in model.named_modules()
        for kind in ("_parameters", "_buffers")
        for name, value in getattr(module, kind).items()
    }
    hooks = {
        (path, name): dict(value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name.endswith("_hooks")
    }
    keys = {path: list(vars(module)) for path, module in model.named_modules()}
    return tensors, hooks, keys, list(model.state_dict())


def assert_same(before, after):
    (tensors, hooks, keys, state), (tensors_now, hooks_now, keys_now, state_now) = before, after
    assert (hooks_now, keys_now, state_now) == (hooks, keys, state)
    assert tensors_now.keys() == tensors.keys()
    for name, (identity, value) in tensors.items():
        identity_now, value_now = tensors_now[name]
        assert identity_now == identity, name
        assert value is None or torch.equal(value, value_now), name


def rough(model, seed=0):
    """Give a model biases, running statistics and scales of which none is trivially 0 or 1, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                uniform(module.running_mean, -0.3, 0.3)
                uniform(module.running_var, 0.5, 1.5)
                if module.affine:
                    uniform(module.weight, 0.5, 1.5)
                    uniform(module.bias, -0.3, 0.3)
            elif getattr(module, "bias", None) is not None:
                uniform(module.bias, -0.3, 0.3)
    return model.eval()


def held(model, x, places):
    """What passes at (path, side) of a plain model: a list of tensors, one for every call."""
    copy, found = deepcopy(model), {place: [] for place in places}

    def first(value):
        return (value[0] if isinstance(value, tuple) else value).detach().clone()

    for path, side in places:
        module, kept = copy.get_submodule(path), found[path, side]
        if side == "input":
            module.register_forward_pre_hook(lambda _m, args, kept=kept: kept.append(first(args)))
        else:
            module.register_forward_hook(lambda _m, _a, y, kept=kept: kept.append(first(y)))
    forward(copy, x)
    return found


def patched(model, x, patches, run=forward):
    """What a copy returns that has (path, side, axis, start, stop) overwritten by numbers, or by `held` tensors."""
    copy = deepcopy(model)
    for path, side, axis, start, stop, value in patches:
        calls = iter(value) if isinstance(value, list) else None

        def write(t, axis=axis, start=start, stop=stop, value=value, calls=calls):
            t = t.clone()
            part = t if axis is None else t.narrow(axis, start, stop - start)
            if calls:
                source = next(calls)
                part[...] = source if axis is None else source.narrow(axis, start, stop - start)
            elif axis is None:
                part[...] = value
            else:
                part.movedim(axis, -1)[...] = torch.as_tensor(value)
            return t

        def after(_module, _args, y, write=write):
            return (write(y[0]), *y[1:]) if isinstance(y, tuple) else write(y)

        module = copy.get_submodule(path)
        if side == "input":
            module.register_forward_pre_hook(lambda _m, args, write=write: (write(args[0]), *args[1:]))
        else:
            module.register_forward_hook(after)
    return run(copy, x)


def peak(values, bins):
    """Mean of the values in the fullest of equal bins between the smallest and the largest, one value at a time."""
    low, high = min(values), max(values)
    boxes = [[] for _ in range(bins)]
    for value in values:
        share = (value - low) / (high - low) if high > low else 0.0
        boxes[min(int(share * bins), bins - 1)].append(value)
    fullest = max(boxes, key=len)  # the first of equals
    return sum(fullest) / len(fullest)


def first_of(value):
    return value[0] if isinstance(value, tuple) else value


def silenced(block, rows):
    """A copy of an attention block some of whose heads' features have no values."""
    silent = deepcopy(block)
    with torch.no_grad():
        for name, parameter in silent.named_parameters():
            if name.startswith(("in_proj", "qkv")):  # queries, keys and values, in this order
                parameter[[2 * len(parameter) // 3 + row for row in rows]] = 0
    return silent


def projection_of(block):
    return block.out_proj if hasattr(block, "out_proj") else block.proj


def heads_of(model, path, x):
    """What an attention block's projection reads, though it reads it without a call: what it makes of an identity."""
    copy, found = deepcopy(model), []
    block = copy.get_submodule(path)
    bare = deepcopy(block)
    with torch.no_grad():
        projection_of(bare).weight.copy_(torch.eye(len(projection_of(bare).weight)))
        projection_of(bare).bias.zero_()
    block.register_forward_hook(lambda _m, a, k, _y: found.append(first_of(bare(*a, **k))), with_kwargs=True)
    forward(copy, x)
    return found


def swap_heads(model, path, rows, source=None, constants=None):
    """Remove features of heads from an attention block, in the model itself, or replace them.

    What a block returns is a sum over heads, so a head's part is what is lost with its values. Replacements are
    those of a source, or constants, (features,) or (positions, features).
    """
    block = model.get_submodule(path)
    silent, added = silenced(block, rows), 0.0
    if constants is not None:
        added = constants @ projection_of(block).weight[:, rows].detach().T
    if source is not None:
        parts, plain = [], deepcopy(model)
        whole = deepcopy(block)
        plain.get_submodule(path).register_forward_hook(
            lambda _m, a, k, _y: parts.append(first_of(whole(*a, **k)) - first_of(silent(*a, **k))), with_kwargs=True
        )
        forward(plain, source)
        (added,) = parts

    def after(_module, args, kwargs, _y):
        y = silent(*args, **kwargs)
        return (y[0] + added, *y[1:]) if isinstance(y, tuple) else y + added

    block.register_forward_hook(after, with_kwargs=True)


class PlainExperts(nn.Module):
    """The mixture of Mixtral and Qwen, or of GPT-OSS, one expert after another, some of them constants instead."""

    def __init__(self, inner, constants):
        super().__init__()
        self.inner, self.constants = inner, constants

    def returned(self, states, expert):
        """What an expert makes of every token."""
        if "GptOss" in type(self.inner).__name__:
            both = states @ self.inner.gate_up_proj[expert] + self.inner.gate_up_proj_bias[expert]
            gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
            hidden = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            return hidden @ self.inner.down_proj[expert] + self.inner.down_proj_bias[expert]
        gate, up = (states @ self.inner.gate_up_proj[expert].T).chunk(2, -1)
        return (self.inner.act_fn(gate) * up) @ self.inner.down_proj[expert].T

    def forward(self, states, index, weights):
        total = torch.zeros_like(states)
        for expert in range(len(self.inner.down_proj)):
            share = (weights * (index == expert)).sum(-1, keepdim=True)
            constant = self.constants.get(expert)
            total = total + share * (self.returned(states, expert) if constant is None else torch.as_tensor(constant))
        return total


def experts_returned(model, path, x):
    """(values, features) that each expert returns for the tokens it is sent, a list of as many as there are experts."""
    copy, found = deepcopy(model), []
    plain = PlainExperts(copy.get_submodule(path), {})

    def seen(_module, args):
        states, index, _ = args
        found.extend(plain.returned(states[(index == n).any(1)], n) for n in range(len(plain.inner.down_proj)))

    copy.get_submodule(path).register_forward_pre_hook(seen)
    forward(copy, x)
    return found
