"""What the package does on a device, by name, and the comparison of its numbers with those of the CPU.

Cases import what they need alone, since transformers takes seconds.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import coar
from coar.errors import ComponentError, SettingsError
from coar.examples import call_model, devices_of
from coar.forward.copies import device_copy
from tests import contract

CASES: dict[str, Callable[[str, Path], dict[str, np.ndarray]]] = {}
FIELDS = ("outputs", "base_output", "gradient_kept", "gradient_ablated", "gradient_outputs")


def case(function):
    CASES[function.__name__] = function
    return function


def collected(study, folder, device, *, masks=8, gradients=4, **options):
    run = coar.collect(
        study, folder / f"{device}.zarr", masks=masks, gradients=gradients, device=device, progress=False, **options
    )
    found = {name: run.array(name)[:] for name in FIELDS if name in run.group}
    return run, found | {"constants": run.replacements}


def pictures(ablation, **options):
    net = contract.net()
    return coar.Study(
        model=net,
        examples=contract.pictures(10, 1),
        components=contract.parts(net),
        ablation=ablation,
        sampler=coar.BernoulliSampler(ablated_fraction=0.3, seed=2),
        **options,
    )


CALIBRATION = contract.pictures(16, 7)
ABLATIONS = {
    "zero": coar.ZeroWeight,
    "zero activation": coar.ZeroActivation,
    "mean": lambda: coar.Mean(calibration=CALIBRATION),
    "peak": lambda: coar.Peak(calibration=CALIBRATION),
    "optimal": lambda: coar.Optimal(calibration=CALIBRATION, steps=3),
    "resample": coar.Resample,
}
for label, make in ABLATIONS.items():
    CASES[f"a run with {label}"] = lambda device, folder, make=make: collected(pictures(make()), folder, device)[1]


@case
def baselines(device, folder):
    run, found = collected(pictures(coar.ZeroWeight()), folder, device)
    study = pictures(coar.ZeroWeight())
    for compute_baseline in (coar.leave_one_out, coar.mask_gradient):
        found[compute_baseline.__name__] = compute_baseline(study, run, device=device, progress=False).weights()
    return found


@case
def divergence_from_the_unablated_model(device, folder):
    return collected(pictures(coar.ZeroWeight(), output=coar.KLDivergence()), folder, device)[1]


@case
def precision_is_measured(device, folder):
    """The tolerance keeps bfloat16 out, whose speed depends on what else runs."""
    execution = coar.Execution(precision_tolerance=1e-9)
    study = pictures(coar.ZeroWeight())
    return collected(study, folder, device, gradients=0, precision="auto", execution=execution)[1]


@case
def parameter_slices(device, folder):
    net = contract.net()
    study = replace(pictures(coar.ZeroWeight()), model=net, components=coar.parameter_slices(net, "hidden.weight"))
    return collected(study, folder, device, gradients=0)[1]


@case
def texts_of_several_lengths(device, folder):
    from tests import tiny

    net = tiny.classifier()
    study = coar.Study(
        model=net,
        examples=tiny.sentences([9, 3, 7, 5, 9, 2, 4, 8] * 2),
        components=coar.attention_heads(net) + coar.mlp_neurons(net),
        ablation=coar.Mean(calibration=tiny.sentences([6, 3, 5, 9], seed=9)),
    )
    run, found = collected(study, folder, device, gradients=8)
    coar.fit(run, progress=False)
    return found | {"weights": coar.load(run.path).weights()}


@case
def fits_of_masks(device, folder):
    """On a device fits are iterative; on the CPU these come from a decomposition."""
    run, _ = collected(pictures(coar.ZeroWeight()), folder, device, masks=60, gradients=16)
    found = {}
    for method in ("ridge", "lasso", "informed"):
        fitted = coar.fit(run, method=method, device=device, memory_limit="4GiB", progress=False)
        found |= {f"weights of {method}": fitted.weights(), f"intercepts of {method}": fitted.intercept}
    return found


@case
def attention_heads_by_position(device, folder):
    from tests import tiny

    net = tiny.model("vit")
    examples = coar.Examples(inputs=tiny.inputs("vit", 6), targets=torch.arange(6))
    ablation = coar.PositionMean(calibration=coar.Examples(inputs=tiny.inputs("vit", 8, 4), targets=torch.zeros(8)))
    study = coar.Study(model=net, examples=examples, components=coar.attention_heads(net), ablation=ablation)
    return collected(study, folder, device)[1]


@case
def a_language_model_reads_few_logits(device, folder):
    from tests import edge_oracle
    from tests.test_circuits import texts as circuit_texts

    model = edge_oracle.build("llama")
    study = coar.Study(
        model=model,
        examples=circuit_texts(0),
        components=coar.mlp_neurons(model),
        output=coar.LogitDifference(),
        ablation=coar.Mean(calibration=circuit_texts(7)),
    )
    return collected(study, folder, device)[1]


@case
def a_model_that_accelerate_has_split(device, folder):
    from accelerate import dispatch_model

    from tests import tiny

    plain = tiny.model("gpt2")
    places = {f"body.{name}": "cpu" for name in ("wte", "wpe", "drop", "h.0", "ln_f")} | {"body.h.1": device}
    study = coar.Study(
        model=dispatch_model(plain, places, main_device="cpu", force_hooks=True),
        examples=coar.Examples(inputs=tiny.inputs("gpt2"), targets=torch.arange(5)),
        components=coar.attention_heads(plain),
        ablation=coar.ZeroActivation(),
    )
    return collected(study, folder, device)[1]


def split(model, places, main):
    """The model after accelerate has put its parts where `places` says; all else runs on the main device."""
    from accelerate import dispatch_model

    def placed(path, module):
        if path in places or not any(place.startswith(f"{path}.") or not path for place in places):
            return {path: places.get(path, main)}
        children = [(f"{path}.{name}".strip("."), child) for name, child in module.named_children()]
        return {key: place for child in children for key, place in placed(*child).items()}

    made = dispatch_model(model, placed("", model), main_device=main, force_hooks=True)
    assert devices_of(device_copy(made, "auto")) == devices_of(made) != devices_of(device_copy(made, "cpu"))
    return made


def split_pictures(ablation, device, places):
    """A study of pictures, on the CPU or with a model that stays split, and the device to give."""
    made = pictures(ablation)
    if device == "cpu":
        return made, device
    split(made.model, places(device), "cpu")
    return made, "auto"


def every_other(device):
    return {"bare": device, "norm": device, "last": device}


for label, make in ABLATIONS.items():

    def stays_split(device, folder, make=make):
        study, place = split_pictures(make(), device, every_other)
        run, found = collected(study, folder, place)
        for compute_baseline in (coar.leave_one_out, coar.mask_gradient):
            found[compute_baseline.__name__] = compute_baseline(study, run, device=place, progress=False).weights()
        return found

    CASES[f"a split model with {label}"] = stays_split


@case
def a_batch_norm_apart_from_its_convolution(device, folder):
    study, place = split_pictures(
        coar.Mean(calibration=CALIBRATION), device, lambda other: {"bare": other, "hidden": other}
    )
    return collected(study, folder, place)[1]


@case
def texts_in_a_split_model(device, folder):
    from tests import tiny

    plain = tiny.model("gpt2")
    model = plain if device == "cpu" else split(plain, {"body.wpe": device, "body.h": device}, "cpu")
    inputs = {"x": tiny.inputs("gpt2")}
    calibration = coar.Examples(inputs={"x": tiny.inputs("gpt2", seed=5)}, targets=torch.arange(5))
    study = coar.Study(
        model=model,
        examples=coar.Examples(inputs=inputs, targets=torch.arange(5)),
        components=coar.attention_heads(plain)
        + coar.mlp_neurons(plain)
        + coar.modules(plain, ["body.h.0.mlp", "body.h.1.mlp"], axis=-1, size=24),
        ablation=coar.PositionMean(calibration=calibration),
    )
    place = device if device == "cpu" else "auto"
    run, found = collected(study, folder, place)
    return found | {"effects": coar.leave_one_out(study, run, device=place, progress=False).weights()}


@case
def experts_in_a_split_model(device, folder):
    from tests import architectures

    architecture = architectures.ARCHITECTURES["GPT-OSS"]
    plain, x = architecture.make(), architecture.inputs(4)
    plain.body.set_experts_implementation("eager")  # others count tokens with a kernel that only some devices have
    model = plain if device == "cpu" else split(plain, {"body.model.layers.1": device}, "cpu")
    examples = coar.Examples(inputs=x, targets=torch.zeros(len(x), dtype=torch.int64))
    study = coar.Study(
        model=model, examples=examples, components=coar.experts(plain), ablation=coar.Mean(calibration=examples)
    )
    return collected(study, folder, device if device == "cpu" else "auto")[1]


def check_memory(device, folder):
    """The part of a split model on the CPU is an empty file of 1 TiB, mapped into memory, of which nothing is read."""
    from accelerate import dispatch_model

    rows, columns = 2**20, 2**18
    with (folder / "weights").open("wb") as file:
        file.truncate(4 * rows * columns)
    model = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False, device="meta"), torch.nn.Linear(1, 1))
    mapped = torch.from_file(str(folder / "weights"), shared=True, size=rows * columns)
    model[0].weight = torch.nn.Parameter(mapped.view(rows, columns), requires_grad=False)
    dispatch_model(model, {"0": "cpu", "1": device}, main_device="cpu", force_hooks=True)
    for place in ("auto", "cpu"):
        with pytest.raises(SettingsError, match=r"a copy of Sequential takes 1.02e\+03 GiB on cpu") as caught:
            device_copy(model, place)
        assert ("device='auto'" in str(caught.value)) == (place == "cpu")


@case
def what_needs_one_device(device, folder):
    """Lenses gather the model, a compiled model falls back, and edges are refused; memory is counted by device."""
    from tests import edge_oracle
    from tests.test_lenses import texts as lens_texts

    model, place = edge_oracle.build("llama"), device if device == "cpu" else "auto"
    if device != "cpu":
        split(model, {"model.layers.1": device}, "cpu")
        with pytest.raises(ComponentError, match=r"split over cpu, \S+, and edges are found and gated on one device"):
            coar.edges(model)
        check_memory(device, folder)
    made = coar.lens(model, lens_texts(), "logit", device=place, progress=False)
    study, place = split_pictures(coar.ZeroWeight(), device, every_other)
    compiled = coar.Execution(compile=device != "cpu")
    found = collected(study, folder, place, gradients=0, execution=compiled)[1]
    return found | {"lens": made.summary(lens_texts(seed=3)).select_dtypes("number").to_numpy(float)}


@case
def a_page_of_a_split_model(device, folder):
    from coar.explorer.activations import compute

    study, place = split_pictures(coar.ZeroWeight(), device, every_other)
    run, _ = collected(study, folder, place, gradients=0)
    made = compute(study, np.arange(4), run.facts.batch_norms, device=place)
    return {"values": made.exciting.values}


@case
def edits_of_a_split_model(device, folder):
    study, place = split_pictures(coar.Mean(calibration=CALIBRATION), device, every_other)
    return edits_of(study, place, folder)


@case
def an_edit_of_a_split_language_model_is_applied_and_undone(device, folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests import tiny

    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": tiny.WORDS}
    model = tiny.lively(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False)))
    if device != "cpu":
        split(model, {"transformer.h.1": device}, "cpu")
    tokens = tiny.inputs("gpt2", 4)
    examples = coar.token_examples({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    study = coar.Study(
        model=model,
        examples=examples,
        components=coar.attention_heads(model),
        ablation=coar.Mean(calibration=examples),
        output=coar.TokenMargin(),
    )
    names = study.components.names
    edit = coar.Edit.of(study, [names[0], names[-1]], device=device if device == "cpu" else "auto").keep(model)
    edited, found = edit.apply(model), {}
    found["edited"] = call_model(edited, examples.inputs).logits.detach().cpu().numpy()
    edit.undo(edited)
    return found | {"undone": call_model(edited, examples.inputs).logits.detach().cpu().numpy()}


@case
def between_two_devices_of_a_kind(device, folder):
    """Passes without gradients, which torch's engine runs on the first one of a backend in Python alone."""
    found = {}
    for label in ("zero", "mean", "resample"):
        made = pictures(ABLATIONS[label]())
        if device != "cpu":
            split(made.model, every_other(torch.device(device, 1)), torch.device(device, 0))
        place = device if device == "cpu" else "auto"
        run, own = collected(made, folder / label, place, gradients=0)
        own["effects"] = coar.leave_one_out(made, run, device=place, progress=False).weights()
        found |= {f"{label} {name}": values for name, values in own.items()}
    return found


