import contextlib
import copy
import json
import math
import pickle
import shutil
import threading

import pytest
import torch
from diffusers import SanaTransformer2DModel, SD3Transformer2DModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

import dacc
from dacc.core.errors import BundleError, ConfigError, UnsupportedError
from dacc.core.manifest import AttentionRecord, read_manifest
from dacc.quant.config import QuantizeConfig
from dacc.runtime import attention
from dacc.runtime.attention import attention_modules, quantize_attention_, restore_attention_, rounded_attention


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def slow_attention(query, key, value, mask, scale, bits, softmax_bits):
    """The formula of docs/format.md in products of int64, one sample and head at a time."""
    output, most, steps = torch.empty(*query.shape[:-1], value.shape[-1]), 2 ** (bits - 1) - 1, 2**softmax_bits - 1

    def integers(values, largest):
        scale = torch.where(largest == 0, 1.0, largest / most)
        return torch.round(values / scale).long(), scale

    for sample in range(len(query)):
        for head in range(query.shape[1]):
            k_v_head = head * key.shape[1] // query.shape[1]
            q, q_scale = integers(query[sample, head], query[sample, head].abs().amax(1, keepdim=True))
            k, k_scale = integers(key[sample, k_v_head], key[sample, k_v_head].abs().amax(1, keepdim=True))
            v, v_scale = integers(value[sample, k_v_head], value[sample, k_v_head].abs().max())
            scores = (q @ k.T).float() * (q_scale * (k_scale.T * scale)) + mask[sample, head]
            shares = torch.round(torch.exp(scores - scores.amax(1, keepdim=True)) * steps).long()
            output[sample, head] = (shares @ v).float() * v_scale / shares.sum(1, keepdim=True)
    return output


