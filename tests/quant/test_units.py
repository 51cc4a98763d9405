import diffusers
import pytest
import torch
from torch import nn

from dacc.core.families import Family, find_family
from dacc.core.pipeline import denoisers
from dacc.quant.config import QuantizeConfig
from dacc.quant.plan import LayerPlan, plan_layers
from dacc.quant.units import find_units
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import DenoiserCall, capture_calls

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers

SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "sample_size": 8, "num_layers": 2}
KINDS = ["unet_pipeline", "sd_pipeline", "dit_pipeline", "flux_pipeline", "pixart", "sd3", "sana_folder"]


def call_of(**kwargs):
    return DenoiserCall("transformer", None, (), {"timestep": torch.tensor([3, 500]), **kwargs})


def pixart():
    sizes = {"out_channels": 8, "norm_num_groups": 4, "cross_attention_dim": 16, "caption_channels": 8}
    size = {"resolution": None, "aspect_ratio": None}
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 8)}
    return diffusers.PixArtTransformer2DModel(**SMALL, **sizes), call_of(**inputs, added_cond_kwargs=size)


def sd3():
    sizes = {"joint_attention_dim": 8, "caption_projection_dim": 16, "pooled_projection_dim": 8}
    model = diffusers.SD3Transformer2DModel(**SMALL, **sizes, out_channels=4, pos_embed_max_size=8)
    text = {"encoder_hidden_states": torch.randn(2, 5, 8), "pooled_projections": torch.randn(2, 8)}
    return model, call_of(hidden_states=torch.randn(2, 4, 8, 8), **text)


def sana(folder):
    model = diffusers.SanaTransformer2DModel.from_pretrained(folder / "transformer")
    return model, call_of(hidden_states=torch.randn(2, 4, 8, 8), encoder_hidden_states=torch.randn(2, 5, 24))


@pytest.fixture
def scene(request):
    """The denoiser of a kind of pipeline and one of its calls."""

    def make(kind):
        torch.manual_seed(0)
        if kind in ("pixart", "sd3"):
            return globals()[kind]()
        if kind == "sana_folder":
            return sana(request.getfixturevalue(kind))
        pipe = request.getfixturevalue(kind)()
        size = {"height": 32, "width": 32} if "flux" in kind else {}
        (model,) = denoisers(pipe).values()
        return model, capture_calls(pipe, RunRequest(seeds=(1,), num_inference_steps=1, **size))[0]

    return make


def units_of(model, call):
    family, _ = find_family(type(model).__name__)
    plans = plan_layers(model, family, QuantizeConfig())
    return find_units(model, plans, family, call), plans


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "unet_pipeline",
            "time_embedding.linear_1 time_embedding.linear_2 down_blocks.0.resnets.0 down_blocks.0.downsamplers.0.conv"
            " down_blocks.1.resnets.0 down_blocks.1.attentions.0"
            " mid_block.resnets.0 mid_block.attentions.0 mid_block.resnets.1"
            " up_blocks.0.resnets.0 up_blocks.0.attentions.0 up_blocks.0.resnets.1 up_blocks.0.attentions.1"
            " up_blocks.0.upsamplers.0.conv up_blocks.1.resnets.0 up_blocks.1.resnets.1",
        ),
        ("dit_pipeline", "transformer_blocks.0 transformer_blocks.1"),
        (
            "flux_pipeline",
            "time_text_embed.timestep_embedder.linear_1 time_text_embed.timestep_embedder.linear_2"
            " time_text_embed.text_embedder.linear_1 time_text_embed.text_embedder.linear_2"
            " transformer_blocks.0 single_transformer_blocks.0",
        ),
        (
            "pixart",
            "adaln_single.emb.timestep_embedder.linear_1 adaln_single.emb.timestep_embedder.linear_2"
            " adaln_single.linear caption_projection.linear_1 caption_projection.linear_2"
            " transformer_blocks.0 transformer_blocks.1",
        ),
        (
            "sd3",
            "time_text_embed.timestep_embedder.linear_1 time_text_embed.timestep_embedder.linear_2"
            " time_text_embed.text_embedder.linear_1 time_text_embed.text_embedder.linear_2"
            " transformer_blocks.0 transformer_blocks.1",
        ),
    ],
)
def test_blocks_and_the_layers_between_them_are_units_as_they_run(kind, expected, scene):
    units, _ = units_of(*scene(kind))
    assert [unit.name for unit in units] == expected.split()


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_with_a_scheme_is_in_exactly_one_unit(kind, scene):
    model, call = scene(kind)
    units, plans = units_of(model, call)
    members = [plan for unit in units for plan in unit.plans]
    assert sorted(plan.name for plan in members) == sorted(plan.name for plan in plans if plan.scheme)
    assert all(f"{plan.name}.".startswith(f"{unit.name}.") for unit in units for plan in unit.plans)
    assert 0 < len(units) < len(members)