@case
def edges(device, folder):
    from tests.test_circuits import study_of as circuit_study

    found = {}
    for family in ("llama", "gpt2"):
        made = collected(circuit_study(family), folder / family, device)[1]
        found |= {f"{family} {name}": values for name, values in made.items()}
    return found


@case
def edges_with_other_examples(device, folder):
    from tests.test_circuits import study_of as circuit_study

    return collected(circuit_study(ablation=coar.Counterfactual(pairs="pair")), folder, device)[1]


@case
def informed_fits_without_masks(device, folder):
    from tests.synthetic import add_gradients, arrays, fit, make, pairwise

    found = {}
    for examples, components in ((60, 32), (12, 500)):  # fewer unknowns than outputs, and more
        truth = pairwise(examples, components)
        path = folder / f"{device}-{components}.zarr"
        run = make(path, truth.outputs, components=components, masks=2, blocks=(2, examples))
        fitted = fit(add_gradients(run, truth, 64), method="informed", masks=0, device=device)
        found |= {f"{name} of {components} components": values for name, values in arrays(fitted).items()}
        found[f"quality of {components} components"] = np.array([fitted.fit.prior_quality.error])
    return found


@case
def edits(device, folder):
    return edits_of(pictures(coar.Mean(calibration=CALIBRATION)), device, folder)


