"""What is kept of logits."""

import errno
import os

import numpy as np
import pytest
import torch

from fastkd.errors import UserError
from fastkd.kernels import topk_of
from fastkd.teacher_cache import Rows, files

LOGITS = 7 * torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def through_a_file(rows: Rows, logits: torch.Tensor, path) -> tuple[torch.Tensor, ...]:
    np.save(path, rows.pack(rows.encode(logits)), allow_pickle=False)
    return rows.unpack(np.load(path, allow_pickle=False))


@pytest.mark.parametrize("rows", [Rows(12), Rows(12, "fp32"), Rows(12, "fp16", 3, 4.0), Rows(12, "fp32", 11, 1.0)])
def test_a_step_gets_the_same_before_and_after_the_file(rows, tmp_path):
    asked, read = rows.taught(rows.encode(LOGITS)), through_a_file(rows, LOGITS, tmp_path / "rows.npy")
    assert len(asked) == len(read) and all(map(torch.equal, asked, read))


def test_fp32_keeps_every_bit_and_fp16_a_relative_error_of_half_a_thousandth(tmp_path):
    (whole,) = through_a_file(Rows(12, "fp32"), LOGITS, tmp_path / "a.npy")
    assert torch.equal(whole, LOGITS)
    (half,) = through_a_file(Rows(12), LOGITS, tmp_path / "b.npy")
    assert 0 < ((half - LOGITS) / LOGITS).abs().max() <= 5e-4


def test_top_k_keeps_classes_above_those_of_two_bytes(tmp_path):
    logits = torch.zeros(2, 70_000).index_fill(1, torch.tensor([69_999]), 5.0)
    values, classes = through_a_file(Rows(70_000, "fp32", 1, 2.0), logits, tmp_path / "rows.npy")
    assert classes.tolist() == [[69_999], [69_999]]
    torch.testing.assert_close(values, topk_of(logits, 1, 2.0)[0])


@pytest.mark.parametrize(
    "rows, size", [(Rows(100), 200), (Rows(1000, "fp32"), 4000), (Rows(1000, "fp16", 10, 1.0), 42)]
)
def test_a_row_has_the_size_that_the_help_says(rows, size):
    assert rows.dtype.itemsize == size


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 70_000.0])
def test_logits_that_the_format_cannot_hold_are_refused(bad):
    rows = Rows(12)
    with pytest.raises(UserError, match="65,504"):
        rows.pack(rows.encode(LOGITS.index_fill(1, torch.tensor([3]), bad)))


@pytest.mark.parametrize("k", [-1, 12, 13])
def test_k_is_below_the_number_of_classes(k):
    with pytest.raises(UserError, match=f"--teacher-cache-topk {k}: there are 12 classes"):
        Rows(12, "fp16", k, 4.0)


def test_a_file_without_permission_is_not_said_to_be_damaged(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(UserError, match=r"rows.npy cannot be opened: Permission denied; check its permissions$"):
        files.open_rows(tmp_path / "rows.npy", 5, np.dtype("f4"))
