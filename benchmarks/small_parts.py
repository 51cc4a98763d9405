"""The rest of a pipeline around a full-size denoiser. Schedulers are as published; autoencoders, text encoders and
tokenizers are random and as small as the shapes that meet the denoiser allow."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

PADDING, END = "<pad>", "</s>"
VOCABULARY = 258  # these two, and every byte


def dit() -> dict[str, Any]:
    return {"vae": _autoencoder(4, scale=0.18215), "scheduler": diffusers.DDIMScheduler()}


def sd15() -> dict[str, Any]:
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    return {
        "vae": _autoencoder(4, scale=0.18215),
        "text_encoder": _clip(768, project=False),
        "tokenizer": _tokenizer(77),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def sdxl() -> dict[str, Any]:
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    return {
        "vae": _autoencoder(4, scale=0.13025),
        "text_encoder": _clip(768, project=False),
        "text_encoder_2": _clip(1280, project=True),
        "tokenizer": _tokenizer(77),
        "tokenizer_2": _tokenizer(77),
        "scheduler": scheduler,
    }


def pixart() -> dict[str, Any]:
    return {
        "vae": _autoencoder(4, scale=0.13025),
        "text_encoder": _t5(),
        "tokenizer": _tokenizer(300),
        "scheduler": diffusers.DPMSolverMultistepScheduler(),
    }


def sd3() -> dict[str, Any]:
    return {
        "vae": _autoencoder(16, scale=1.5305, shift=0.0609),
        "text_encoder": _clip(768, project=True),
        "text_encoder_2": _clip(1280, project=True),
        "text_encoder_3": _t5(),
        "tokenizer": _tokenizer(77),
        "tokenizer_2": _tokenizer(77),
        "tokenizer_3": _tokenizer(512),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def flux() -> dict[str, Any]:
    return {
        "vae": _autoencoder(16, scale=0.3611, shift=0.1159),
        "text_encoder": _clip(768, project=False),
        "text_encoder_2": _t5(),
        "tokenizer": _tokenizer(77),
        "tokenizer_2": _tokenizer(512),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


def wan() -> dict[str, Any]:
    return {
        "vae": diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        "text_encoder": _t5("UMT5"),
        "tokenizer": _tokenizer(512),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


def _autoencoder(channels: int, *, scale: float, shift: float | None = None) -> diffusers.AutoencoderKL:
    """Four levels, hence 8 pixels per latent as in the published ones, whose scale and shift it has."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        norm_num_groups=2,
        scaling_factor=scale,
        shift_factor=shift,
    )


def _tokenizer(length: int) -> transformers.PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = [PADDING, END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, alphabet.index(END))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, pad_token=PADDING, eos_token=END
    )


def _clip(width: int, *, project: bool) -> transformers.PreTrainedModel:
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return (transformers.CLIPTextModelWithProjection if project else transformers.CLIPTextModel)(config)


def _t5(family: str = "T5") -> transformers.PreTrainedModel:
    """An encoder with the width of T5-XXL."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, d_model=4096, d_kv=8, d_ff=8, num_layers=1, num_heads=1, pad_token_id=0, eos_token_id=1
    )
    model: transformers.PreTrainedModel = getattr(transformers, f"{family}EncoderModel")(config)
    return model
