"""Content frame by frame, motion by an adversary that is fair, small and looks at the right axis."""

import copy
from dataclasses import replace

import pytest
import torch

from dacc.core.config import build_config
from dacc.core.reporter import silent
from dacc.prune.frames import Layout, layout_of
from dacc.prune.noise import Noise
from dacc.prune.recovery.adversary import GRADIENT_PENALTY, Heads, first_stages, heads_loss, stage_features
from dacc.prune.recovery.config import RecoveryConfig
from dacc.prune.recovery.icmd import Adversary, VideoObjective, content_loss, objective_for
from dacc.prune.recovery.levels import NoiseLevels
from dacc.prune.recovery.objective import Lesson, Objective
from dacc.prune.recovery.taps import answer
from dacc.runtime.trajectory import DenoiserCall

from .. import toys
from .conftest import state_of, toy_calls

TAPS = [(name, name) for name in ("down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1")]
LAYOUT = Layout(clips=2, frames=3, axis=2)
ORDER = [2, 0, 1]
NOISE = Noise("epsilon")


def maps(seed):
    return torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(seed))


def shuffled(feature, order=ORDER):
    return feature.view(2, 3, *feature.shape[1:])[:, order].flatten(0, 1)


def test_content_equals_a_slow_version():
    student, teacher = [(maps(0),), (maps(1),)], [(maps(2),), (maps(3),)]
    slow = []
    for (ours,), (theirs,) in zip(student, teacher, strict=True):
        for frame in range(6):
            slow.append(float((ours[frame] - theirs[frame]).norm() ** 2 / (theirs[frame].norm() ** 2 + 1e-6)))
    assert float(content_loss(student, teacher, LAYOUT)) == pytest.approx(sum(slow) / 12, rel=1e-5)


def test_content_is_zero_for_the_teacher_and_does_not_know_the_order_of_frames():
    student, teacher = maps(0), maps(1)
    assert float(content_loss([(teacher,)], [(teacher,)], LAYOUT)) == 0.0
    loss = content_loss([(student,)], [(teacher,)], LAYOUT)
    assert torch.allclose(content_loss([(shuffled(student),)], [(shuffled(teacher),)], LAYOUT), loss)
    assert not torch.allclose(content_loss([(shuffled(student),)], [(teacher,)], LAYOUT), loss)


def test_a_faint_frame_counts_as_much_as_a_strong_one():
    teacher = maps(0) * torch.tensor([100.0, 1, 1, 1, 1, 1]).view(6, 1, 1, 1)
    wrong_strong, wrong_faint = teacher.clone(), teacher.clone()
    wrong_strong[0] *= 1.5
    wrong_faint[1] *= 1.5
    losses = [float(content_loss([(each,)], [(teacher,)], LAYOUT)) for each in (wrong_strong, wrong_faint)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# the adversary


def heads(channels=(4, 6)):
    torch.manual_seed(3)
    return Heads(channels)


def stages(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, channels, 4, 4, generator=generator) for channels in (4, 6)]


def test_a_shuffle_of_frames_changes_what_temporal_heads_say_but_not_spatial_ones():
    judge, features, order = heads(), stages(), [3, 1, 4, 0, 2]
    spatial, temporal = judge(features)
    spatial_after, temporal_after = judge([feature[:, order] for feature in features])
    for before, after in zip(spatial, spatial_after, strict=True):
        assert torch.allclose(before.mean(), after.mean(), atol=1e-6)
        assert torch.allclose(before[:, order], after, atol=1e-6)
    for before, after in zip(temporal, temporal_after, strict=True):
        assert not torch.allclose(before.mean(), after.mean(), atol=1e-4)
        assert not torch.allclose(before[..., order], after, atol=1e-3)


def test_losses_of_the_heads_equal_a_slow_version():
    judge, real, fake = heads(), stages(0), stages(1)
    said = {name: [one for kind in judge(features) for one in kind] for name, features in (("r", real), ("f", fake))}
    hinge = sum((1 - one).clamp(min=0).mean().item() for one in said["r"]) / 4
    hinge += sum((1 + one).clamp(min=0).mean().item() for one in said["f"]) / 4
    real = [feature.requires_grad_() for feature in real]
    judge.verdict(real).backward()
    penalty = sum(float(feature.grad.norm() ** 2) for feature in real) / 2
    assert heads_loss(judge, real, fake).item() == pytest.approx(hinge + GRADIENT_PENALTY * penalty, rel=1e-5)


def test_heads_read_the_down_blocks_or_the_first_half_of_a_stack(motion_unet, dit_pipeline):
    assert first_stages(motion_unet()) == ["down_blocks.0", "down_blocks.1"]
    assert first_stages(dit_pipeline().transformer) == ["transformer_blocks.0"]


