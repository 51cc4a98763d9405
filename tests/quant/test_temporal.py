"""The layers that see the time alone: which they are in every family, and that they compute as in their network."""

import diffusers
import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from dacc.benchmarks.full_size_models import MODELS
from dacc.calibrate.store import open_calibration
from dacc.core.families import Family, find_family
from dacc.core.pipeline import denoisers
from dacc.quant.config import METHODS, QuantizeConfig
from dacc.quant.driver import traits_of
from dacc.quant.plan import plan_layers
from dacc.quant.reconstruct import ReconstructionConfig, reconstruct_weights
from dacc.quant.simulate import RoundedInputs
from dacc.quant.temporal import find_temporal, temporal_block
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import DenoiserCall, capture_calls

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers


def family_of(model):
    return find_family(type(model).__name__)[0]


def plans_of(model, **fields):
    method = METHODS.load("tfmq")
    config = QuantizeConfig(method="tfmq", **fields).resolved()
    return plan_layers(model, family_of(model), config, traits_of(method, method.CONFIG(), config))


@pytest.fixture
def scene(request):
    """The denoiser of a tiny pipeline and its calls in a short run: `scene("unet", steps=3)`."""

    def make(kind, steps=3, seeds=(1, 2, 3)):
        pipe = request.getfixturevalue(f"{kind}_pipeline")()
        size = {"height": 32, "width": 32} if kind in ("flux", "sd") else {}
        (model,) = denoisers(pipe).values()
        asked = RunRequest(seeds=seeds, num_inference_steps=steps, batch_size=2, **size)
        return model.requires_grad_(False), capture_calls(pipe, asked)

    return make


def resnets_of(model):
    return [name for name, module in model.named_modules() if type(module).__name__ == "ResnetBlock2D"]


@pytest.mark.parametrize("kind", ["unet", "sd"])
def test_in_a_unet_they_are_one_embedding_and_a_projection_for_every_residual_block(kind, scene):
    model, calls = scene(kind)
    network = find_temporal(model, family_of(model), calls)
    assert network.embedders == ["time_embedding"]
    assert list(network.sources) == [f"{name}.time_emb_proj" for name in resnets_of(model)]
    assert all(sources == ["time_embedding"] for sources in network.sources.values())
    assert network.get_submodule("time_embedding") is model.time_embedding


def test_in_stable_diffusion_they_are_22_projections():
    entry = MODELS["sd15"]
    with torch.device("meta"):
        model = entry.build(entry.published_depth)
    projections = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and family_of(model).role(name) == "temporal"
        and not name.startswith("time_embedding")
    ]
    assert len(projections) == len(resnets_of(model)) == 8 + 2 + 12


def test_in_stable_diffusion_all_22_are_found_in_a_call():
    config = MODELS["sd15"].config | {"layers_per_block": 2}
    narrow = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "cross_attention_dim": 8}
    model = diffusers.UNet2DConditionModel(**config | narrow | {"attention_head_dim": 4, "sample_size": 8})
    call = DenoiserCall("unet", None, (torch.randn(1, 4, 8, 8), 7), {"encoder_hidden_states": torch.randn(1, 3, 8)})
    assert len(find_temporal(model, family_of(model), [call]).sources) == 22


def test_in_dit_every_block_embeds_for_itself(scene):
    model, calls = scene("dit")
    network = find_temporal(model, family_of(model), calls)
    assert network.sources == {
        f"transformer_blocks.{number}.norm1.linear": [f"transformer_blocks.{number}.norm1.emb"] for number in (0, 1)
    }


def test_in_flux_one_embedding_serves_all_modulations():
    size = {"attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 4, "joint_attention_dim": 8}
    model = diffusers.FluxTransformer2DModel(
        **size, num_layers=1, num_single_layers=2, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4)
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 4),
        "timestep": torch.tensor([0.5]),
        "guidance": None,
        "encoder_hidden_states": torch.randn(1, 3, 8),
        "pooled_projections": torch.randn(1, 8),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    network = find_temporal(model, family_of(model), [DenoiserCall("transformer", None, (), inputs)])
    assert sorted(network.sources) == [
        "single_transformer_blocks.0.norm.linear",
        "single_transformer_blocks.1.norm.linear",
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
    ]
    assert {tuple(sources) for sources in network.sources.values()} == {("time_text_embed",)}


