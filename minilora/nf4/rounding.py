"""Rounding to NF4 that changes a layer's output least, instead of each weight to its nearest value.

The absmax are given; the 4-bit codes are chosen. With X the inputs of the layer and H = Σ x xᵀ their second moments,
the error E = Q − W costs ‖X Eᵀ‖² = tr(E H Eᵀ). A language model's inputs are near a few directions, so that the errors
of many weights can cancel.

1. GPTQ: round the weights of one input after the other, and let those not yet rounded compensate for the error:

       q_j = nearest(w_j)       e = (w_j − q_j) / U_jj       w_k ← w_k − e U_jk  for k > j       UᵀU = H⁻¹

   the inputs with the largest H_jj first (Frantar et al. 2022, arXiv 2210.17323, algorithm 1).

2. Coordinate descent: round each again, given the errors of all others; the cost never rises:

       q_j = nearest(w_j − Σ_{k≠j} e_k H_kj / H_jj)          (Behdin et al. 2023, arXiv 2309.01885, section 3)
"""

from dataclasses import replace

import torch
from torch import Tensor

from minilora.devices import device_for_float64
from minilora.nf4.codec import TINY, QuantizedTensor, code, dequantize_absmax, encode, midpoints

DAMPING = 0.01  # of H's mean diagonal, added to it: GPTQ's value
COLUMNS = 64  # inputs rounded before their errors reach the rest in one product
SWEEPS = 3  # of coordinate descent; on SmolLM2-135M ten lower the cost by less than another 1%


def round_to_nf4(W: Tensor, grid: QuantizedTensor, H: Tensor) -> QuantizedTensor:
    """W (out, in) in NF4 with the block size and absmax of `grid`, the codes chosen for inputs of second moments H.

    W: float32; H: (in, in) float32, of any scale, positive semidefinite and not zero.
    """
    order = H.diagonal().argsort(descending=True)
    H = damped(H)[order][:, order]
    # A row for each input, in that order, so that a step works on contiguous memory.
    w, c = W.T[order].contiguous(), absmax_of_weights(grid).T[order].contiguous()
    q = descend(gptq(w, c, H), w, c, H)
    scaled = torch.empty_like(q)
    scaled[order] = q / c
    flat = scaled.T.reshape(-1)
    return replace(grid, codes=encode(torch.cat([flat, flat.new_zeros(flat.numel() % 2)])))


def damped(H: Tensor) -> Tensor:
    """H̃ = H + 0.01·mean(diag H)·I, so that directions without calibration inputs count too."""
    return H + DAMPING * H.diagonal().mean() * torch.eye(len(H), device=H.device)


def absmax_of_weights(grid: QuantizedTensor) -> Tensor:
    """The absmax of each weight's block, float32, in the weights' shape; never zero, so that it can divide."""
    n = grid.shape[0] * grid.shape[1]
    absmax = dequantize_absmax(grid).repeat_interleave(grid.block_size)[:n].view(grid.shape)
    return torch.where(absmax.abs() < TINY, TINY, absmax)


def nearest(w: Tensor, c: Tensor) -> Tensor:
    """The nearest of NF4's 16 values times c, c as w."""
    return code(w.device)[torch.bucketize(w / c, midpoints(code(w.device)))] * c


def gptq(w: Tensor, c: Tensor, H: Tensor) -> Tensor:
    """w (in, out) rounded to c times NF4's values, input after input; H (in, in) invertible."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H.to(device_for_float64(H.device)).double()))
    U = torch.linalg.cholesky(inverse, upper=True).float().to(H.device)
    w, q = w.clone(), torch.empty_like(w)
    for start in range(0, len(w), COLUMNS):
        stop = min(start + COLUMNS, len(w))
        e = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            q[j] = nearest(w[j], c[j])
            e[j - start] = (w[j] - q[j]) / U[j, j]
            w[j + 1 : stop] -= U[j, j + 1 : stop, None] * e[j - start]
        w[stop:] -= U[start:stop, stop:].T @ e
    return q


def descend(q: Tensor, w: Tensor, c: Tensor, H: Tensor) -> Tensor:
    """q (in, out), a rounding of w, after sweeps that give each input in turn the best value beside the rest."""
    e = q - w
    for _ in range(SWEEPS):
        for start in range(0, len(w), COLUMNS):
            inside = H[start : start + COLUMNS, start : start + COLUMNS]
            He = H[start : start + COLUMNS] @ e
            for i in range(len(inside)):
                j = start + i
                others = He[i] - H[j, j] * e[j]
                change = nearest(w[j] - others / H[j, j], c[j]) - w[j] - e[j]
                e[j] += change
                He += inside[:, i, None] * change
    return w + e