@pytest.mark.parametrize("kind", KINDS)
def test_units_come_in_the_order_in_which_they_run(kind, scene):
    model, call = scene(kind)
    units, _ = units_of(model, call)
    ran = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    call.replay(model)
    places = [ran.index(unit.name) for unit in units]
    assert places == sorted(places)


@pytest.mark.parametrize("kind", KINDS)
def test_no_unit_lies_in_another(kind, scene):
    names = [unit.name for unit in units_of(*scene(kind))[0]]
    assert not [(one, other) for one in names for other in names if other.startswith(f"{one}.")]


def test_attention_in_a_transformer_block_belongs_to_it_and_alone_is_a_block(scene):
    units, _ = units_of(*scene("sd_pipeline"))
    inside = "down_blocks.1.attentions.0.transformer_blocks.0"
    (unit,) = [unit for unit in units if unit.name == inside]
    assert {f"{inside}.attn1.to_q", f"{inside}.attn2.to_k"} <= {plan.name for plan in unit.plans}
    names = [unit.name for unit in units_of(*scene("unet_pipeline"))[0]]
    assert "down_blocks.1.attentions.0" in names


def test_looking_for_units_leaves_no_hook_behind(scene):
    model, call = scene("dit_pipeline")
    before = [len(module._forward_pre_hooks) for module in model.modules()]
    units_of(model, call)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == before


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.alone, self.inner = nn.Linear(4, 4), nn.ModuleList([Inner(), Inner()])

    def forward(self, x):
        return self.inner[1](self.alone(x))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused, self.late, self.outer, self.early = nn.Linear(4, 4), nn.Linear(4, 4), Outer(), Inner()

    def forward(self, x):
        return self.late(self.outer(self.early(x)))


def toy_units(*blocks, skip=()):
    family = Family("toy", (), (), (), blocks=blocks)
    plans = plan_layers(Network(), family, QuantizeConfig(bits=8))
    plans = [LayerPlan(plan.name, plan.shape, None, "left") if plan.name in skip else plan for plan in plans]
    call = DenoiserCall("toy", None, (torch.ones(1, 4),), {})
    return {unit.name: [plan.name for plan in unit.plans] for unit in find_units(Network(), plans, family, call)}


def test_the_outermost_block_is_the_unit_and_what_does_not_run_comes_last():
    outer = ["outer.alone", "outer.inner.0.layer", "outer.inner.1.layer"]
    assert list(toy_units("Outer", "Inn*").items()) == [
        ("early", ["early.layer"]),
        ("outer", outer),
        ("late", ["late"]),
        ("unused", ["unused"]),
    ]
    assert list(toy_units("Inner")) == ["early", "outer.alone", "outer.inner.1", "late", "unused", "outer.inner.0"]
    assert all([name] == layers for name, layers in toy_units().items())


def test_a_block_without_a_layer_to_quantize_is_no_unit():
    assert list(toy_units("Inner", skip=("early.layer", "unused", "late"))) == [
        "outer.alone",
        "outer.inner.1",
        "outer.inner.0",
    ]