def test_in_pixart_one_modulation_serves_all_blocks():
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        norm_num_groups=4,
        cross_attention_dim=16,
        caption_channels=8,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "timestep": torch.tensor([3, 500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    network = find_temporal(model, family_of(model), [DenoiserCall("transformer", None, (), inputs)])
    assert network.sources == {"adaln_single.linear": ["adaln_single.emb"]}


def test_embeddings_at_one_place_are_summed():
    small = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = diffusers.UNet2DModel(**small, **blocks, num_class_embeds=10)
    call = DenoiserCall("unet", None, (torch.randn(2, 3, 8, 8), torch.tensor([5, 9]), torch.tensor([1, 2])), {})
    network = find_temporal(model, family_of(model), [call])
    assert network.embedders == ["time_embedding", "class_embedding"]
    hidden = []
    model.mid_block.resnets[0].time_emb_proj.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    call.replay(model)
    block = temporal_block(network, model, [], [call], RoundedInputs(model, {}), 0)
    found = network.embed(block.sightings[0].entering.args[0])["mid_block.resnets.0.time_emb_proj"]
    torch.testing.assert_close(found, hidden[0])


def test_models_that_are_built_in_another_way_have_none(scene):
    model, calls = scene("unet")
    family = family_of(model)
    nothing = Family("nothing", (), edge=(), temporal=family.temporal)
    assert find_temporal(model, nothing, calls) is None
    model.get_submodule("mid_block.resnets.0").nonlinearity = nn.ReLU()  # what enters is not SiLU(h)
    assert find_temporal(model, family, calls) is None


def test_looking_leaves_no_hooks(scene):
    model, calls = scene("unet")
    before = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    network = find_temporal(model, family_of(model), calls)
    temporal_block(network, model, [], calls, RoundedInputs(model, {}), 0)
    assert before == {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}


# as a unit


@pytest.mark.parametrize("kind", ["unet", "dit", "sd"])
def test_it_gives_what_the_projections_give_in_the_network(kind, scene):
    model, calls = scene(kind)
    network = find_temporal(model, family_of(model), calls)
    given = {}
    for name in network.sources:
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: given.setdefault(name, []).append(output)
        )
    for call in calls:
        call.replay(model)
    block = temporal_block(network, model, plans_of(model), calls, RoundedInputs(model, {}), 0)
    for name, target in zip(network.sources, zip(*(part.target for part in block.sightings), strict=True), strict=True):
        rows = torch.cat(given[name])
        for row in torch.cat(target):
            assert float((rows - row).abs().amax(1).min()) < 1e-5
        for row in rows:
            assert float((torch.cat(target) - row).abs().amax(1).min()) < 1e-5


def test_there_is_one_sighting_for_each_call_of_the_grid_with_different_rows_alone(scene):
    model, calls = scene("unet", steps=5, seeds=(1, 2, 3, 4, 5))
    network = find_temporal(model, family_of(model), calls)
    block = temporal_block(network, model, plans_of(model), calls, RoundedInputs(model, {}), 0)
    assert [sighting.call for sighting in block.sightings] == [0, 1, 2, 3, 4]
    assert all(output.shape[0] == 1 for sighting in block.sightings for output in sighting.target)
    assert sum(len(piece.target[0]) for piece in block.merged) == 5
    assert block.error() == 0


def test_rows_of_different_classes_stay_apart(scene):
    model, calls = scene("dit", steps=2)
    network = find_temporal(model, family_of(model), calls)
    block = temporal_block(network, model, plans_of(model), calls, RoundedInputs(model, {}), 0)
    rows = [len(sighting.target[0]) for sighting in block.sightings]
    assert rows == [4, 4]  # three classes and none


def test_its_layers_are_the_temporal_ones_and_the_other_units_have_the_rest(unet_folder, quantize_watched):
    done = quantize_watched(unet_folder, "tfmq", bits=4, act_bits=8, settings={"iterations": 4})
    first, *others = done.blocks
    found = {plan.name for plan in first.plans}
    assert found == {"time_embedding.linear_1", "time_embedding.linear_2"} | {
        f"{name}.time_emb_proj" for name in resnets_of(done.model)
    }
    rest = [plan.name for block in others for plan in block.plans]
    assert not found & set(rest)
    assert len(rest) == len(set(rest)) > 10
    kept = {plan.name for plan in plans_of(done.model) if plan.scheme}
    assert kept == found | set(rest)


def cosine_of(model, calls, wanted):
    """Mean cosine between float and quantized projections over all calls."""
    found = []
    names = list(wanted)
    given = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, args, output, name=name: given.update({name: output}))
        for name in names
    ]
    for number, call in enumerate(calls):
        call.replay(model)
        found += [cosine_similarity(given[name], wanted[name][number], dim=-1).mean() for name in names]
    for hook in hooks:
        hook.remove()
    return float(torch.stack(found).mean())


