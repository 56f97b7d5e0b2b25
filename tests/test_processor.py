"""Laws of the kinds of device."""

import pytest

from trainer.hardware.processor import Processor, multiplies_bfloat16, processor


@pytest.mark.parametrize(
    ("cpuinfo", "multiplies"),
    [
        ("vendor_id : GenuineIntel\nflags\t\t: avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("vendor_id : GenuineIntel\nflags\t\t: avx512f avx512_bf16 avx512_fp16", False),
        ("vendor_id : AuthenticAMD\nflags\t\t: avx512f avx512_bf16", True),
        ("vendor_id : AuthenticAMD\nflags\t\t: avx2 fma", False),
        ("CPU implementer : 0x41\nFeatures : fp asimd bf16", False),
        (None, False),
    ],
)
def test_a_cpu_says_whether_it_multiplies_bfloat16(cpuinfo, multiplies, tmp_path):
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert multiplies_bfloat16(tmp_path / "cpuinfo") is multiplies


def test_a_processor_is_a_cpu_of_this_machine_or_an_accelerator():
    assert processor("CPU") == Processor("CPU", multiplies_bfloat16())
    assert (processor("GPU"), processor("TPU")) == (Processor("GPU"), Processor("TPU"))
    with pytest.raises(ValueError, match="kind='NPU' is not a kind of device; use 'CPU', 'GPU' or 'TPU'"):
        processor("NPU")
