"""What the shapes pipelines share: the autoencoder, the text encoders, and the latents and embeddings made once.

The text encoders learn first, alone, to say what the drawing of a caption shows; the denoisers then see their states
as fixed tables, which costs nothing per step.

Letters: N captions or drawings, T = 16 tokens, D = 128 text width, L = 4 latent channels.
"""

from __future__ import annotations

import copy
import json
import string
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from autoencoder import Latents, autoencoder_loss, encode, standardize_
from diffusers import AutoencoderKL, ModelMixin
from shapes import (
    HEADS,
    IMAGE_SIZE,
    all_scenes,
    answers_loss,
    captions_of,
    draw,
    read_answers,
    split_scenes,
)
from torch import Tensor, nn
from trainer import TrainConfig, replace_folder, train
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

TEXT_LENGTH = 16  # the longest caption has 14 tokens with both ends
TEXT_WIDTH = 128
LATENT_CHANNELS = 4
ANSWERS = sum(map(len, HEADS.values()))
CALIBRATION_PROMPTS = 128
COPIES = 32  # drawings of every scene that are encoded once, before a denoiser is trained
CAPTION_DROP = 0.1  # share of the captions that are left empty, for guidance
Look = Callable[
    [Sequence[str]], tuple[Tensor, Tensor]
]  # captions -> what a denoiser gets: states (N, T, D), pooled (N, D)


