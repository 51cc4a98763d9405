import pytest
import torch
from torch import nn
from torch.nn import functional

from dacc.quant.grams import Grams, has_grams, input_rows
from dacc.runtime.weight import to_rows

LAYERS = {
    "linear": (lambda: nn.Linear(12, 5), (3, 7, 12)),
    "linear on a matrix": (lambda: nn.Linear(12, 5, bias=False), (9, 12)),
    "linear on maps": (lambda: nn.Linear(12, 5), (2, 3, 4, 12)),
    "1x1": (lambda: nn.Conv2d(4, 5, 1), (2, 4, 6, 5)),
    "3x3": (lambda: nn.Conv2d(4, 5, 3, padding=1), (2, 4, 6, 5)),
    "stride": (lambda: nn.Conv2d(4, 5, 3, stride=2, padding=(2, 1)), (2, 4, 7, 5)),
    "dilation": (lambda: nn.Conv2d(4, 5, (3, 2), dilation=(2, 1)), (2, 4, 7, 5)),
    "same": (lambda: nn.Conv2d(4, 5, (3, 5), padding="same"), (2, 4, 6, 5)),
    "valid": (lambda: nn.Conv2d(4, 5, 3, padding="valid", stride=(1, 2)), (2, 4, 6, 5)),
    "circular": (lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"), (2, 4, 6, 5)),
    "reflect": (lambda: nn.Conv2d(4, 5, 3, padding=(2, 1), padding_mode="reflect", stride=2), (2, 4, 6, 5)),
}
EACH = pytest.mark.parametrize("kind", LAYERS)


def make(kind):
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    return build().requires_grad_(False), torch.randn(shape)


def slow_rows(layer, x):
    """What meets the weight rows at each place of the result, place by place: channels innermost."""
    if isinstance(layer, nn.Linear):
        return torch.stack(list(x.reshape(-1, layer.in_features)))
    mode = {"zeros": "constant"}.get(layer.padding_mode, layer.padding_mode)
    x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    (high, wide), (down, right), (row_step, column_step) = layer.kernel_size, layer.dilation, layer.stride
    rows = []
    for image in x:
        for i in range(0, image.shape[1] - down * (high - 1), row_step):
            for j in range(0, image.shape[2] - right * (wide - 1), column_step):
                taps = [image[:, i + a * down, j + b * right] for a in range(high) for b in range(wide)]
                rows.append(torch.cat(taps))
    return torch.stack(rows)


def gram_of(layer, *inputs, rows_per_call=10**6):
    with Grams({"layer": layer}, rows_per_call=rows_per_call) as grams:
        for x in inputs:
            layer(x)
    return grams.mean("layer")


@EACH
def test_weight_rows_times_input_rows_give_the_output_of_the_layer(kind):
    layer, x = make(kind)
    output = (
        layer(x) if layer.bias is None else layer(x) - layer.bias.view(-1, *[1] * (isinstance(layer, nn.Conv2d) * 2))
    )
    expected = output.movedim(1, -1) if isinstance(layer, nn.Conv2d) else output
    for rows in (input_rows(layer, x), slow_rows(layer, x)):
        torch.testing.assert_close((rows @ to_rows(layer.weight).T).view(expected.shape), expected)


@EACH
def test_grams_are_the_mean_of_outer_products_over_all_calls(kind):
    layer, x = make(kind)
    inputs = [x, 3 * x.flip(0), x[:1]]
    rows = [row.double() for each in inputs for row in slow_rows(layer, each)]
    expected = sum(torch.outer(row, row) for row in rows) / len(rows)
    found = gram_of(layer, *inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, found.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_summed_in_single(dtype):
    layer, x = make("linear")
    found = gram_of(layer.to(dtype), 300 * x.to(dtype))
    torch.testing.assert_close(found, gram_of(layer.float(), (300 * x.to(dtype)).float()))


@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_at_most_so_many_rows_count_in_one_call(kind):
    layer, x = make(kind)
    rows = slow_rows(layer, x).double()
    for limit in (1, 5, len(rows) - 1, len(rows)):
        with Grams({"layer": layer}, rows_per_call=limit) as grams:
            layer(x)
            layer(x)
        assert grams._counts["layer"] == 2 * limit
    torch.testing.assert_close(grams.mean("layer").double(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-5)


def test_the_rows_that_count_lie_in_every_column_of_an_image():
    width, layer = 16, nn.Linear(16, 1)
    x = torch.eye(width).repeat(width, 1).unsqueeze(0)  # token i is pixel i of a 16 x 16 image, and names its column
    found = gram_of(layer, x, rows_per_call=4 * width).diagonal()
    assert (found > 0).all()


def test_other_rows_count_in_each_call():
    layer, x = nn.Linear(64, 1), torch.eye(64)  # token i names itself
    assert (gram_of(layer, x, x, x, rows_per_call=16).diagonal() > 0).sum() > 24


def test_the_same_rows_count_whenever_it_is_run():
    layer, x = make("3x3")
    assert torch.equal(gram_of(layer, x, rows_per_call=7), gram_of(layer, x, rows_per_call=7))


def test_each_layer_has_its_own_grams_and_none_when_it_did_not_run():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4), "later": nn.Linear(4, 4)})
    x = torch.randn(3, 4)
    with Grams(dict(model.items()), rows_per_call=10) as grams, torch.no_grad():
        model["later"](model["used"](x))
    torch.testing.assert_close(grams.mean("used"), x.T @ x / 3)
    assert not torch.equal(grams.mean("later"), grams.mean("used"))
    assert grams.mean("idle") is None


def test_hooks_are_removed_also_after_an_error():
    layer, x = make("3x3")

    def fail():
        with Grams({"layer": layer}, rows_per_call=10):
            layer(x)
            raise KeyboardInterrupt

    gram_of(layer, x)
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not layer._forward_pre_hooks


def test_the_output_of_a_watched_layer_is_untouched():
    layer, x = make("circular")
    before = x.clone()
    expected = layer(x)
    with Grams({"layer": layer}, rows_per_call=3):
        assert torch.equal(layer(x), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(4, 4), True),
        (nn.Conv2d(4, 4, 3), True),
        (nn.Conv2d(4, 4, 3, groups=2), False),
        (nn.Conv1d(4, 4, 3), False),
        (nn.Conv3d(4, 4, 3), False),
        (nn.Embedding(4, 4), False),
    ],
    ids=repr,
)
def test_only_plain_products_have_grams(layer, expected):
    assert has_grams(layer) == expected