def test_reconstruction_brings_the_features_of_time_nearer(scene):
    model, calls = scene("unet", steps=20, seeds=(1,))
    network = find_temporal(model, family_of(model), calls)
    plans = [plan for plan in plans_of(model, bits=3) if plan.scheme]
    block = temporal_block(network, model, plans, calls, RoundedInputs(model, {}), 0)
    errors = {}
    for name, iterations, start in (("nearest", 0, "nearest"), ("learned", 150, "nearest"), ("gptq", 0, "gptq")):
        config = ReconstructionConfig(start=start, learning_rate=3e-2)
        treated = reconstruct_weights(block, config, iterations)
        errors[name] = treated["time_embedding.linear_1"].output_error
    assert errors["learned"] < 0.95 * errors["nearest"]
    assert errors["gptq"] < 0.2 * errors["nearest"]


def test_the_features_of_time_are_kept_better_than_inside_their_blocks(unet_folder, unet_pipeline, quantize_watched):
    temporal = [("time_embedding.*", 4), ("*.time_emb_proj", 4)]
    common = {"bits": 4, "layer_bits": temporal, "strategy": "every-step"}
    settings = {"iterations": 20, "learning_rate": 2e-2}
    alone = quantize_watched(unet_folder, "tfmq", settings=settings, **common)
    inside = quantize_watched(unet_folder, "qdiffusion", settings=settings, **common)
    model, calls = unet_pipeline().unet.requires_grad_(False), list(open_calibration(alone.calibration))
    wanted = {}
    for name in find_temporal(model, family_of(model), calls).sources:
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: wanted.setdefault(name, []).append(output)
        )
    for call in calls:
        call.replay(model)
    mine, others = (cosine_of(done.model, calls, wanted) for done in (alone, inside))
    assert 1 - mine < 0.2 * (1 - others)


def test_a_quantized_embedding_is_nearest_to_the_float_one_of_its_own_time(
    unet_folder, unet_pipeline, quantize_watched
):
    done = quantize_watched(unet_folder, "tfmq", bits=4, act_bits=8, settings={"iterations": 4})
    model = unet_pipeline().unet.requires_grad_(False)
    times = torch.arange(0, 1000, 50)

    def embed(unet):
        return unet.time_embedding(unet.time_proj(times))

    distances = torch.cdist(embed(done.model), embed(model))
    assert torch.equal(distances.argmin(1), torch.arange(len(times)))


def test_schemes_of_temporal_layers_take_the_asked_bits_with_this_method(scene):
    model, _ = scene("unet")
    found = {plan.name: plan.scheme for plan in plans_of(model, bits=4, act_bits=8) if plan.scheme}
    assert found["time_embedding.linear_1"].bits == 4
    assert found["time_embedding.linear_1"].act_bits == 16
    assert found["mid_block.resnets.0.conv1"].act_mode == "per-step"