def make_autoencoder() -> AutoencoderKL:
    """32x32 RGB to 8x8x4."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,  # `standardize_` scales the latents themselves
        shift_factor=0.0,
        mid_block_add_attention=False,
    )


def train_autoencoder(shared: dict[str, Any]) -> AutoencoderKL:
    """The autoencoder alone, on drawings that are made as they are needed; `shared`: fields of TrainConfig."""
    seen = split_scenes().seen
    config = TrainConfig(name="shapes-vae", steps=1500, batch_size=64, learning_rate=1.5e-3, bf16=True, **shared)

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(seen), (config.batch_size,), generator=generator)
        return autoencoder_loss(model, draw(seen[index], generator), generator)

    torch.manual_seed(config.seed)
    autoencoder = train(make_autoencoder(), loss_of, config, lambda model: None)
    assert isinstance(autoencoder, AutoencoderKL)
    standardize_(autoencoder, draw(seen, torch.Generator().manual_seed(config.seed)))
    return autoencoder


def encode_drawings(autoencoder: AutoencoderKL, seed: int) -> tuple[Latents, Tensor]:
    """Latents of COPIES drawings of every seen scene, and for each of them the row of `split_scenes().seen`."""
    seen = split_scenes().seen
    generator = torch.Generator().manual_seed(seed)
    made = [encode(autoencoder, draw(seen, generator)) for _ in range(COPIES)]
    latents = Latents(torch.cat([one.means for one in made]), torch.cat([one.deviations for one in made]))
    return latents, torch.arange(len(seen)).repeat(COPIES)


def make_clip_tokenizer(words: Collection[str], length: int) -> CLIPTokenizer:
    """Byte pairs that grow every word of the captions, letter by letter, into one token; other words fall apart."""
    ends = ("<|startoftext|>", "<|endoftext|>")
    letters = string.ascii_lowercase + string.digits + string.punctuation
    merges = []
    for word in sorted(words, key=lambda word: (-len(word), word)):  # "ri" of right must not split triangle
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        merges += [("".join(pieces[:count]), pieces[count]) for count in range(1, len(pieces))]
    merges = list(dict.fromkeys(merges))
    tokens = dict.fromkeys([*ends, *letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def make_t5_tokenizer() -> T5TokenizerFast:
    """Whole words, and letters for all others."""
    special = ["<pad>", "</s>", "<unk>"]
    letters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    words = [f"▁{word}" for word in sorted(caption_words())]
    scores = [
        *((token, 0.0) for token in special),
        *((word, -1.0) for word in words),
        *((one, -9.0) for one in letters),
    ]
    return T5TokenizerFast(vocab=scores, extra_ids=0, model_max_length=TEXT_LENGTH)


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> Tensor:
    """(N, T) token numbers, padded as the pipelines do it."""
    found = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = found.input_ids
    return ids


def make_clip(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=32,
            num_heads=4,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


class Understanding(nn.Module):
    """A text encoder with one linear layer on top that says what the picture shows, head by head.

    The layer reads the state that the encoder's pipeline uses to sum a caption up: for CLIP the last token's, for T5
    the mean of the words.
    """

    def __init__(self, encoder: CLIPTextModel | T5EncoderModel, answers: int, pad: int | None):
        super().__init__()
        self.encoder = encoder
        self.pad = pad  # None: the encoder pools itself
        self.answers = nn.Linear(encoder.config.hidden_size, answers)

    def forward(self, ids: Tensor) -> Tensor:
        """(N, T) tokens -> (N, sum of answers) logits, the heads one after the other."""
        output = self.encoder(ids)
        if self.pad is None:
            pooled = output.pooler_output
        else:
            words = (ids != self.pad)[..., None].float()  # (N, T, 1)
            pooled = (output.last_hidden_state * words).sum(1) / words.sum(1)
        logits: Tensor = self.answers(pooled)
        return logits


def train_clip(shared: dict[str, Any]) -> tuple[CLIPTextModel, CLIPTokenizer]:
    tokenizer = make_clip_tokenizer(caption_words(), TEXT_LENGTH)
    torch.manual_seed(shared["seed"])
    understanding = Understanding(make_clip(tokenizer, TEXT_WIDTH), ANSWERS, pad=None)
    config = TrainConfig(name="shapes-clip", steps=1500, batch_size=64, learning_rate=1e-3, **shared)
    return _teach(understanding, tokenizer, config), tokenizer


def train_t5(shared: dict[str, Any]) -> tuple[T5EncoderModel, T5TokenizerFast]:
    tokenizer = make_t5_tokenizer()
    torch.manual_seed(shared["seed"])
    understanding = Understanding(make_t5(tokenizer), ANSWERS, pad=tokenizer.pad_token_id)
    config = TrainConfig(name="shapes-t5", steps=4000, batch_size=64, learning_rate=1e-3, **shared)
    return _teach(understanding, tokenizer, config), tokenizer


def _teach(understanding: Understanding, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> Any:
    """Teach an encoder the captions of the seen scenes; returns the encoder alone."""
    split = split_scenes()
    ids = torch.stack([tokenize(tokenizer, captions_of(scene)) for scene in split.seen])  # (M, 2, T)

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(ids), (config.batch_size,), generator=generator)
        named = torch.randint(2, (config.batch_size,), generator=generator)
        return answers_loss(model(ids[index, named].to(config.device)), split.seen[index])

    taught = train(understanding, loss_of, config, lambda model: None).cpu()
    with torch.no_grad():
        logits = taught(torch.cat([tokenize(tokenizer, captions_of(scene)) for scene in split.held_out]))
    right = (read_answers(logits) == split.held_out.repeat_interleave(2, dim=0)).all(dim=1).float().mean()
    print(f"{config.name}: understands {right:.1%} of the captions of held-out scenes", file=sys.stderr)
    return taught.encoder


def look_clip(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """States of every token (N, T, D), and the pooled ones (N, D)."""
    output = encoder(tokenize(tokenizer, captions))
    return output.last_hidden_state, output.pooler_output


def look_t5(encoder: T5EncoderModel, tokenizer: T5TokenizerFast, captions: Sequence[str]) -> Tensor:
    """States of every token (N, T, D)."""
    states: Tensor = encoder(tokenize(tokenizer, captions)).last_hidden_state
    return states


@dataclass(frozen=True)
class CaptionTable:
    """What the text encoders make of the two captions of every scene, and of the empty caption."""

    states: Tensor  # (M, 2, T, D)
    pooled: Tensor  # (M, 2, D)
    empty_states: Tensor  # (T, D)
    empty_pooled: Tensor  # (D,)

    def draw(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """States and pooled states of one caption per row, some of them left empty."""
        named = torch.randint(2, rows.shape, generator=generator)
        dropped = torch.rand(rows.shape, generator=generator) < CAPTION_DROP
        states = torch.where(dropped[:, None, None], self.empty_states, self.states[rows, named])
        return states, torch.where(dropped[:, None], self.empty_pooled, self.pooled[rows, named])


@torch.no_grad()
def tabulate(look: Look, captions: Sequence[Sequence[str]]) -> CaptionTable:
    """The table of the two captions of each of M scenes."""
    states, pooled = look([caption for both in captions for caption in both])
    empty_states, empty_pooled = look([""])
    shape = (len(captions), 2)
    return CaptionTable(states.unflatten(0, shape), pooled.unflatten(0, shape), empty_states[0], empty_pooled[0])


def seen_captions() -> list[Sequence[str]]:
    """The two captions of every scene that the trainings see."""
    return [captions_of(scene) for scene in split_scenes().seen]


def save_pipeline(
    pipeline_class: type, folder: Path, models: dict[str, nn.Module], prompts: dict[str, list[str]], **others: Any
) -> None:
    """Write float16 copies of the models with the other components and the prompts, as plain diffusers reads it.

    Text encoders stay float32: transformers loads a model in the type of its file, diffusers in float32, and a pipeline
    that was told no type must not end up with both.
    """
    copies = {name: copy.deepcopy(model).cpu().eval() for name, model in models.items()}
    for model in copies.values():
        model.to(torch.float16 if isinstance(model, ModelMixin) else torch.float32)
    pipeline = pipeline_class(**copies, **others)

    def write(fresh: Path) -> None:
        pipeline.save_pretrained(fresh)
        (fresh / "prompts.json").write_text(json.dumps(prompts, indent=2) + "\n")

    replace_folder(folder, write)


def make_prompts() -> dict[str, list[str]]:
    """Captions to calibrate with, of seen scenes, and to evaluate with, of held-out ones; each scene named once."""
    split = split_scenes()

    def take(scenes: Tensor) -> list[str]:
        return [captions_of(scene)[number % 2] for number, scene in enumerate(scenes)]

    return {"calibration": take(split.seen[:CALIBRATION_PROMPTS]), "evaluation": take(split.held_out)}


def caption_words() -> set[str]:
    return {word for scene in all_scenes() for caption in captions_of(scene) for word in caption.split()}