def edits_of(study, device, folder):
    run, found = collected(study, folder, device, masks=60, gradients=0)
    attributions = coar.fit(run, progress=False)
    goal = coar.EditGoal(targets="label != 1", references="label == 1", direction="decrease")
    for strength in ("full", "per_component"):
        options = {"budget": 2, "strength": strength, "device": device, "steps": 3}
        with contextlib.redirect_stderr(io.StringIO()):
            chosen = coar.select(attributions, study.model, study.examples, goal, **options)
        made = chosen.edit
        judged = coar.judge_edit(made, study.model, study.examples, device=device)
        found[strength] = judged.select_dtypes("number").to_numpy(float)
    return found


@case
def circuits(device, folder):
    from tests.test_circuits import study_of as circuit_study
    from tests.test_circuits import texts as circuit_texts

    study, found = circuit_study(), {}
    few = {"eap": {}, "eap_ig": {"steps": 2}, "ugs": {"steps": 1}}
    for method, settings in (few | {"gradual": {"steps": 2}}).items():
        scores = coar.circuit_scores(study, method, device=device, progress=False, **settings)
        found[method] = np.asarray(scores.values)
    chosen = coar.circuit(scores, edges=40, constant_steps=1, progress=False)
    judged = coar.faithfulness(chosen, coar.CircuitEvaluator(study, device=device), circuit_texts(3))
    return found | {"faithful": np.array([value for value in vars(judged).values() if isinstance(value, float)])}


