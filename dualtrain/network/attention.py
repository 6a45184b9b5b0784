"""Attention inside documents, of three kinds, on three backends, behind one interface.

:func:`plan_attention` is called once per micro-batch, on the host, with the batch's document ids
still on the CPU. Whatever has to be decided or built from them happens there, outside any compiled
region and without waiting for the device; all layers share the resulting :class:`AttentionPlan`.
Shapes inside a plan depend on the shape of the batch, not on its contents, but for the number of
documents, which is dynamic: so a compiled block keeps one graph per kind.

Query q sees key k of the same document if
    causal   k <= q
    full     always
    prefix   k <= q, or k is in the prefix of the document

Shapes: B rows, T positions, H heads of size D.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dualtrain.network.arithmetic import AttentionKind

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Backend = Literal["sdpa", "varlen", "flex"]

# Edge of FlexAttention's square blocks.
_FLEX_BLOCK = 128
HALF_TYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """How the positions of one micro-batch attend to each other.

    Attributes:
        kind: causal, full or prefix.
        backend: The one in use, which may differ from the one asked for (prefix attention).
    """

    kind: AttentionKind
    backend: Backend

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend, with (B, T, H, D) rotated queries and keys and values; returns the same shape."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class SdpaPlan(AttentionPlan):
    """torch's scaled_dot_product_attention.

    Attributes:
        mask: (B, 1, T, T), 0 where the key is seen and -inf elsewhere; None where every row is one
            document and the kind needs no mask of its own.
    """

    mask: Tensor | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=None if self.mask is None else self.mask.to(query.dtype),
            is_causal=self.mask is None and self.kind == "causal",
        )
        return output.transpose(1, 2)


@dataclass(frozen=True, eq=False)
class VarlenPlan(AttentionPlan):
    """Flash attention over the documents of all rows laid end to end (CUDA, half precision).

    In torch 2.15 that is cuDNN's on Hopper. Versions such as 2.11 have cuDNN's kernels, too, but
    their backward pass over documents writes beyond its workspace (pytorch pull request 186142).

    Attributes:
        offsets: (N + 1,) int32, where each of the N documents begins, and B*T. None is empty: a
            document without tokens costs blocks of threads in each kernel, and cuDNN before 9.25
            cannot compute it.
        varlen_attn: torch's, told whether it is causal.
    """

    offsets: Tensor
    varlen_attn: Callable[..., Tensor]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = query.shape[1]
        output = self.varlen_attn(
            query.flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            self.offsets,
            self.offsets,
            # The longest document there could be, rather than the longest there is: a constant.
            length,
            length,
        )
        return output.view(query.shape)


@dataclass(frozen=True, eq=False)
class FlexPlan(AttentionPlan):
    """FlexAttention, compiled on CUDA; on a CPU it runs forward only, for tests.

    Attributes:
        blocks: Which blocks of the attention matrix are empty, full, or decided by the mask.
        flex_attention: torch's, which takes a second to import.
    """

    blocks: BlockMask
    flex_attention: Callable[..., Tensor]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        compiled_here = query.is_cuda and not torch.compiler.is_compiling()
        output = (_compiled_flex() if compiled_here else self.flex_attention)(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            block_mask=self.blocks,
        )
        return output.transpose(1, 2)


def plan_attention(
    kind: AttentionKind,
    document_ids: Tensor,
    *,
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    in_prefix: Tensor | None = None,
) -> AttentionPlan:
    """Prepare attention for one micro-batch.

    Args:
        document_ids: (B, T) integers on the CPU, never decreasing within a row: positions with
            equal ids are one document.
        backend: From ``backends.resolve_backend``. varlen cannot express prefix attention, nor
            compute in float32; such a plan uses sdpa instead.
        dtype: Compute type of the attention (bfloat16 also under autocast).
        in_prefix: (B, T) bool on the CPU, tokens that all of their document see; for the prefix
            kind only.

    Raises:
        ValueError: Document ids that decrease or are not on the CPU; ``in_prefix`` missing, or
            given for another kind; an unknown kind or backend.
    """
    if kind not in ("causal", "full", "prefix"):
        raise ValueError(f"unknown kind of attention {kind!r}")
    if document_ids.device.type != "cpu":
        raise ValueError("document_ids must be on the CPU: the plan is made without the device")
    if (in_prefix is None) == (kind == "prefix"):
        raise ValueError("in_prefix belongs to prefix attention, and to no other kind")
    documents = document_ids.numpy()
    if (documents[:, 1:] < documents[:, :-1]).any():
        raise ValueError("document_ids decrease within a row")
    device = torch.device(device)
    prefixes = None if in_prefix is None else in_prefix.numpy()
    if backend == "varlen" and kind != "prefix" and dtype in HALF_TYPES:
        offsets = to_device(torch.from_numpy(_document_offsets(documents)), device)
        # One graph for any number of documents.
        torch._dynamo.maybe_mark_dynamic(offsets, 0)
        function = find_varlen_attn()
        assert function is not None  # resolve_backend has seen to it
        return VarlenPlan(kind, "varlen", offsets, _told(function, kind))
    if backend == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        blocks = _block_mask(kind, documents, prefixes, device)
        return FlexPlan(kind, "flex", blocks, flex_attention)
    if backend in ("sdpa", "varlen"):
        return SdpaPlan(kind, "sdpa", _dense_mask(kind, documents, prefixes, device, dtype))
    raise ValueError(f"unknown attention backend {backend!r}")


def plan_rows(input_ids: Tensor) -> AttentionPlan:
    """Plan causal attention for (B, T) input ids of which each row is one document."""
    one_document = torch.zeros(input_ids.shape, dtype=torch.int32, device="cpu")
    return plan_attention("causal", one_document, backend="sdpa", device=input_ids.device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor to the device without waiting for the device."""
    if device.type == "cuda":
        # From pageable memory the copy may wait for everything queued before it.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _dense_mask(
    kind: AttentionKind,
    documents: np.ndarray,
    prefixes: np.ndarray | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor | None:
    """Build the (B, 1, T, T) additive mask, unless the kernel's own causal flag does."""
    if prefixes is None and (documents[:, 0] == documents[:, -1]).all():
        return None
    ids = to_device(torch.from_numpy(documents), device)
    seen = ids[:, :, None] == ids[:, None, :]
    if kind != "full":
        position = torch.arange(documents.shape[1], device=device)
        allowed = position[None, None, :] <= position[None, :, None]
        if prefixes is not None:
            allowed = allowed | to_device(torch.from_numpy(prefixes), device)[:, None, :]
        seen = seen & allowed
    # Additive and in the compute type, so that no layer has to convert it again.
    mask = torch.full(seen.shape, -torch.inf, device=device, dtype=dtype)
    return mask.masked_fill_(seen, 0.0)[:, None]


