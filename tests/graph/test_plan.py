"""Sites of the exported graphs, and graphs that are rewritten by a plan."""

from collections import Counter

import onnx
import onnx_ir as ir
import pytest

from restyle_deploy.backends import BACKENDS
from restyle_deploy.graph import plan
from restyle_deploy.graph.plan import FAMILIES, TABLE, apply_choices, find_sites, table_of
from restyle_deploy.models.encoders import ENCODERS
from tests.graph_models import (
    BATCHES,
    ENCODER_TYPES,
    FPN,
    IR_SE,
    RESNET,
    assert_equal_in_range,
    border,
    content,
    exported,
    operators,
    random_inputs,
    run,
)

EXPORTED = {name: family.exported for name, family in FAMILIES.items()}
GENERATOR_FAMILIES = ("upsampling", "skip", "convolution")
ENCODER_FAMILIES = ("batchnorm", "heads", "convolution", "target")
DATASET_TYPES = pytest.mark.parametrize("dataset_type", ["ffhq_encode", "cars_encode"])


@pytest.fixture(autouse=True)
def _narrow_layers_are_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy models have fewer channels and pixels than any layer that is worth tiling."""
    monkeypatch.setattr(plan, "WINOGRAD_CHANNELS", 8)
    monkeypatch.setattr(plan, "WINOGRAD_LEAST_PIXELS", 1)


def encoder_of(encoder_type: str) -> ir.Model:
    return exported("encoder", encoder_type=encoder_type)


def check_plan(model: ir.Model, families: dict[str, str], *, epilogues: bool = False) -> ir.Model:
    """Give each site the choice of its family, compare with the exported graph, and return the rewritten one."""
    sites = find_sites(model)
    assert set(families) & {site.family for site in sites}, "nothing to choose"
    rewritten = model.clone()
    choices = {site.name: families.get(site.family, EXPORTED[site.family]) for site in sites}
    target = apply_choices(rewritten, sites, choices, epilogues=epilogues)
    onnx.checker.check_model(content(rewritten))
    assert (target is not None) == ("once" in [choices[site.name] for site in sites if site.family == "target"])
    inputs_kept = slice(1, None) if target is not None else slice(None)
    assert border(rewritten)[inputs_kept] == border(model)[inputs_kept]
    for batch in BATCHES:
        inputs = random_inputs(model, batch=batch, seed=batch)
        fed = dict(inputs)
        if target is not None:
            fed |= run(target, {"target": fed.pop("target")})
        assert_equal_in_range(run(rewritten, fed), run(model, inputs))
    return rewritten


def test_families_and_their_choices() -> None:
    assert {name: family.choices for name, family in FAMILIES.items()} == {
        "upsampling": ("node", "depthwise", "separable", "phases", "polyphase", "merged"),
        "skip": ("node", "transposed"),
        "batchnorm": ("kept", "folded"),
        "heads": ("separate", "merged"),
        "convolution": ("direct", "winograd"),
        "target": ("every step", "once"),
    }


def test_table_has_a_choice_for_every_family_on_every_backend() -> None:
    assert set(TABLE) == set(BACKENDS)
    for choices in TABLE.values():
        assert list(choices) == list(FAMILIES)
        for family, choice in choices.items():
            assert choice in FAMILIES[family].choices


def test_tensorrts_own_filter_is_not_for_bfloat16() -> None:
    other = {backend: table_of(backend, "bf16") for backend in TABLE}
    assert other == {**TABLE, "tensorrt": {**TABLE["tensorrt"], "upsampling": "polyphase"}}
    assert {backend: table_of(backend, "fp16") for backend in TABLE} == TABLE


def count_sites(model: ir.Model) -> Counter[str]:
    sites = find_sites(model)
    assert len({site.name for site in sites}) == len(sites)
    known = {value.name for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None}
    for site in sites:
        assert {*site.inputs, *site.outputs} <= known
        assert site.work > 0
        assert site.name == f"{site.layer} {site.family}"
        assert site.key == f"{site.family} {site.shape}"
    return Counter(site.family for site in sites)


EXPECTED_SITES = {
    # Four blocks, each of which begins with a normalisation; of the eight convolutions four have stride 2.
    "BackboneEncoder": {"batchnorm": 4, "heads": 1, "target": 1, "convolution": 4},
    "ProgressiveBackboneEncoder": {"batchnorm": 4, "heads": 1, "target": 1, "convolution": 4},
    "GradualStyleEncoder": {"batchnorm": 4, "heads": 1, "target": 1, "convolution": 4},
    # Two convolutions of each block, three of which have stride 2; the last block's map has 2×2 pixels.
    "ResNetBackboneEncoder": {"heads": 1, "target": 1, "convolution": 4},
    "ResNetProgressiveBackboneEncoder": {"heads": 1, "target": 1, "convolution": 4},
    "ResNetGradualStyleEncoder": {"heads": 1, "target": 1, "convolution": 4},
}


@pytest.mark.parametrize(
    "encoder_type",
    [pytest.param(name, marks=() if name in ENCODER_TYPES else pytest.mark.slow) for name in ENCODERS],
)
def test_sites_of_the_encoders(encoder_type: str) -> None:
    assert count_sites(encoder_of(encoder_type)) == EXPECTED_SITES[encoder_type]


@DATASET_TYPES
def test_sites_of_the_generator(dataset_type: str) -> None:
    model = exported("generator", dataset_type=dataset_type)
    assert count_sites(model) == {"upsampling": 4, "skip": 4, "convolution": 5}


def test_sites_say_what_their_speed_depends_on() -> None:
    shapes = {site.name: site.shape for model in (encoder_of(FPN), exported("generator")) for site in find_sites(model)}
    assert shapes["decoder.convs.0.conv upsampling"] == "8→8 to 8×8×8"
    assert shapes["decoder.to_rgbs.3 skip"] == "1→1 to 3×64×64"
    assert shapes["decoder.convs.1.conv convolution"] == "8→8 to 8×8×8"
    assert shapes["encoder.body.2.res_layer.0 batchnorm"] == "8→16 to 16×8×8"
    assert shapes["encoder.styles heads"] == "10 heads on 16×2×2, 16×4×4, 16×8×8"
    assert [shape for name, shape in shapes.items() if name.endswith(" target")] == ["8→6 to 8×32×32"]


def test_narrow_large_and_tiny_convolutions_are_not_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "WINOGRAD_MOST_PIXELS", 16 * 16)
    assert count_sites(exported("generator"))["convolution"] == 3
    monkeypatch.setattr(plan, "WINOGRAD_LEAST_PIXELS", 8 * 8)
    assert count_sites(exported("generator"))["convolution"] == 2
    monkeypatch.setattr(plan, "WINOGRAD_CHANNELS", 9)
    assert count_sites(exported("generator"))["convolution"] == 0


@DATASET_TYPES
@pytest.mark.parametrize(
    ("family", "choice"), [(family, choice) for family in GENERATOR_FAMILIES for choice in FAMILIES[family].choices]
)
def test_generator_computes_the_same_with_every_choice(family: str, choice: str, dataset_type: str) -> None:
    check_plan(exported("generator", dataset_type=dataset_type), {family: choice})


@pytest.mark.parametrize(
    ("family", "choice"), [(family, choice) for family in ENCODER_FAMILIES for choice in FAMILIES[family].choices]
)
@pytest.mark.parametrize("encoder_type", [IR_SE, FPN])
def test_encoders_compute_the_same_with_every_choice(encoder_type: str, family: str, choice: str) -> None:
    check_plan(encoder_of(encoder_type), {family: choice})


@pytest.mark.parametrize("backend", TABLE)
@pytest.mark.parametrize(
    ("name", "encoder_type"), [("generator", IR_SE), ("encoder", IR_SE), ("encoder", RESNET), ("encoder", FPN)]
)
def test_the_tables_plans_compute_the_same(name: str, encoder_type: str, backend: str) -> None:
    rewritten = check_plan(exported(name, encoder_type=encoder_type), dict(TABLE[backend]))
    assert not rewritten.functions or TABLE[backend]["upsampling"] == "node"


@pytest.mark.parametrize(("backend", "filters"), [("tensorrt", 4), ("tensorrt-rtx", 0)])
def test_epilogues_follow_the_filters_that_are_left(backend: str, filters: int) -> None:
    rewritten = check_plan(exported("generator"), dict(TABLE[backend]), epilogues=True)
    assert operators(rewritten)["UpFirDn2dEpilogue"] == filters
    assert operators(rewritten)["BiasActEpilogue"] == 9 - filters
    assert operators(rewritten)["FusedBiasAct"] == operators(rewritten)["LeakyRelu"] == 0


@pytest.mark.slow
@DATASET_TYPES
@pytest.mark.parametrize("encoder_type", ENCODERS)
def test_encoders_of_every_type_compute_the_same_with_all_rewrites(encoder_type: str, dataset_type: str) -> None:
    all_rewrites = {name: FAMILIES[name].choices[-1] for name in ENCODER_FAMILIES}
    check_plan(exported("encoder", encoder_type=encoder_type, dataset_type=dataset_type), all_rewrites)


def test_each_site_has_its_own_choice() -> None:
    model = exported("generator")
    sites = find_sites(model)
    names = [site.name for site in sites if site.family == "upsampling"]
    choices = dict(zip(names, ("depthwise", "separable", "polyphase", "merged"), strict=True))
    inputs = random_inputs(model, batch=2)
    expected = run(model, inputs)
    before = operators(model)
    assert apply_choices(model, sites, choices) is None
    assert_equal_in_range(run(model, inputs), expected)
    after = operators(model)
    assert before["UpFirDn2d"] - after["UpFirDn2d"] == 4
    assert after["DepthToSpace"] == 1
    assert after["Conv"] - before["Conv"] == 1 + 2 + 1


def test_sites_that_are_not_named_stay_and_unknown_names_are_ignored() -> None:
    model, plain = exported("generator"), exported("generator")
    sites = find_sites(model)
    apply_choices(plain, sites, {})
    apply_choices(model, sites, {"decoder.convs.99.conv upsampling": "merged", "decoder.to_rgbs.0 shadow": "deep"})
    assert content(model) == content(plain)
    assert operators(model)["UpFirDn2d"] == 8


def test_every_plan_folds_what_the_activation_scales() -> None:
    model = exported("generator")
    apply_choices(model, find_sites(model), {})
    assert operators(model)["FusedBiasAct"] == 0
