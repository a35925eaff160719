"""Means of rows, and maps after which their squared lengths are leverages: what torch makes of their moments."""

from __future__ import annotations

import torch
import torch.nn.functional as F

LEAST_SHARE = 1e-12  # of the trace of a Gram matrix, added to its eigenvalues: rounding takes them below 0


def mean_and_map(
    total: torch.Tensor, moment: torch.Tensor, counts: torch.Tensor, sketch: torch.Tensor, ridge: float, lanes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means of keys, and S W [num_blocks * num_kv_heads, head_size, rank] with zeros behind it up to a
    multiple of ``lanes`` columns, an even number.

    The squared length of a centred key after this map is its leverage. See ``whiten``.
    """
    # before and not after: MKL computes a matrix otherwise that does not begin at a multiple of 16 bytes, as every
    # other one of odd size
    padded = F.pad(sketch, (0, -sketch.shape[1] % lanes))
    mean, whitening = whiten(total, moment, counts, padded, ridge)
    return mean, _multiply(padded, whitening)


def whiten(
    total: torch.Tensor, moment: torch.Tensor, counts: torch.Tensor, sketch: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means of rows and W with W W^T = (S^T C S + ridge I)^-1, C being their centred moments.

    total:   [num_blocks, num_kv_heads, 1, size] float64, sums of rows
    moment:  [num_blocks, num_kv_heads, size, size] float64, sums of their outer products
    counts:  [num_blocks] int64, how many rows
    sketch:  [size, rank] float64, S
    returns: [num_blocks, num_kv_heads, 1, size], and [num_blocks * num_kv_heads, rank, rank] float64
    """
    mean = total / counts[:, None, None, None]
    centred = mean.mT * total
    torch.sub(moment, centred, out=centred)
    gram = _multiply(sketch.mT, centred.nan_to_num_(0.0, 0.0, 0.0).flatten(0, 1))
    del centred
    gram = torch.bmm(gram, sketch.expand(len(gram), -1, -1))
    return mean, _inverse_root((gram + gram.mT).div_(2), ridge)


def _multiply(one: torch.Tensor, many: torch.Tensor) -> torch.Tensor:
    """Return [len(many), m, n], a matrix [m, k] times each of ``many`` [.., k, n].

    ``torch.matmul`` would make one product of all columns, whose bits may depend on how many there are.
    """
    return torch.bmm(one.expand(len(many), -1, -1), many)


def _inverse_root(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return W [count, rank, rank] float64 with W W^T = (G + (ridge + share) I)^-1.

    The share is one of the trace of G, by which G has an inverse even where few rows made it. So nobody has to look
    whether it could be factorised: on a GPU the host would wait for that.

    gram: [count, rank, rank] float64, symmetric, no eigenvalue below 0 but by rounding
    """
    size = gram.shape[-1]
    least = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1) * LEAST_SHARE
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
    lifted = gram + (least + ridge).clamp(min=torch.finfo(torch.float32).tiny)[..., None, None] * identity
    factor, _ = torch.linalg.cholesky_ex(lifted)
    root: torch.Tensor = torch.linalg.solve_triangular(factor, identity, upper=False).mT
    return root
