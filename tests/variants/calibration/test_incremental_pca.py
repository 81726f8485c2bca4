"""Incremental PCA: PEFT's numbers, and the components of all the rows at once where nothing is cut off."""

import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA as PeftPCA
from torch import Tensor

from minilora.variants.calibration.incremental_pca import IncrementalPCA


def batches(n: int = 5, rows: int = 40, features: int = 24) -> list[Tensor]:
    """Rows of unequal variance about a mean that drifts from batch to batch."""
    random = torch.Generator().manual_seed(0)
    scale = 0.8 ** torch.arange(features)
    return [torch.randn(rows + i, features, generator=random) * scale + 0.1 * i for i in range(n)]


@pytest.mark.parametrize("k", [1, 6, 24])
def test_every_batch_gives_the_numbers_of_peft(k: int) -> None:
    ours, theirs = IncrementalPCA(k), PeftPCA(n_components=k, lowrank=True, lowrank_seed=42)
    for X in batches():
        ours.update(X.clone())
        theirs.partial_fit(X.clone())
        # one float32 rounding of a mean, seen through up to 24 components of falling size
        torch.testing.assert_close(
            ours.singular_values, theirs.singular_values_.to(ours.singular_values.dtype), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(ours.components.float(), theirs.components_.float(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            ours.explained.float(), theirs.explained_variance_ratio_.float(), rtol=1e-5, atol=1e-6
        )


def test_with_all_components_it_is_the_pca_of_all_rows() -> None:
    pca = IncrementalPCA(24)
    for X in batches():
        pca.update(X)
    rows = torch.cat(batches()).double()
    rows -= rows.mean(0)
    _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(pca.singular_values, S, rtol=1e-5, atol=1e-5)  # the first batch is taken in float32
    torch.testing.assert_close(
        (pca.components.double() @ Vh.T).abs().diag(), torch.ones(24).double(), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(pca.explained.sum().item(), 1.0, rtol=1e-6, atol=0)
    assert pca.n == len(rows)
