"""Tests of: dualtrain.network.attention, backends.

Attention plans: every backend against a dense softmax written from the definition.
"""

from itertools import groupby

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from dualtrain.common.errors import UserError
from dualtrain.network import attention, backends
from dualtrain.network.attention import plan_attention
from dualtrain.network.backends import disagreement, resolve_backend, varlen_fault

KINDS = ("causal", "full", "prefix")
LENGTH = 200  # two of flex's blocks, the second cut short
PREFIXES = torch.zeros(3, LENGTH, dtype=torch.bool)
PREFIXES[1, :90] = PREFIXES[2, :130] = PREFIXES[2, 140:150] = True
BOUNDARIES = {
    "one document": ([], [], []),
    "some documents": ([40, 120], [128], []),
    "many documents": ([7, 9, 10, 60, 128, 129, 199], list(range(3, 200, 5)), [100]),
}
GPU = pytest.mark.gpu
FP32, BF16 = torch.float32, torch.bfloat16
BACKENDS = [
    ("sdpa", "cpu", FP32),
    ("sdpa", "cpu", BF16),
    ("flex", "cpu", FP32),
    pytest.param("sdpa", "cuda", BF16, marks=GPU),
    pytest.param("varlen", "cuda", BF16, marks=GPU),
    pytest.param("flex", "cuda", BF16, marks=GPU),
    pytest.param("flex", "cuda", FP32, marks=GPU),
]


def documents(layout: str) -> torch.Tensor:
    ids = torch.zeros(3, LENGTH, dtype=torch.int32)
    for row, boundaries in enumerate(BOUNDARIES[layout]):
        for boundary in boundaries:
            ids[row, boundary:] += 1
    return ids


def visible(kind: str, ids: torch.Tensor, prefixes: torch.Tensor | None) -> torch.Tensor:
    """(B, T, T) bool, pair by pair from the definition."""
    rows, length = ids.shape
    seen = torch.zeros(rows, length, length, dtype=torch.bool)
    for b, row in enumerate(ids.tolist()):
        for q in range(length):
            for k in range(length):
                allowed = kind == "full" or k <= q or (kind == "prefix" and prefixes[b, k])
                seen[b, q, k] = allowed and row[q] == row[k]
    return seen


