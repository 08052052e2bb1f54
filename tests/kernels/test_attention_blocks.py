"""How the work on maps is cut: blocks of the chunked form, whole heads or blocks of keys in the Triton kernels."""

from __future__ import annotations

import pytest

from dbscale.kernels import attention_blocks
from tests.kernels.attention_cases import check, draw, reference, run, run_alone


@pytest.mark.parametrize("entries", [70, 2000], ids=["rows of an image", "images"])
def test_blocks_that_do_not_divide(device, tolerance, monkeypatch, entries) -> None:
    """The chunked form in many blocks, the last one shorter, on shapes that usually fit in one."""
    monkeypatch.setattr(attention_blocks, "ELEMENTS_PER_BLOCK", entries)
    monkeypatch.setattr(attention_blocks, "ELEMENTS_ON_DEVICE", entries)
    for tokens, width in ((19, 16), (19, 4)):  # kept for backward, and made anew
        given_ = draw(device, 5, (2, 1), tokens, (width, width))
        assert len(list(attention_blocks.blocks(given_["q"]))) > 2
        check(run(given_, backend="chunked"), reference(given_), tolerance)
        alone, expected = run_alone(given_, backend="chunked"), reference(given_, run_alone)
        check(alone, expected, tolerance)


@pytest.mark.parametrize("wants", ["both", "kl", "out"])
@pytest.mark.parametrize("tokens", [16, 70])
def test_backward_of_whole_heads(backend, device, tolerance, monkeypatch, tokens, wants) -> None:
    """What large batches take: all blocks of a head in one program, the gradient of q added up between them."""
    if backend != "triton":
        pytest.skip("only the kernels cut their work by the number of heads")
    from dbscale.kernels import attention_kl_triton

    monkeypatch.setattr(attention_kl_triton, "MANY_HEADS", 1)
    given_ = draw(device, 2, (2, 1), tokens, (24, 16))
    check(run(given_, wants=wants, backend=backend), reference(given_, wants=wants), tolerance)
