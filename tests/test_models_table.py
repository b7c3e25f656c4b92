"""The table of models: its oracle, its verdicts and its rendering."""

import pytest
import torch
from torch import nn

import coar
from benchmarks.models_table import cells, oracle, results
from benchmarks.models_table.subjects import ROWS, Subject, by_state_dict, lively, numbers, settle
from tests import oracles


class Net(nn.Module):
    """A convolution, a batch norm, attention that reads its projection without a call, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x))).flatten(2).mT
        return self.last(self.attention(y, y, y, need_weights=False)[0].mean(1))


NET = Subject("net", "none", Net, numbers(3, 6, 6), by_state_dict)


def row_of(component):
    return oracle.Row(component.site, component.side, component.axis, component.position, component.size)


@pytest.fixture
def model():
    return NET.model()


def test_the_oracle_overwrites_outputs_by_their_means(model):
    x, other, chosen = NET.inputs(1), NET.inputs(2), [1, 5]
    rows = [row_of(component) for component in coar.conv_filters(model)]
    constants = oracle.means(model, rows, other)
    expected = oracles.channel_means(model, other, "conv")
    assert [float(constant) for constant in constants] == pytest.approx(expected, abs=1e-6)
    keep = torch.ones(len(rows)).index_fill(0, torch.tensor(chosen), 0)
    found = oracle.Oracle(model, rows, constants).outputs(x, keep)
    replaced = oracles.replaced(model, {("conv", i): expected[i] for i in chosen})
    torch.testing.assert_close(found, oracle.run(replaced, x), rtol=0, atol=1e-5)


def test_the_oracle_takes_means_before_a_layer_in_place_changes_them():
    net, x = oracles.rough(nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, 5))), torch.randn(ROWS, 3)
    constants = oracle.means(net, [row_of(component) for component in coar.neurons(net, include="0")], x)
    expected = oracles.channel_means(net, x, "0")
    assert [float(constant) for constant in constants] == pytest.approx(expected, abs=1e-6)


def test_the_oracle_removes_heads_that_a_projection_reads_without_a_call(model):
    x = NET.inputs(1)
    rows = [row_of(component) for component in coar.attention_heads(model)]
    found = oracle.Oracle(model, rows, None).outputs(x, torch.tensor([1.0, 0.0]))
    oracles.swap_heads(model, "attention", range(4, 8))
    torch.testing.assert_close(found, oracle.run(model, x), rtol=0, atol=1e-5)


def test_the_oracle_multiplies_weights_of_slices(model):
    x = NET.inputs(1)
    rows = [row_of(component) for component in coar.parameter_slices(model, "conv.weight")]
    found = oracle.Oracle(model, rows, None).outputs(x, torch.ones(8).index_fill(0, torch.tensor([0, 3]), 0))
    torch.testing.assert_close(found, oracle.run(oracles.zeroed(model, [("conv", 0), ("conv", 3)]), x))


def test_every_cell_of_a_net_is_right_or_has_no_meaning():
    found = cells.check(NET)["kinds"]
    assert list(found) == ["conv filters", "neurons", "input features", "attention heads", "parameter slices"]
    verdicts = {kind: [cell["verdict"] for cell in of_kind["cells"]] for kind, of_kind in found.items()}
    assert verdicts.pop("parameter slices") == ["right", "undefined", "right", "right"]
    assert all(of_kind == ["right"] * 4 for of_kind in verdicts.values())


def verdict(work):
    return cells.attempt("masks", work).verdict


def test_verdicts():
    def fails(error):
        def work():
            raise error

        return work

    assert verdict(lambda: "1e-7") == "right"
    assert verdict(fails(cells.DifferentError("by 1"))) == "wrong"
    assert verdict(fails(coar.errors.AblationError("why"))) == "refused"
    assert verdict(fails(KeyError("why"))) == "traceback"


def test_weights_without_effect_are_drawn_again_and_statistics_settle():
    net = Net().requires_grad_(False)
    with torch.no_grad():
        net.last.weight.zero_()
        net.norm.weight.fill_(1e-6)
    lively(net)
    x = NET.inputs(7) * 3 + 1
    settle(net, x)
    assert float(net.last.weight.std()) > 0.1
    assert float(net.norm.weight.min()) > 0.4
    with torch.no_grad():
        before = net.conv(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(net.norm.running_mean, before.mean(1))
    variances = before.var(1)
    torch.testing.assert_close(net.norm.running_var, variances.clamp_min(0.25 * variances.mean()))


def of_kind(*verdicts, detail="0"):
    columns = zip(results.COLUMNS, verdicts, strict=True)
    return {"cells": [{"column": column, "verdict": given, "detail": detail} for column, given in columns]}


def test_a_reason_names_no_folder():
    words = "EditError: nothing was written to /{}/model, since it would differ"
    assert results.reason(words.format("a")) == results.reason(words.format("b")) == words.replace("/{}/model", "...")


def test_the_page_counts_cells_and_numbers_reasons():
    why = "ComponentError: cannot determine the heads of 'a.0': it is 12 wide; exclude it"
    same = why.replace("a.0", "b.1").replace("12", "7")
    found = {
        results.Key("timm", "one"): {
            "kinds": {
                "neurons": of_kind("right", "right", "right", "wrong"),
                "attention heads": of_kind(*["refused"] * 4, detail=why),
            }
        },
        results.Key("timm", "two"): {
            "kinds": {
                "attention heads": of_kind(*["refused"] * 4, detail=same),
                "modules": of_kind("right", "right", "undefined", "undefined"),
            }
        },
        results.Key("timm", "three"): {"stopped": "the process took more than 1 s"},
    }
    lines = results.rendered(found, {"timm": 4}).splitlines()
    assert "In all: 5 of 14 right (35.7 %), 8 refused, 1 wrong." in " ".join(lines[:3])
    assert "| timm | 3 of 4 | 5 of 14 right (35.7 %), 8 refused, 1 wrong |" in lines
    assert "| neurons | 1 right | 1 right | 1 right | 1 wrong |" in lines
    assert [line for line in lines if line.startswith(("1. ", "2. "))] == [
        "1. ComponentError: cannot determine the heads of '...': it is n wide; exclude it"
    ]
    assert "| one | R R R W | 1 1 1 1 |  |" in lines
    assert "| two |  | 1 1 1 1 | R R · · |" in lines
    assert "- timm three: the process took more than 1 s" in lines


def test_examples_are_as_many_as_the_oracle_takes():
    assert len(NET.inputs(0)) == ROWS
    assert not torch.equal(NET.inputs(0), NET.inputs(1))
