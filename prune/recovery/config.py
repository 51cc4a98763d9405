"""How a pruned denoiser is trained back; the fields of `--set` that every method of `dacc prune` shares."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...core.config import Config

Trained = Literal["full", "lora", "difffit"]
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["float32", "bf16"]


class RecoveryConfig(Config):
    """What is trained, for how long, and against what."""

    steps: int = Field(0, ge=0)  # updates of the weights; more: nearer to the whole network, longer; 0: no recovery
    trainable: Trained = "full"  # all weights; lora: low-rank updates, less memory; difffit: biases, norms, scales
    rank: int = Field(32, ge=1)  # of the low-rank updates; larger: more can change, more memory
    alpha: float | None = Field(
        None, gt=0
    )  # the updates count alpha / rank; None: the rank; larger: they change faster
    learning_rate: float | None = Field(
        None, gt=0
    )  # of AdamW; larger: faster, may diverge; None: by the network's size
    schedule: Schedule = "cosine"  # of the rate, down to 0 at the last step; constant: for runs that may stop anywhere
    weight_decay: float = Field(0.0, ge=0)  # pulls weights to 0; larger: less overfitting to a small calibration set
    batch: int = Field(1, ge=1)  # denoiser calls of the set that one update looks at; more: steadier, slower
    clip: float = Field(1.0, ge=0)  # largest norm of all gradients together; smaller: calmer; 0: any
    ema: float = Field(0.999, ge=0, lt=1)  # of the weights that are judged and kept; larger: smoother, later; 0: none
    output_weight: float = Field(1.0, ge=0)  # of the error of what the denoiser gives
    feature_weight: float = Field(1.0, ge=0)  # of the error inside, where student and teacher agree in shape
    task_weight: float = Field(0.1, ge=0)  # of the error against the noise in your own pictures; 0: none
    mask_std: float = Field(2.0, ge=0)  # tokens' features so far from their mean are left out; 0: none are
    icmd: bool = True  # video: features frame by frame, and an adversary that looks at frames and at motion
    adversarial_weight: float = Field(0.1, ge=0)  # of that adversary; larger: sharper motion, less stable; 0: none
    adversarial_start: float = Field(0.1, ge=0, le=1)  # share of the steps before the adversary is heard
    adversarial_learning_rate: float = Field(1e-4, gt=0)  # of the adversary's heads; larger: a stronger adversary
    checks: int = Field(20, ge=1)  # times that calls not trained on judge; more: a better choice, slower
    patience: int = Field(5, ge=0)  # checks in a row without gain after which training stops; 0: never
    precision: Precision = "float32"  # bf16: products in 16 bits, faster and less memory on GPUs that have them
    gradient_checkpointing: bool = False  # compute inner values twice instead of keeping them; less memory, slower
    cache_gb: float = Field(1.0, ge=0)  # memory for what the teacher answers, kept in 16 bits; 0: asked anew each time