@pytest.mark.parametrize(("bits", "softmax_bits"), [(8, 8), (4, 8), (5, 6)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_equals_a_product_of_integers(bits, softmax_bits, scale):
    query, key, value, mask = draw((2, 3, 9, 16), (2, 3, 11, 16), (2, 3, 11, 8), (2, 1, 9, 11))
    found = rounded_attention(query, key, value, attn_mask=mask, scale=scale, bits=bits, softmax_bits=softmax_bits)
    factor = 1 / math.sqrt(16) if scale is None else scale
    expected = slow_attention(query, key, value, mask.expand(2, 3, 9, 11), factor, bits, softmax_bits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_heads_may_share_keys_and_values():
    query, key, value = draw((2, 4, 9, 16), (2, 2, 11, 16), (2, 2, 11, 16))
    found = rounded_attention(query, key, value, enable_gqa=True, bits=8)
    expected = slow_attention(query, key, value, torch.zeros(2, 4, 9, 11), 0.25, 8, 8)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("most", [1, 2**26])
def test_masks_hide_what_they_hide_in_torch_however_it_is_cut(most, monkeypatch):
    monkeypatch.setattr(attention, "_MOST_SCORES", most)
    query, key, value = draw((2, 3, 9, 16), (2, 3, 9, 16), (2, 3, 9, 16))
    seen = torch.rand(2, 1, 1, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    seen[0] = False  # nothing at all: zeros
    for mask in ({"attn_mask": seen}, {"attn_mask": torch.where(seen[0, 0], 0.0, -9.0)}, {"is_causal": True}, {}):
        found, exact = rounded_attention(query, key, value, bits=8, **mask), F.scaled_dot_product_attention
        expected = exact(query, key, value, **mask)
        assert (found - expected).norm() < 0.02 * expected.norm()
    assert not rounded_attention(query, key, value, seen, bits=8)[0].any()


def test_fewer_bits_damage_more_and_rows_of_zeros_none():
    query, key, value = draw(*[(2, 3, 64, 32)] * 3)
    exact = F.scaled_dot_product_attention(query, key, value)
    errors = [
        float((rounded_attention(query, key, value, bits=bits) - exact).norm() / exact.norm()) for bits in (8, 6, 4)
    ]
    assert errors[0] < 0.03 < errors[1] < 0.1 < errors[2]
    assert torch.isfinite(rounded_attention(query * 0, key, value, bits=8)).all()
    assert not rounded_attention(query, key, value * 0, bits=8).any()
    assert rounded_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), bits=8).dtype == torch.bfloat16


def test_dropout_is_refused():
    with pytest.raises(UnsupportedError, match="dropout"):
        rounded_attention(*draw(*[(1, 1, 4, 4)] * 3), dropout_p=0.1, bits=8)


def self_attention():
    hidden_states = draw((2, 5, 32))[0]
    return Attention(32, heads=2, dim_head=16), lambda module: module(hidden_states)


def block():
    hidden_states, context = draw((2, 5, 32), (2, 7, 24))
    mask = torch.zeros(2, 1, 7).masked_fill(torch.arange(7) > 3, -1e4)
    made = BasicTransformerBlock(32, 2, 16, cross_attention_dim=24)
    return made, lambda module: module(hidden_states, encoder_hidden_states=context, encoder_attention_mask=mask)


def flux_attention():
    hidden_states, context = draw((2, 5, 32), (2, 7, 32))
    return FluxAttention(32, 2, 16, added_kv_proj_dim=32, context_pre_only=False), lambda module: torch.cat(
        module(hidden_states, context), 1
    )


def sd3():
    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    torch.nn.init.normal_(model.proj_out.weight)
    inputs = dict(
        zip(
            ("hidden_states", "encoder_hidden_states", "pooled_projections"),
            draw((2, 4, 8, 8), (2, 3, 16), (2, 24)),
            strict=True,
        )
    )
    return model, lambda module: module(**inputs, timestep=torch.tensor([7, 7])).sample


KINDS = [self_attention, block, flux_attention, sd3]


@pytest.fixture
def made(request):
    """A module, and what runs it."""
    torch.manual_seed(0)
    module, run = request.param()
    with torch.no_grad():
        yield torch.nn.ModuleList([module.eval()]), lambda holder: run(holder[0])


@pytest.mark.parametrize("made", KINDS, indirect=True)
def test_modules_give_other_values_and_copies_and_pickles_the_same(made):
    model, run = made
    before, keys = run(model), list(model.state_dict())
    quantize_attention_(model, 8)
    at_8 = run(model)
    assert 0 < (at_8 - before).norm() < 0.1 * before.norm()
    assert torch.equal(run(copy.deepcopy(model)), at_8)
    assert torch.equal(run(pickle.loads(pickle.dumps(model))), at_8)
    assert list(model.state_dict()) == keys
    quantize_attention_(model, 4)  # in place of the first
    assert (run(model) - before).norm() > (at_8 - before).norm()
    restore_attention_(model)
    assert torch.equal(run(model), before)
    assert all(type(module) in (Attention, FluxAttention) for module in attention_modules(model).values())


@pytest.mark.parametrize("made", KINDS, indirect=True)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_remains_after_an_exception(made, error):
    model, run = made
    quantize_attention_(model, 8)

    def fail(*_):
        raise error

    handles = [module.to_out[0].register_forward_hook(fail) for module in attention_modules(model).values()]
    with pytest.raises(error):
        run(model)
    assert _get_current_function_mode_stack() == []
    for handle in handles:
        handle.remove()
    run(model)
    assert _get_current_function_mode_stack() == []


@pytest.mark.parametrize("made", [flux_attention], indirect=True)
def test_threads_do_not_meet(made):
    model, run = made
    rounded = copy.deepcopy(model)
    quantize_attention_(rounded, 4)
    expected, found = (run(model), run(rounded)), {}

    def work(index):
        with torch.no_grad():
            found[index] = all(torch.equal(run((model, rounded)[index % 2]), expected[index % 2]) for _ in range(20))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


@pytest.mark.parametrize("made", [flux_attention], indirect=True)
def test_it_is_traced_as_a_whole(made):
    model, run = made
    quantize_attention_(model, 8)
    compiled = torch.compile(lambda: run(model), backend="eager", fullgraph=True)
    assert torch.equal(compiled(), run(model))


def test_other_arithmetic_is_refused_before_and_while_it_runs():
    module, run = self_attention()
    model = torch.nn.ModuleList([module.eval()])
    quantize_attention_(model, 8)
    module.set_processor(AttnProcessor())
    with pytest.raises(UnsupportedError, match="AttnProcessor"):
        run(module)
    with pytest.raises(UnsupportedError, match=r"of 0 \(AttnProcessor\)") as caught:
        quantize_attention_(model, 8)
    assert "--attention-bits" in caught.value.mend
    with pytest.raises(UnsupportedError, match="Linear has no attention"):
        quantize_attention_(torch.nn.Linear(2, 2), 8)


def test_linear_attention_is_refused_before_anything_is_written(sana_folder, tmp_path):
    with pytest.raises(UnsupportedError, match=r"attn1 \(SanaLinear"):
        dacc.quantize_pipeline(sana_folder, QuantizeConfig(attention_bits=8, measure="never"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with torch.device("meta"):
        model = SanaTransformer2DModel.from_config(SanaTransformer2DModel.load_config(sana_folder / "transformer"))
    with contextlib.suppress(UnsupportedError):
        quantize_attention_(model, 8)
    assert not any(isinstance(module, attention._Rounded) for module in model.modules())


def run_unet(model):
    with torch.no_grad():
        return model(draw((2, 1, 16, 16))[0], 7).sample


ASKED = {"bits": 8, "attention_bits": 8}


def test_a_bundle_rounds_in_a_fresh_load_and_after_being_saved(unet_folder, bundle_of, run_python, tmp_path):
    bundle = bundle_of(unet_folder, **ASKED)
    config = json.loads((bundle / "unet" / "config.json").read_text())["quantization_config"]
    assert config["attention"] == {"bits": 8, "softmax_bits": 8}
    manifest = read_manifest(bundle)
    assert manifest.components["unet"].quantization.attention == AttentionRecord(bits=8, softmax_bits=8)
    assert "attention products are rounded to 8 bits in simulated arithmetic" in " ".join(manifest.passes[-1].notices)
    model = UNet2DModel.from_pretrained(bundle, subfolder="unet")
    rounded = run_unet(model)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(run_unet(UNet2DModel.from_pretrained(tmp_path / "again")), rounded)
    code = (
        "import sys, dacc, torch\n"
        "model = dacc.load(sys.argv[1], device='cpu').unet\n"
        "x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))\n"
        "with torch.no_grad(): torch.save(model(x, 7).sample, sys.argv[2])\n"
    )
    run_python(code, bundle, tmp_path / "sample.pt")
    torch.testing.assert_close(torch.load(tmp_path / "sample.pt"), rounded)


def test_only_attention_differs_from_the_same_bundle_without_it(unet_folder, bundle_of):
    plain_bundle = bundle_of(unet_folder, bits=8)
    assert "attention" not in json.loads((plain_bundle / "unet" / "config.json").read_text())["quantization_config"]
    assert read_manifest(plain_bundle).components["unet"].quantization.attention is None
    plain = UNet2DModel.from_pretrained(plain_bundle, subfolder="unet")
    rounded = UNet2DModel.from_pretrained(bundle_of(unet_folder, **ASKED), subfolder="unet")
    assert 0 < (run_unet(rounded) - run_unet(plain)).norm() < 0.05 * run_unet(plain).norm()
    assert torch.equal(run_unet(rounded.dequantize()), run_unet(plain.dequantize()))


@pytest.mark.parametrize(
    "fields", [{"bits": 3, "softmax_bits": 8}, {"bits": 8}, {"bits": 8, "softmax_bits": 8, "rotation": 1}, {}, [8, 8]]
)
def test_a_config_that_this_dacc_does_not_know_is_refused(fields, unet_folder, bundle_of, tmp_path):
    folder = shutil.copytree(bundle_of(unet_folder, **ASKED) / "unet", tmp_path / "unet")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["attention"] = fields
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match="attention of this model cannot be read") as caught:
        UNet2DModel.from_pretrained(folder)
    assert "pip install -U" in caught.value.mend


@pytest.mark.parametrize("bits", [3, 9, 0, 32])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ConfigError, match="4 to 8, or 16"):
        dacc.core.config.build_config(QuantizeConfig, attention_bits=bits)
