"""The nearest keys by FAISS (optional), exactly: brute force, no index that could be out of date."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_prompts.methods.shared.selection import cosine_of, normalized, top_k


def load_faiss() -> Any:
    """The module `faiss`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError('search="faiss" needs FAISS: `pip install faiss-cpu`, or set search="torch"') from error
    return faiss


@torch.no_grad()
def faiss_nearest(query: Tensor, keys: Tensor, k: int) -> Tensor:
    """Ids [B, k] of the keys [M, D] with the largest cosine to each query [B, D], best first.

    Among keys equally near, the lower number comes first; which of them are the k is FAISS's choice.
    """
    faiss = load_faiss()
    arrays = (normalized(x).float().cpu().contiguous().numpy() for x in (query, keys))
    found = torch.from_numpy(faiss.knn(*arrays, k, metric=faiss.METRIC_INNER_PRODUCT)[1])
    # FAISS answers -1 to a query that is no number; such an image has lost its loss anyway.
    ids = found.to(query.device).clamp_min(0).sort(1).values
    return ids.gather(1, top_k(cosine_of(query, keys[ids]), k))
