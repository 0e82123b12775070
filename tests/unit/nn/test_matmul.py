"""Float32 matrix products by oneDNN: exact, and only inside the block."""

import pytest
import torch

from tsmoe.nn import matmul
from tsmoe.nn.matmul import exact_onednn_matmul, is_onednn_exact


@pytest.fixture(autouse=True)
def _tried_anew() -> None:
    is_onednn_exact.cache_clear()


def test_products_keep_the_precision_of_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(300, 200, generator=generator)
    right = torch.randn(200, 100, generator=generator)
    with exact_onednn_matmul():
        product = left @ right
    exact = (left.double() @ right.double()).float()
    # Float32 sums of 200 terms; bfloat16 would be off by 1e-2.
    torch.testing.assert_close(product, exact, rtol=1e-4, atol=1e-4)


def test_setting_is_back_after_the_block_and_after_an_error() -> None:
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    with exact_onednn_matmul():
        if is_onednn_exact():
            assert setting.fp32_precision == "bf16"
    assert setting.fp32_precision == before
    with pytest.raises(KeyError), exact_onednn_matmul():
        raise KeyError
    assert setting.fp32_precision == before


def test_nothing_changes_where_products_would_be_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    monkeypatch.setattr(matmul, "_relative_error", lambda *_: 2e-3)
    with exact_onednn_matmul():
        assert setting.fp32_precision == before


def test_one_size_that_is_rounded_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_relative_error", lambda rows, *_: 2e-3 if rows == 512 else 1e-7)
    assert not is_onednn_exact()


def test_decorated_function_multiplies_in_the_block() -> None:
    setting = torch.backends.mkldnn.matmul

    @exact_onednn_matmul()
    def inside() -> str:
        return setting.fp32_precision

    before = setting.fp32_precision
    expected = "bf16" if is_onednn_exact() else before
    assert [inside(), inside()] == [expected, expected]
    assert setting.fp32_precision == before


def test_nothing_changes_for_another_device() -> None:
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    with exact_onednn_matmul(torch.device("cuda")):
        assert setting.fp32_precision == before
        # FlexAttention asks for it on CUDA; inside the block on the processor it raises.
        assert torch.get_float32_matmul_precision() == "highest"


def test_autocast_of_the_caller_does_not_decide() -> None:
    expected = is_onednn_exact()
    is_onednn_exact.cache_clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_onednn_exact() == expected