def dense_attention(query, key, value, seen):
    """(B, T, H, D) float64, by the formula."""
    query, key, value = (x.double().transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("layout", BOUNDARIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "device", "dtype"), BACKENDS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_backends_agree_with_the_definition(backend, device, dtype, kind, layout, request):
    if device == "cuda":
        request.getfixturevalue("compiler")
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(3, 3, LENGTH, 2, 16, generator=generator).to(dtype)
    upstream = torch.randn(3, LENGTH, 2, 16, generator=generator)
    ids, prefixes = documents(layout), PREFIXES if kind == "prefix" else None
    plan = plan_attention(
        kind, ids, backend=backend, device=device, dtype=dtype, in_prefix=prefixes
    )
    differentiable = backend != "flex" or device == "cuda"
    given_ = [x.to(device).requires_grad_(differentiable) for x in inputs]
    output = plan.attend(*given_)
    exact_inputs = [x.double().requires_grad_() for x in inputs]
    exact = dense_attention(*exact_inputs, visible(kind, ids, prefixes))
    # bf16 has 8 bits; TF32 is not in use, but flex on CUDA may sum in another order.
    tolerance = 3e-2 if dtype is BF16 else 2e-3 if device == "cuda" else 1e-5
    torch.testing.assert_close(output.cpu().double(), exact, rtol=tolerance, atol=tolerance)
    assert output.dtype == dtype and output.shape == inputs[0].shape
    if differentiable:
        output.backward(upstream.to(device, dtype))
        exact.backward(upstream.to(dtype).double())
        for mine, theirs in zip(given_, exact_inputs, strict=True):
            torch.testing.assert_close(
                mine.grad.cpu().double(), theirs.grad, rtol=2 * tolerance, atol=2 * tolerance
            )


def fake_varlen(with_window: bool, calls: list):
    """What torch's varlen_attn computes, in both of its signatures, in plain torch."""

    def compute(query, key, value, offsets, key_offsets, longest, causal):
        calls.append(offsets)
        assert torch.equal(offsets, key_offsets) and offsets.dtype == torch.int32
        assert (offsets.diff() > 0).all() and offsets.diff().max() <= longest
        output = torch.full_like(value, torch.nan)
        for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            piece = (x[None, begin:end] for x in (query, key, value))
            ids = torch.zeros(1, end - begin)
            seen = visible("causal" if causal else "full", ids, None)
            output[begin:end] = dense_attention(*piece, seen)[0].to(value.dtype)
        return output

    if with_window:
        return lambda q, k, v, oq, ok, mq, mk, *, window_size=(-1, -1): compute(
            q, k, v, oq, ok, mq, {(-1, 0): True, (-1, -1): False}[window_size]
        )
    return lambda q, k, v, oq, ok, mq, mk, is_causal=False: compute(q, k, v, oq, ok, mq, is_causal)


@pytest.mark.parametrize("with_window", [True, False])
@pytest.mark.parametrize("kind", ["causal", "full"])
def test_varlen_is_told_where_documents_begin(monkeypatch, kind, with_window):
    calls = []
    monkeypatch.setattr(attention, "find_varlen_attn", lambda: fake_varlen(with_window, calls))
    ids = documents("many documents")[:, 90:]
    plan = plan_attention(kind, ids, backend="varlen", device="cpu", dtype=BF16)
    inputs = torch.randn(3, 3, LENGTH - 90, 2, 16).to(BF16)
    exact = dense_attention(*inputs, visible(kind, ids, None))
    torch.testing.assert_close(plan.attend(*inputs).double(), exact, rtol=3e-2, atol=3e-2)
    assert len(calls) == 1


@pytest.mark.parametrize("layout", BOUNDARIES)
def test_varlen_has_no_empty_documents(layout):
    ids = documents(layout).numpy()
    offsets = attention._document_offsets(ids)
    assert offsets.dtype == np.int32 and offsets[-1] == ids.size
    expected = [sum(1 for _ in run) for row in ids.tolist() for _, run in groupby(row)]
    assert np.diff(offsets).tolist() == expected
    one_each = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert attention._document_offsets(one_each).tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(attention.find_varlen_attn() is None, reason="torch 2.10 and newer")
@pytest.mark.parametrize("kind", ["causal", "full"])
def test_varlen_has_one_graph_for_any_number_of_documents(compiler, kind):
    """Traced with torch's own operator, which runs on CUDA only; its output is made up."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return lambda *given_: [next(x for x in given_ if x.ndim == 4)]

    attend = torch.compile(lambda plan, x: plan.attend(x, x, x), backend=backend, dynamic=False)
    inputs = torch.randn(3, LENGTH, 2, 16).to(BF16)
    for layout in ("some documents", *BOUNDARIES):
        plan = plan_attention(kind, documents(layout), backend="varlen", device="cpu", dtype=BF16)
        attend(plan, inputs)
    assert len(graphs) == 1


class OnDevice(TorchDispatchMode):
    """Names the operators that take or give tensors of the meta device, which stands for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, output) if isinstance(x, torch.Tensor)]
        if any(tensor.is_meta for tensor in tensors):
            self.names.add(func.overloadpacket.__name__)
        return output


@pytest.mark.parametrize(
    ("backend", "kind"), [("varlen", "full"), *(("flex", kind) for kind in KINDS)]
)
def test_the_device_has_nothing_to_do_for_a_plan_but_to_receive_it(backend, kind):
    prefixes = PREFIXES if kind == "prefix" else None
    with OnDevice() as seen:
        plan = plan_attention(
            kind,
            documents("some documents"),
            backend=backend,
            device="meta",
            dtype=BF16,
            in_prefix=prefixes,
        )
    assert seen.names == {"_to_copy"}
    if plan.backend == "flex":
        tensors = [x for x in vars(plan.blocks).values() if isinstance(x, torch.Tensor)]
        assert len(tensors) >= 8 and all(tensor.is_meta for tensor in tensors)


