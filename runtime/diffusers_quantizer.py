"""dacc as a quantization method of diffusers: after `import dacc`, plain `from_pretrained` loads our bundles.

The model's config.json names the schemes and which layer has which. Before the weights arrive, these layers are swapped
on the meta device, so that the keys of the file fit; each stored tensor is then put in place untouched by dtype casts.
A tensor that is missing or left over is an error: a layer with invented weights would give garbage in silence.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from ..core.config import build_config
from ..core.errors import BundleError, ConfigError
from ..core.manifest import FORMAT, AttentionRecord, StepRecord
from ..core.scheme import Scheme
from .attention import quantize_attention_, restore_attention_
from .layers import LAYER_CLASSES, swap_layers_
from .passthrough import bypass_
from .quantized_layer import STORED_NAMES, QuantizedLayer
from .skeleton import passed_over
from .step_table import StepTable, unhook_step_tables_

DAMAGED_OR_NEWER = "Copy the bundle again, or upgrade: pip install -U dacc-diffusion."


class DaccMethod(str, Enum):
    """diffusers reads `.value` of the method's name."""

    DACC = "dacc"


class DaccQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json.

    Args:
        schemes: scheme name -> fields of `Scheme`.
        modules: layer name -> scheme name; layers not named here are ordinary ones.
        format: format number of the bundle.
        steps: fields of `StepRecord`, for schemes with per-step scales.
        attention: fields of `AttentionRecord`, where the products of attention are rounded.
        identity_modules: modules that the class builds and that pass on what enters them, where blocks were removed.
    """

    def __init__(
        self,
        schemes: dict[str, dict[str, Any]] | None = None,
        modules: dict[str, str] | None = None,
        format: int = FORMAT,
        steps: dict[str, Any] | None = None,
        attention: dict[str, Any] | None = None,
        identity_modules: list[str] | None = None,
        **unknown: Any,
    ) -> None:
        if format > FORMAT or unknown:
            raise BundleError(
                f"this model has dacc format {format}"
                + (f" with unknown fields {sorted(unknown)}." if unknown else "."),
                f"This dacc reads up to format {FORMAT}.",
                "Upgrade: pip install -U dacc-diffusion.",
            )
        self.quant_method = DaccMethod.DACC  # type: ignore[assignment]  # the enum of diffusers is closed
        self.schemes, self.modules, self.format, self.steps = schemes or {}, modules or {}, format, steps
        self.attention, self.identity_modules = attention, identity_modules or []

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**{key: value for key, value in config_dict.items() if key != "quant_method"})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method.value,
            "format": self.format,
            "schemes": self.schemes,
            "modules": self.modules,
            **({} if self.steps is None else {"steps": self.steps}),
            **({} if self.attention is None else {"attention": self.attention}),
            **({"identity_modules": self.identity_modules} if self.identity_modules else {}),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """What diffusers prints; there are no defaults to leave out."""
        return self.to_dict()

    def layer_schemes(self) -> dict[str, Scheme]:
        """Layer name -> its scheme.

        Raises:
            BundleError: a scheme is not listed, or has fields or values that this dacc does not know.
        """
        try:
            schemes = {name: build_config(Scheme, **fields) for name, fields in self.schemes.items()}
            return {layer: schemes[name] for layer, name in self.modules.items()}
        except ConfigError as error:
            raise BundleError(f"a scheme of this model cannot be read: {error.what}", mend=DAMAGED_OR_NEWER) from None
        except KeyError as error:
            raise BundleError(f"the config of this model lists no scheme {error}.", mend=DAMAGED_OR_NEWER) from None

    def attention_record(self) -> AttentionRecord | None:
        """How the products of attention are rounded; None where they are not.

        Raises:
            BundleError: there are fields or values that this dacc does not know.
        """
        try:
            return None if self.attention is None else build_config(AttentionRecord, **self.attention)
        except (ConfigError, TypeError) as error:
            what = error.what if isinstance(error, ConfigError) else str(error)
            raise BundleError(f"the attention of this model cannot be read: {what}", mend=DAMAGED_OR_NEWER) from None

    def step_table(self) -> StepTable | None:
        """The table that chooses among per-step scales; None when no layer has them.

        Raises:
            BundleError: the grid is missing, unreadable, or not as long as the tables.
        """
        lengths = {scheme.act_steps for scheme in self.layer_schemes().values() if scheme.act_steps}
        if not lengths:
            return None
        try:
            record = build_config(StepRecord, **(self.steps or {}))
        except ConfigError as error:
            raise BundleError(
                f"the grid of the per-step scales of this model cannot be read: {error.what}", mend=DAMAGED_OR_NEWER
            ) from None
        if lengths != {len(record.schedule.timesteps)}:
            raise BundleError(
                f"this model has per-step scales for {sorted(lengths)} calls and a grid of "
                f"{len(record.schedule.timesteps)}.",
                mend=DAMAGED_OR_NEWER,
            )
        return StepTable(record.schedule, record.rule)


class DaccQuantizer(DiffusersQuantizer):
    """Loads pre-quantized models; quantizing while loading is what `dacc quantize` is for."""

    quantization_config: DaccQuantizationConfig
    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: DaccQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._loaded: set[str] = set()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise BundleError(
                "a dacc quantization config was given for a float model.",
                mend="Run `dacc quantize` on the pipeline, then load the folder that it makes.",
            )

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._loaded = set(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        schemes = self.quantization_config.layer_schemes()
        self._bypass_(model)
        known = {name for name, layer in model.named_modules() if type(layer) in LAYER_CLASSES}
        if strange := sorted(set(schemes) - known):
            raise BundleError(
                f"the config quantizes layers that {type(model).__name__} does not have: {_some(strange)}.",
                mend=DAMAGED_OR_NEWER,
            )
        try:
            swap_layers_(model, schemes, steps=self.quantization_config.step_table())
        except ConfigError as error:
            raise BundleError(f"a scheme of this model does not fit: {error.what}", mend=DAMAGED_OR_NEWER) from None
        if attention := self.quantization_config.attention_record():
            quantize_attention_(model, attention.bits, attention.softmax_bits)
        model.register_to_config(quantization_config=self.quantization_config)  # type: ignore[operator]
        expected = set(model.state_dict())
        missing, surplus = sorted(expected - self._loaded), self._loaded - expected
        extra = sorted(surplus - passed_over(model, surplus))
        if missing or extra:
            parts = [f"missing {_some(missing)}" if missing else "", f"left over {_some(extra)}" if extra else ""]
            raise BundleError(
                f"the weight files do not fit the config: {'; '.join(filter(None, parts))}.",
                mend="The bundle is damaged; copy it again or run `dacc verify` on it.",
            )

    def _bypass_(self, model: nn.Module) -> None:
        """Take away the modules whose weights the file does not have."""
        names = self.quantization_config.identity_modules
        if strange := sorted(set(names) - {name for name, _ in model.named_modules()}):
            raise BundleError(
                f"the config names identity modules that {type(model).__name__} does not have: {_some(strange)}.",
                mend=DAMAGED_OR_NEWER,
            )
        bypass_(model, names)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        parent, _, leaf = param_name.rpartition(".")
        return leaf in STORED_NAMES and isinstance(model.get_submodule(parent), QuantizedLayer)

    def check_quantized_param_shape(self, param_name: str, current_param: Any, loaded_param: Any) -> bool:
        expected, found = tuple(getattr(current_param, "shape", current_param)), tuple(loaded_param.shape)
        if expected != found:
            raise BundleError(
                f"{param_name} has shape {found}; its scheme needs {expected}.",
                mend="The bundle is damaged; copy it again or run `dacc verify` on it.",
            )
        return True

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        parent, _, leaf = param_name.rpartition(".")
        layer = model.get_submodule(parent)
        assert isinstance(layer, QuantizedLayer)
        # the loader has cast param_value to the compute dtype; the file's own tensor is still in state_dict
        layer.store(leaf, state_dict[param_name].to(target_device).contiguous())
        if kwargs.get("dtype") is not None:
            layer.compute_dtype = kwargs["dtype"]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for layer in model.modules():
            if isinstance(layer, QuantizedLayer) and layer.act_scale is not None:
                layer.row_sums()  # now, so that compiled code finds them
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        for name in self.quantization_config.modules:
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantizedLayer)
            model.set_submodule(name, _float_layer(layer))
        unhook_step_tables_(model)
        restore_attention_(model)
        config: Any = model.config
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        if names := self.quantization_config.identity_modules:  # no plain model has them
            plain["quantization_config"] = DaccQuantizationConfig(identity_modules=names)
        vars(model)["_internal_dict"] = FrozenDict(plain)  # so that it is saved as what it is now
        return model


def register() -> None:
    """Make diffusers know the method `dacc`; harmless when repeated."""
    AUTO_QUANTIZER_MAPPING["dacc"] = DaccQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING["dacc"] = DaccQuantizationConfig


def _float_layer(layer: QuantizedLayer) -> nn.Module:
    """The ordinary layer with the dequantized weight."""
    kind: Any = next(
        base for base in type(layer).__mro__ if base.__module__.startswith("torch.nn.modules") and base is not nn.Module
    )
    plain = kind.__new__(kind)
    nn.Module.__init__(plain)
    own = set(layer.__dict__) - set(plain.__dict__)
    plain.__dict__.update({key: layer.__dict__[key] for key in own})
    plain.register_parameter("weight", nn.Parameter(layer.weight, requires_grad=False))
    if "bias" in layer._parameters:
        plain.register_parameter("bias", layer._parameters["bias"])
    return plain


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
