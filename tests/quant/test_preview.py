import pytest

from dacc import QuantizeConfig
from dacc.core.errors import ConfigError
from dacc.core.manifest import read_manifest
from dacc.core.reporter import silent
from dacc.core.tensor_file import stored_tensors, tensor_bytes
from dacc.quant.preview import preview_quantization


@pytest.mark.parametrize(("kind", "name"), [("unet_folder", "unet"), ("dit_folder", "transformer")])
@pytest.mark.parametrize("fields", [{"bits": 4}, {"bits": 3}, {"bits": 8, "act_bits": 8}, {"bits": 4, "act_bits": 8}])
def test_a_preview_says_what_then_happens(kind, name, fields, request, bundle_of, tmp_path):
    source = request.getfixturevalue(kind)
    preview = preview_quantization(source, QuantizeConfig(**fields), reporter=silent()).components[name]
    assert list(tmp_path.iterdir()) == []
    bundle = bundle_of(source, **fields)
    record = read_manifest(bundle).components[name]
    assert preview.bytes_after == sum(map(tensor_bytes, stored_tensors(bundle / name).values()))
    assert preview.parameters == record.parameters
    assert preview.bytes_fp32 == record.bytes_fp32
    modules = record.quantization.modules.values()
    assert preview.schemes == {
        scheme: sum(module.scheme == scheme for module in modules) for scheme in record.quantization.schemes
    }
    assert sum(preview.skipped.values()) == sum(module.reason is not None for module in modules)


def test_a_preview_refuses_what_the_pass_would_refuse(unet_folder):
    with pytest.raises(ConfigError, match="does not divide"):
        preview_quantization(unet_folder, QuantizeConfig(group_size=50), reporter=silent())