def packed_sdpa(query, key, value, offsets, _keys, _longest, _longest_key, *, window_size):
    """What varlen_attn gives, a document at a time."""
    pieces = [
        F.scaled_dot_product_attention(
            *(x[begin:end].transpose(0, 1) for x in (query, key, value)),
            is_causal=window_size == (-1, 0),
        ).transpose(0, 1)
        for begin, end in zip(offsets[:-1], offsets[1:], strict=True)
    ]
    return torch.cat(pieces)


def one_document(query, key, value, offsets, *rest, window_size):
    return packed_sdpa(query, key, value, offsets[[0, -1]], *rest, window_size=window_size)


def never_causal(*given_, window_size):
    return packed_sdpa(*given_, window_size=(-1, -1))


def no_number_in_short_ones(query, key, value, offsets, *rest, window_size):
    output = packed_sdpa(query, key, value, offsets, *rest, window_size=window_size)
    lengths = offsets.diff().long()
    return torch.where(lengths.repeat_interleave(lengths)[:, None, None] == 1, torch.nan, output)


def right_output_wrong_gradient(query, key, value, *rest, window_size):
    return packed_sdpa(query, key.detach(), value, *rest, window_size=window_size) + 0 * key


def fails(*_, window_size):
    raise RuntimeError("no kernel image is available\nfor execution on the device")


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Make backends believe in a GPU of which the CPU does the work."""
    monkeypatch.setattr(backends, "_obstacle", lambda name, device, dtype: "")
    varlen_fault.cache_clear()
    yield
    varlen_fault.cache_clear()


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (packed_sdpa, ""),
        (one_document, "is off by"),
        (never_causal, "is off by"),
        (no_number_in_short_ones, "is off by inf"),
        (right_output_wrong_gradient, "is off by"),
        (fails, "fails on this GPU: no kernel image is available"),
    ],
)
def test_a_wrong_kernel_is_found_before_it_trains(on_a_gpu, monkeypatch, kernel, reason, recwarn):
    monkeypatch.setattr(attention, "find_varlen_attn", lambda: kernel)
    found = resolve_backend("auto", "cpu", BF16)
    assert varlen_fault(torch.device("cpu"), BF16).startswith(reason)
    if not reason:
        assert found == "varlen" and resolve_backend("varlen", "cpu", BF16) == "varlen"
        assert not recwarn.list
        return
    assert found == "flex"
    (warning,) = recwarn.list
    assert str(warning.message).startswith(f"attention by flex, because varlen {reason}")
    with pytest.raises(UserError, match=f"varlen does not work here: it {reason}"):
        resolve_backend("varlen", "cpu", BF16)


@GPU
@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_backends_of_this_gpu_pass_their_check(backend, compiler):
    assert disagreement(backend, torch.device("cuda"), BF16) < 0.015


@st.composite
def packed_rows(draw):
    length = draw(st.sampled_from([5, 128, 130, 256, 390]))
    rows = draw(st.lists(st.lists(st.integers(1, length - 1), max_size=5), min_size=1, max_size=3))
    ids = torch.zeros(len(rows), length, dtype=torch.int32)
    for row, boundaries in zip(ids, rows, strict=True):
        for boundary in set(boundaries):
            row[boundary:] += draw(st.integers(1, 3))
    prefixes = torch.zeros(ids.shape, dtype=torch.bool)
    for prefix in prefixes:
        for begin, end in draw(st.lists(st.tuples(*[st.integers(0, length)] * 2), max_size=3)):
            prefix[begin:end] = True
    return ids, prefixes


ALL_BUT_THE_FIRST = (torch.zeros(1, 128, dtype=torch.int32), (torch.arange(128) > 0)[None])


@given(packed_rows(), st.sampled_from(KINDS))
@example(ALL_BUT_THE_FIRST, "prefix")
@settings(max_examples=40, deadline=None)
def test_flex_blocks_are_those_torch_finds_by_looking_at_every_pair(rows, kind):
    ids, prefixes = rows
    prefixes = prefixes if kind == "prefix" else None
    mine = plan_attention(kind, ids, backend="flex", device="cpu", in_prefix=prefixes).blocks
    length = ids.shape[1]
    theirs = create_block_mask(
        mine.mask_mod, len(ids), None, length, length, device="cpu", BLOCK_SIZE=128
    )
    assert mine.shape == theirs.shape

    def lists(mask):
        for count, index in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
            (mask.q_num_blocks, mask.q_indices),
            (mask.full_q_num_blocks, mask.full_q_indices),
        ):
            for counted, listed in zip(count.flatten(), index.flatten(0, -2), strict=True):
                yield sorted(listed[:counted].tolist())

    assert list(lists(mine)) == list(lists(theirs))


def test_no_mask_is_built_where_the_kernel_has_its_own():
    whole = documents("one document")
    for kind in ("causal", "full"):
        assert plan_attention(kind, whole, backend="sdpa", device="cpu").mask is None
        packed = documents("some documents")
        mask = plan_attention(kind, packed, backend="sdpa", device="cpu", dtype=BF16).mask
        assert mask.shape == (3, 1, LENGTH, LENGTH) and mask.dtype == BF16


def test_varlen_hands_over_what_it_cannot_do():
    ids = documents("some documents")
    prefix = plan_attention(
        "prefix", ids, backend="varlen", device="cpu", dtype=BF16, in_prefix=PREFIXES
    )
    single = plan_attention("causal", ids, backend="varlen", device="cpu", dtype=FP32)
    half = plan_attention("causal", ids, backend="varlen", device="cpu", dtype=BF16)
    assert (prefix.backend, single.backend, half.backend) == ("sdpa", "sdpa", "varlen")


def test_wrong_arguments_are_refused():
    ids = documents("some documents")

    def plan(kind="causal", ids=ids, backend="sdpa", **rest):
        return plan_attention(kind, ids, backend=backend, device="cpu", **rest)

    for message, attempt in {
        "unknown kind": lambda: plan("sideways"),
        "unknown attention backend": lambda: plan(backend="auto"),
        "decrease": lambda: plan(ids=ids.flip(1)),
        "on the CPU": lambda: plan(ids=ids.to("meta")),
        "in_prefix belongs": lambda: plan("prefix"),
        "and to no other kind": lambda: plan("full", in_prefix=PREFIXES),
    }.items():
        with pytest.raises(ValueError, match=message):
            attempt()


def test_a_backend_that_cannot_work_here_is_refused_with_the_reason(monkeypatch):
    assert resolve_backend("auto", "cpu") == "sdpa"
    assert resolve_backend("sdpa", "cpu") == "sdpa"
    for name in ("varlen", "flex"):
        with pytest.raises(UserError, match="needs a CUDA device"):
            resolve_backend(name, "cpu")
    with pytest.raises(UserError, match="auto, sdpa, varlen or flex"):
        resolve_backend("flash", "cpu")
    monkeypatch.setattr(attention, "find_varlen_attn", object)
    with pytest.raises(UserError, match="bf16 only, not in float32"):
        resolve_backend("varlen", "cuda", FP32)
    monkeypatch.setattr(attention, "find_varlen_attn", lambda: None)
    with pytest.raises(UserError, match="torch 2.10 and newer"):
        resolve_backend("varlen", "cuda", BF16)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert resolve_backend("auto", "cuda", BF16) == "sdpa"
    with pytest.raises(UserError, match="triton"):
        resolve_backend("flex", "cuda", BF16)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    assert resolve_backend("auto", "cuda", BF16) == "flex"