def test_the_rest_of_the_teacher_is_not_computed(motion_unet, clip_calls):
    teacher, call, ran = motion_unet(), clip_calls()[0], []
    teacher.up_blocks[0].register_forward_hook(lambda *_: ran.append(1))
    features = stage_features(teacher, first_stages(teacher), call, layout_of(teacher, call))
    assert [tuple(feature.shape) for feature in features] == [(2, 6, 8, 4, 4), (2, 6, 16, 4, 4)]
    assert not ran


@pytest.fixture
def scene(motion_unet, clip_calls):
    """An adversary, and what a student of one layer less answers in a call."""

    def make(number=1, update=30, **fields):
        config = build_config(RecoveryConfig, **{"steps": 100} | fields)
        teacher, calls = motion_unet(2), clip_calls()
        teacher.requires_grad_(False)
        levels = NoiseLevels((call.state for call in calls), NOISE)
        adversary = Adversary(config, teacher, calls[0], levels, NOISE, 0)
        with torch.no_grad():
            lesson = Lesson(calls[number], answer(teacher, calls[number]), update, 7)
            output = answer(motion_unet(1), calls[number]).output
        return adversary, lesson, output.requires_grad_()

    return make


@pytest.mark.parametrize("update", [30, 31])
def test_the_heads_learn_and_the_teacher_does_not(scene, update):
    adversary, lesson, output = scene(update=update)
    before = {name: value.clone() for name, value in adversary.teacher.state_dict().items()}
    start = [value.clone() for value in adversary.heads.parameters()]
    loss, told = adversary.term(output, lesson)
    loss.backward()
    assert set(told) == {"heads", "motion"}
    assert output.grad.norm() > 0
    assert all(torch.equal(value, before[name]) for name, value in adversary.teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in adversary.teacher.parameters())
    assert all(parameter.grad is None for parameter in adversary.heads.parameters())
    assert any(not torch.equal(*pair) for pair in zip(start, adversary.heads.parameters(), strict=True))


def test_every_other_update_shows_a_few_frames(scene, monkeypatch):
    from dacc.prune.recovery import icmd

    lengths, real = [], icmd.stage_features
    monkeypatch.setattr(icmd, "stage_features", lambda *args: lengths.append(args[3].frames) or real(*args))
    for update in (30, 31):
        adversary, lesson, output = scene(update=update)
        adversary.term(output, lesson)
    assert lengths == [6, 6, 6, 6, 6, 4, 4, 4]  # the first of each adversary measures channels


def test_its_gradient_is_that_of_minus_what_the_heads_say(scene):
    """By differences, through everything between the output and the heads."""
    adversary, lesson, output = scene(adversarial_learning_rate=1e-30, adversarial_weight=1e-4)
    loss, _ = adversary.term(output, lesson)
    loss.backward()
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    said = []
    with torch.no_grad():
        for step in (-0.01, 0.01):
            shifted = (output + step * direction).requires_grad_()
            with torch.enable_grad():
                _, told = adversary.term(shifted, lesson)
            said.append(told["motion"])
    assert adversary.weight == 1e-4
    slope = (said[1] - said[0]) / 0.02
    assert float((output.grad * direction).sum()) / 1e-4 == pytest.approx(slope, rel=0.05)


def test_an_overwhelming_adversary_is_halved(scene):
    adversary, lesson, _ = scene(adversarial_weight=8.0)
    nearly = (lesson.teacher.output + 1e-6).requires_grad_()
    adversary.term(nearly, lesson)
    assert adversary.weight == 4.0


def test_it_is_not_halved_because_the_output_error_has_no_weight(scene):
    told = []
    for output_weight in (1.0, 0.0):
        adversary, lesson, output = scene(output_weight=output_weight, adversarial_weight=1e-4)
        told.append((adversary.term(output, lesson)[1], adversary.weight))
    assert told[0] == told[1]
    assert told[1][1] == 1e-4


def test_it_is_silent_at_first_and_for_the_noisiest_calls(scene, monkeypatch):
    adversary, lesson, output = scene(update=4)
    assert adversary.term(output, lesson) == (0, {})
    adversary, lesson, output = scene(update=7)
    loss, told = adversary.term(output, lesson)
    assert (float(loss), set(told)) == (0, {"heads"})
    from dacc.prune.recovery import icmd

    monkeypatch.setattr(icmd, "NOISIEST", 3.0)
    adversary, lesson, output = scene(number=0)
    assert adversary.term(output, lesson) == (0, {})


# the whole


def test_who_gets_which_objective(motion_unet, clip_calls, toy):
    config, calls, teacher = build_config(RecoveryConfig, steps=10), clip_calls(), motion_unet()

    def made(noise=NOISE, **fields):
        reporter = silent()
        found = objective_for(build_config(RecoveryConfig, steps=10, **fields), teacher, calls, noise, 0, reporter)
        return found, reporter.notices

    found, notices = made()
    assert isinstance(found, VideoObjective)
    assert found.adversary
    assert not notices
    found, notices = made(None)
    assert found.adversary is None
    assert "not known what the denoiser predicts" in notices[0]
    assert made(adversarial_weight=0)[0].adversary is None
    assert type(made(icmd=False)[0]) is Objective
    assert type(objective_for(config, toy()[1], toy_calls(), NOISE, 0, silent())) is Objective


