"""The two products of attention, q k^T and softmax v, on rounded values: what integer attention would do to images.

The integers are held in floating point, where their products and sums are exact (up to 2^24), so this is the arithmetic
of an integer product, simulated: it shows the damage and is slower than float attention. With B bits and
S = 2^softmax_bits - 1, for each sample and head:

    q, k     one scale per token, symmetric:        codes = round(x / scale), scale = max |x| / (2^(B-1) - 1)
    v        one scale, symmetric
    softmax  against the largest of the row:        codes = round(exp(score - max) * S), in 0..S

The output is divided by the sum of a row's codes, so that attention spread over thousands of tokens keeps its weight.

An attention module gets a subclass of its own class whose `forward` runs under a mode of torch that takes the place of
`scaled_dot_product_attention`, so every processor and every backend of diffusers that ends there is covered, copies,
pickles and `save_pretrained` work as before, and nothing outlives the call. Modes are known to one thread only.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..core.errors import UnsupportedError

SOFTMAX_BITS = 8  # as in the papers; its values need the bits more than the others do
_MOST_SCORES = 2**26  # held at once: 256 MB in float32
_PRODUCTS = {"scaled_dot_product_attention", "dispatch_attention_fn"}
_FLOAT_ATTENTION = "Leave --attention-bits out."


def rounded_attention(
    query: Tensor,  # (..., heads, L, E)
    key: Tensor,  # (..., heads, S, E)
    value: Tensor,  # (..., heads, S, Ev)
    attn_mask: Tensor | None = None,  # broadcasts to (..., heads, L, S)
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    bits: int,
    softmax_bits: int = SOFTMAX_BITS,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with both products on rounded values.

    Raises:
        UnsupportedError: dropout is asked for.
    """
    if dropout_p:
        raise UnsupportedError("rounded attention has no dropout.", mend="Call .eval() on the model first.")
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
    length, tokens = query.shape[-2], key.shape[-2]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    query_codes, query_scale = _round(query, bits, (-1,))  # scale (..., L, 1)
    key_codes, key_scale = _round(key, bits, (-1,))
    value_codes, value_scale = _round(value, bits, (-2, -1))  # scale (..., 1, 1)
    key_factor = key_scale.mT * scale  # (..., 1, S)
    masks = [] if attn_mask is None else [attn_mask.expand(*attn_mask.shape[:-2], length, tokens)]
    if is_causal:
        masks.append(torch.ones(length, tokens, dtype=torch.bool, device=query.device).tril())
    largest, parts = 2**softmax_bits - 1, []
    most = max(1, _MOST_SCORES // max(1, query_codes[..., :1, 0].numel() * tokens))
    for start in range(0, max(1, length), most):
        rows = slice(start, start + most)
        scores = query_codes[..., rows, :] @ key_codes.mT * (query_scale[..., rows, :] * key_factor)
        codes = (_shares(scores, [mask[..., rows, :] for mask in masks]) * largest).round()
        parts.append(codes @ value_codes * (value_scale / codes.sum(-1, keepdim=True).clamp(min=1)))
    return torch.cat(parts, dim=-2).to(query.dtype)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, for the modules of a diffusers model that hold an attention processor.

    Raises:
        UnsupportedError: there are none, or one computes attention in another way than the one that is replaced here.
    """
    found = {name: module for name, module in model.named_modules() if getattr(module, "processor", None) is not None}
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} has no attention of diffusers' kind to round.", mend=_FLOAT_ATTENTION
        )
    for name, module in found.items():
        processor: Any = module.processor
        if not _PRODUCTS & set(_names_in(type(processor).__call__)):
            raise _not_covered(name, processor)
    return found


def quantize_attention_(model: nn.Module, bits: int, softmax_bits: int = SOFTMAX_BITS) -> None:
    """Round both products of every attention module of a diffusers model.

    Args:
        bits: of q, k and v; fewer: worse image.
        softmax_bits: of what weights the values.

    Raises:
        UnsupportedError: see `attention_modules`; nothing is changed then.
    """
    module: Any
    for module in attention_modules(model).values():
        if not isinstance(module, _Rounded):
            module.__class__ = _rounded_class(type(module))  # type: ignore[arg-type]  # mypy doubts its hash
        module._dacc_attention_bits = (bits, softmax_bits)


def restore_attention_(model: nn.Module) -> None:
    """Float attention again; harmless where it is so already."""
    module: Any
    for module in model.modules():
        if isinstance(module, _Rounded):
            module.__class__ = module._dacc_base  # type: ignore[assignment]  # also an _Rounded
            del module._dacc_attention_bits


class _Rounded:
    """Marks the classes of rounded attention modules."""

    _dacc_base: type[nn.Module]
    _dacc_attention_bits: tuple[int, int]


@functools.cache
def _rounded_class(base: type[Any]) -> type[Any]:
    """A subclass of an attention class, of the same name, whose `forward` rounds."""

    float_forward: Callable[..., Any] = base.forward

    @functools.wraps(float_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode = _RoundedAttention(*self._dacc_attention_bits)
        with mode:
            result = float_forward(self, *args, **kwargs)
        if not mode.used:
            raise _not_covered(type(self).__name__, self.processor)
        return result

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return _bare, (base,), vars(self)

    members = {"forward": forward, "__reduce__": __reduce__, "_dacc_base": base}
    names = {"__module__": base.__module__, "__doc__": base.__doc__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base, _Rounded), members | names)


def _bare(base: type[Any]) -> Any:
    """An empty rounded module, filled by copy or pickle."""
    return object.__new__(_rounded_class(base))  # type: ignore[arg-type]  # mypy doubts its hash


class _RoundedAttention(TorchFunctionMode):
    """In effect while one attention module runs."""

    def __init__(self, bits: int, softmax_bits: int) -> None:
        super().__init__()
        self.bits, self.softmax_bits, self.used = bits, softmax_bits, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.unflatten:  # the method calls super(), which compiled code cannot follow from here
            func = torch.unflatten
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.used = True
        return rounded_attention(*args, **(kwargs or {}), bits=self.bits, softmax_bits=self.softmax_bits)


def _round(values: Tensor, bits: int, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Signed integers in float32 and their scale, one for all that `over` spans."""
    values = values.float()
    scale = values.abs().amax(over, keepdim=True) / (2 ** (bits - 1) - 1)
    scale = scale.where(scale != 0, 1.0)
    return (values / scale).round(), scale


def _shares(scores: Tensor, masks: list[Tensor]) -> Tensor:
    """exp(score) against the largest of its row, in 0..1; a row that sees nothing gives zeros, as torch's softmax."""
    for mask in masks:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    highest = scores.amax(-1, keepdim=True)
    return (scores - highest.masked_fill(highest == -math.inf, 0.0)).exp()


def _names_in(function: Callable[..., Any], depth: int = 1) -> Iterator[str]:
    """The names that a function uses, with those of the functions beside it that it calls."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    for name in code.co_names if code else ():
        yield name
        beside = getattr(function, "__globals__", {}).get(name)
        if depth and inspect.isfunction(beside):
            yield from _names_in(beside, depth - 1)


def _not_covered(name: str, processor: Any) -> UnsupportedError:
    return UnsupportedError(
        f"the attention of {name} ({type(processor).__name__}) cannot be rounded.",
        "It does not go through torch's scaled_dot_product_attention, whose two products are replaced.",
        f"{_FLOAT_ATTENTION} In Python another processor may do: AttnProcessor2_0, or the backend 'native'.",
    )