def _document_offsets(documents: np.ndarray) -> np.ndarray:
    """Return where documents begin in the flattened batch, and its end: (N + 1,) int32."""
    begins = np.ones_like(documents, dtype=bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return np.append(np.flatnonzero(begins), documents.size).astype(np.int32)


@cache
def find_varlen_attn() -> Callable[..., Tensor] | None:
    """torch's, from 2.10 on; importing it takes a second. None where there is none."""
    with suppress(ImportError):
        # By name, because its signature is another in each version.
        return import_module("torch.nn.attention.varlen").varlen_attn
    return None


@cache  # one object for good, or compiled blocks would be compiled again
def _told(function: Callable[..., Tensor], kind: AttentionKind) -> Callable[..., Tensor]:
    """``varlen_attn``, causal or full: torch 2.10 has a flag for it, later ones a window."""
    if "window_size" in inspect.signature(function).parameters:
        return partial(function, window_size=(-1, 0) if kind == "causal" else (-1, -1))
    return partial(function, is_causal=kind == "causal")


@cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _block_mask(
    kind: AttentionKind,
    documents: np.ndarray,
    prefixes: np.ndarray | None,
    device: torch.device,
) -> BlockMask:
    """Build FlexAttention's mask from the block level up.

    ``create_block_mask`` would evaluate all (B, T, T) pairs on the device; as documents are
    contiguous, the ids at the ends of each block decide, on the host.
    """
    from torch.nn.attention.flex_attention import BlockMask

    visible, full = _visible_blocks(kind, documents, prefixes)
    lists = [*_ordered(visible & ~full), *_ordered(full)]
    ids = to_device(torch.from_numpy(np.ascontiguousarray(documents)), device)
    prefix = None if prefixes is None else to_device(torch.from_numpy(prefixes), device)

    # Closures, because create_mask and the kernels reject bound methods.
    def full_mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ids[b, q] == ids[b, k]

    def causal_mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (ids[b, q] == ids[b, k]) & (k <= q)

    def prefix_mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert prefix is not None
        return (ids[b, q] == ids[b, k]) & ((k <= q) | prefix[b, k])

    masks = {"full": full_mask, "causal": causal_mask, "prefix": prefix_mask}
    length = documents.shape[1]
    # Made on the host: it derives the lists of queries from those of keys, for which some versions
    # of torch wait for the device.
    mask = BlockMask.from_kv_blocks(
        *(torch.from_numpy(array) for array in lists),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=masks[kind],
        seq_lengths=(length, length),
    )
    for name, value in vars(mask).items():
        if isinstance(value, Tensor):
            setattr(mask, name, to_device(value, device))
    return mask


def _visible_blocks(
    kind: AttentionKind, documents: np.ndarray, prefixes: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Say which blocks have a visible pair, and which have no other: two (B, n, n) bool arrays."""
    length = documents.shape[1]
    begin = np.arange(0, length, _FLEX_BLOCK)
    end = np.minimum(begin + _FLEX_BLOCK, length)
    first, last = documents[:, begin], documents[:, end - 1]
    # Ids never decrease, so two blocks share a document exactly if their ranges of ids meet.
    visible = (first[:, None, :] <= last[:, :, None]) & (last[:, None, :] >= first[:, :, None])
    # A block cut short by the end of the row is never full: its kernel must look at the bounds.
    single = (first == last) & (end - begin == _FLEX_BLOCK)
    full = visible & single[:, None, :] & single[:, :, None]
    if kind == "full":
        return visible, full
    index = np.arange(len(begin))
    some = np.broadcast_to(index[None, None, :] <= index[None, :, None], visible.shape)
    all_ = np.broadcast_to(index[None, None, :] < index[None, :, None], visible.shape)
    if prefixes is not None:
        # With an earlier block, a block can have only its first document in common.
        of_first = prefixes & (documents == np.repeat(first, end - begin, axis=1))
        some = some | np.logical_or.reduceat(of_first, begin, axis=1)[:, None, :]
        all_ = all_ | np.logical_and.reduceat(prefixes, begin, axis=1)[:, None, :]
        # On the diagonal every query is behind the first key, or is there, too.
        behind = prefixes.copy()
        behind[:, begin] = True
        diagonal = np.logical_and.reduceat(behind, begin, axis=1)[:, None, :]
        all_ = all_ | diagonal & np.eye(len(begin), dtype=bool)
    return visible & some, full & all_


def _ordered(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """List the chosen blocks of each row of blocks: counts (B, 1, n), indices (B, 1, n, n)."""
    count = blocks.sum(-1, dtype=np.int32)
    index = np.argsort(~blocks, axis=-1, kind="stable").astype(np.int32)
    return count[:, None], index[:, None]