def test_clips_as_plain_tokens_have_the_losses_of_images_with_a_notice():
    toy = toys.ltx()
    call, told = DenoiserCall("transformer", state_of(0, 0, 1), (), toy.inputs()), []
    for icmd in (True, False):
        config, reporter = build_config(RecoveryConfig, steps=10, icmd=icmd), silent()
        assert type(objective_for(config, toy.build(), [call], NOISE, 0, reporter)) is Objective
        told.append(reporter.notices)
    assert "plain list of tokens" in told[0][0]
    assert not told[1]


def cut(teacher, make):
    """The first layer of every down stage; of up stages the first ones and the last."""
    student, kept = make(1), {}
    for name, value in teacher.state_dict().items():
        parts = name.split(".")
        if parts[0] in ("down_blocks", "up_blocks") and parts[2] in ("resnets", "attentions", "motion_modules"):
            last = 2 if parts[0] == "up_blocks" else None
            if int(parts[3]) == 1:
                continue
            parts[3] = "1" if int(parts[3]) == last else parts[3]
        kept[".".join(parts)] = value
    student.load_state_dict(kept, strict=True)
    return student


@pytest.mark.slow
def test_a_video_student_learns_and_an_interrupted_one_goes_on(motion_unet, clip_calls, train, stopped_before):
    teacher, calls = motion_unet(2), clip_calls(1, clips=1, frames=5)
    student = cut(teacher, motion_unet)
    other, before = copy.deepcopy(student), copy.deepcopy(teacher.state_dict())
    fields = {
        "taps": TAPS,
        "noise": NOISE,
        "steps": 4,
        "checks": 1,
        "adversarial_start": 0.25,
        "learning_rate": 2e-3,
    }
    whole = train(student, teacher, calls, name="whole", **fields)
    assert whole.error_after < whole.error_before
    assert set(whole.losses) == {"output", "feature", "heads", "motion"}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    with stopped_before(3):
        train(copy.deepcopy(other), teacher, calls, name="parts", **fields)
    assert train(other, teacher, calls, name="parts", **fields) == whole
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in student.state_dict().items())


def svd_unet():
    from diffusers import UNetSpatioTemporalConditionModel

    torch.manual_seed(0)
    return UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=8,
        num_attention_heads=2,
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12,
        layers_per_block=1,
    ).eval()


def wan_transformer():
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 16, "num_layers": 4}
    ends = {"in_channels": 6, "out_channels": 4, "text_dim": 8, "freq_dim": 8, "rope_max_seq_len": 32}
    return WanTransformer3DModel(patch_size=(1, 2, 2), cross_attn_norm=True, **sizes, **ends).eval()


def call_of(model):
    """Channels behind the first four are conditions."""
    state, words = state_of(0, 1, 3, sigma=1.0), torch.randn(1, 3, 8)
    if type(model).__name__ == "WanTransformer3DModel":
        kwargs = {"hidden_states": torch.randn(1, 6, 5, 8, 8), "timestep": torch.tensor([400])}
        return DenoiserCall("transformer", state, (), {**kwargs, "encoder_hidden_states": words, "return_dict": False})
    kwargs = {"encoder_hidden_states": words, "added_time_ids": torch.ones(1, 3), "return_dict": False}
    return DenoiserCall("unet", state, (torch.randn(1, 5, 8, 8, 8), torch.tensor(0.3)), kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "prediction"), [(svd_unet, "v_prediction"), (wan_transformer, "flow")])
def test_other_denoisers_of_videos_have_both_losses(make, prediction):
    teacher, config = make().requires_grad_(False), build_config(RecoveryConfig, steps=10)
    call, sigma = call_of(teacher), 0.5 if prediction == "flow" else 1.0
    states = [state_of(0, number, 3, sigma=value) for number, value in enumerate((0.9, 0.5, 0.1))]
    call = DenoiserCall(call.component, replace(states[1], sigma=sigma), call.args, call.kwargs)
    noise = Noise(prediction)
    adversary = Adversary(config, teacher, call, NoiseLevels(states, noise), noise, 0)
    names = [*first_stages(teacher)]
    with torch.no_grad():
        wanted = answer(teacher, call, names)
    for update in (6, 7):
        output = (wanted.output + 0.1).requires_grad_()
        loss, told = adversary.term(output, Lesson(call, wanted, update, 3))
        loss.backward()
        assert output.grad.norm() > 0
        assert set(told) == {"heads", "motion"}
    layout = layout_of(teacher, call)
    assert layout.frames == 5
    assert all(layout.by_frame(feature[0]).shape[1] == 5 for feature in wanted.features)
    assert float(content_loss(wanted.features, wanted.features, layout)) == 0.0
