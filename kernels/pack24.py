"""The bit layout of a 2:4 sparse FP8 weight: 5 bits per weight, in two arrays.

For W [N, K], every group of four neighbours along K keeps two:

    qdata            [N, K/2] e4m3    the two kept values of each group, in order of their index
    sparse_metadata  [N, K/8] uint8   one byte for two groups; the earlier group in the low nibble;
                                      in a nibble, bits 0-1: index of the first value, bits 2-3: of the second

First index < second index always, so of the sixteen nibbles six are in use: 0x4 (0,1), 0x8 (0,2), 0xC (0,3),
0x9 (1,2), 0xD (1,3), 0xE (2,3). This is also the order of bits in NVIDIA's metadata for sparse tensor cores.
"""

import torch

# K must be a multiple of this: one byte of metadata covers two groups of four.
FORMAT_K = 8
PATTERNS = (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)


def pack24(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack e4m3 `values` [N, K] where the bool `mask` [N, K] keeps exactly two of every four.

    Returns (qdata [N, K/2], sparse_metadata [N, K/8]), both contiguous. Raises ValueError where K is not a multiple
    of 8 or the mask is not 2:4.
    """
    rows, cols = values.shape
    if cols % FORMAT_K:
        raise ValueError(f"K = {cols} is not a multiple of {FORMAT_K}, which the 2:4 format needs")
    if mask.shape != values.shape:
        raise ValueError(f"mask is {tuple(mask.shape)}, the weight {tuple(values.shape)}")
    kept = mask.view(rows, cols // 4, 4)
    if not bool((kept.sum(-1) == 2).all()):
        raise ValueError("the mask does not keep exactly two of every four neighbours along K")
    k0, k1, k2, k3 = kept.unbind(-1)
    # Exactly two are kept, so the first and the last one tell the pattern without a search.
    first = torch.where(k0, 0, torch.where(k1, 1, 2))
    second = torch.where(k3, 3, torch.where(k2, 2, 1))
    index = torch.stack((first, second), -1)
    # gather knows no FP8, and moving bytes keeps every bit
    qdata = values.view(torch.uint8).view(rows, cols // 4, 4).gather(-1, index).view(rows, cols // 2)
    # elementwise results keep the strides of a transposed mask; kernels read rows
    nibble = (first | second << 2).to(torch.uint8).contiguous()
    return qdata.view(values.dtype), nibble[:, 0::2] | nibble[:, 1::2] << 4


def unpack_indices(sparse_metadata: torch.Tensor) -> torch.Tensor:
    """Index inside its group of every kept value: [N, K/8] uint8 -> [N, K/4, 2] int64."""
    nibbles = torch.stack((sparse_metadata & 0xF, sparse_metadata >> 4), -1).flatten(-2)
    return torch.stack((nibbles & 3, nibbles >> 2), -1).long()


def unpack24(qdata: torch.Tensor, sparse_metadata: torch.Tensor) -> torch.Tensor:
    """The dense e4m3 [N, K] of a packed weight, +0.0 where pruned: the exact inverse of `pack24`."""
    rows, half = qdata.shape
    index = unpack_indices(sparse_metadata)
    dense = torch.zeros((rows, half // 2, 4), dtype=torch.uint8, device=qdata.device)
    dense = dense.scatter(-1, index, qdata.view(torch.uint8).view(rows, half // 2, 2))
    return dense.view(rows, half * 2).view(qdata.dtype)