@case
def traces(device, folder):
    from tests import edge_oracle
    from tests.test_tracing import prompts

    model = edge_oracle.build("gpt2")
    found = {}
    for corruption in ("optimal", "noise", "mean"):
        made = coar.trace(
            model, prompts(model), corruption=corruption, learning_share=0.5, steps=3, device=device, progress=False
        )
        found[corruption] = made.table.select_dtypes("number").to_numpy(float)
    return found


@case
def lenses(device, folder):
    from tests import edge_oracle
    from tests.test_lenses import texts as lens_texts

    model, found = edge_oracle.build("llama"), {}
    for kind in ("logit", "mean", "tuned", "optimal"):
        made = coar.lens(model, lens_texts(), kind, steps=3, texts_per_step=2, device=device, progress=False)
        found[kind] = made.summary(lens_texts(seed=3)).select_dtypes("number").to_numpy(float)
        found[f"{kind} read"] = (
            made.read(lens_texts(seed=3).inputs["input_ids"][0]).table["probability"].to_numpy(float)
        )
    return found


@case
def a_page(device, folder):
    from coar.explorer.activations import compute

    study = pictures(coar.ZeroWeight())
    run, _ = collected(study, folder, device, gradients=0)
    made = compute(study, np.arange(4), run.facts.batch_norms)
    return {} if made is None or made.predicted is None else {"predicted": made.predicted}


def difference(name, device):
    """Why a case's numbers on a device differ from those on the CPU; "" if they do not."""
    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        expected = CASES[name]("cpu", Path(place))
        torch.manual_seed(0)
        found = CASES[name](device, Path(place))
    for key, values in expected.items():
        scale = max(float(np.nanmax(np.abs(values), initial=0.0)), 1e-6)
        if not np.allclose(found[key] / scale, values / scale, rtol=0, atol=1e-3, equal_nan=True):
            return f"{key} differs by {np.nanmax(np.abs(found[key] - values)) / scale:.2g} of its largest number"
    return ""
