"""Run real code on tensors without storage, and keep the books: live bytes by kind, their peak, FLOPs.

A fake tensor has shape, dtype and strides, and no memory. Where code asks for a value (how many samples count, is every
number finite, which units go), small integer and boolean tensors are computed beside the fake ones; of what depends on
weights and activations every float is taken to be 1, so that checks pass and rankings come out in the given order.
"""

import math
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

VALUES = 2**20  # elements up to which values are computed
Kind = str  # what memory is held for: work, weights, file (views of a checkpoint file), next (layer), store, finding


class Ledger(TorchDispatchMode):
    """Inside ``with`` every operation is a fake one, and its results are booked as ``kind`` until they are freed.

    Attributes:
        live: bytes alive by kind.
        peak: most bytes alive at once, by kind at that moment; kinds in ``aside`` do not count for it.
        most: most bytes alive of each kind by itself.
        flops: floating point operations of matrix products and attention so far.
    """

    def __init__(self, aside: frozenset[Kind] = frozenset({"file"}), gpu: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.aside = aside
        self.gpu = gpu  # whose libraries factorise and sort out of place
        self.kind: Kind = "work"
        self.live: Counter[Kind] = Counter()
        self.peak: Counter[Kind] = Counter()
        self.most: Counter[Kind] = Counter()
        self.flops = 0
        self._copies = _Copies()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._kinds: dict[int, Kind] = {}
        self._sizes: dict[int, int] = {}

    @contextmanager
    def booking(self, kind: Kind) -> Iterator[None]:
        """Book what is made inside as ``kind``."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def rebook(self, tensor: Tensor, kind: Kind) -> None:
        """Book a tensor's storage as ``kind`` from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._kinds:
            size = self._sizes[key]
            self.live[self._kinds[key]] -= size
            self._kinds[key] = kind
            self.live[kind] += size
            self._look()

    def kind_of(self, tensor: Tensor) -> Kind | None:
        """What a tensor's storage is booked as; None for one that was made elsewhere."""
        return self._kinds.get(tensor.untyped_storage()._cdata)

    def start_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self.most = Counter(self.live), Counter(self.live)

    def __enter__(self) -> Any:
        self._copies.__enter__()  # type: ignore[no-untyped-call]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._copies.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        found = self._values(func, args, kwargs)
        if func is aten._pin_memory.default:
            func, args, kwargs = aten.clone.default, args[:1], {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return _likely(args[0]).item() if found is None else found
        if func is aten.index.Tensor and found is None:
            args = (args[0], _as_numbers(args[1]))
        if func in _DATA_DEPENDENT and isinstance(found, Tensor):
            with self._fake:
                result = torch.empty(found.shape, dtype=found.dtype)
        else:
            with self._fake:
                result = func(*args, **kwargs)
            count = flop_registry.get(func._overloadpacket)
            if count is not None:
                self.flops += int(count(*args, **kwargs, out_val=result))
        if found is None and func._schema.is_mutable:
            for tensor in (*args[:1], *tree_leaves(kwargs.get("out"))):
                if isinstance(tensor, FakeTensor):
                    tensor._known = None  # type: ignore[attr-defined]
        if found is None and func in _CHECKS:
            found = torch.tensor(_CHECKS[func])
        for fake, value in zip(tree_leaves(result), tree_leaves(found), strict=False):
            if isinstance(fake, Tensor) and isinstance(value, Tensor) and value.shape == fake.shape:
                fake._known = value  # type: ignore[attr-defined]
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._book(tensor)
        scratch = args[0].nbytes if self.gpu and func._overloadpacket in _OUT_OF_PLACE else 0
        self.live["work"] += scratch
        self._look()
        self.live["work"] -= scratch
        return result

    def _values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation on values, where all of them are small and some are known; None elsewhere."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        packet = func._overloadpacket
        if any(tensor.numel() > VALUES for tensor in tensors):
            return None
        if not tensors and (packet not in _FACTORIES or _elements(packet, args) > VALUES):
            return None
        if tensors and not any(_known(tensor) is not None for tensor in tensors) and packet not in _RANKINGS:
            return None
        if packet in _SOLVERS or any(_known(tensor) is None and tensor.dim() > 1 for tensor in tensors):
            return None
        values = tree_map_only(Tensor, _value, (args, kwargs))
        return func(*values[0], **values[1])

    def _book(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._kinds or storage.device.type != "meta":
            return
        self._kinds[key], self._sizes[key] = self.kind, storage.nbytes()
        self.live[self.kind] += storage.nbytes()
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live[self._kinds.pop(key)] -= self._sizes.pop(key)

    def _look(self) -> None:
        for kind in self.aside:
            self.most[kind] = max(self.most[kind], self.live[kind])
        if self.total(self.live) > self.total(self.peak):
            self.peak = Counter(self.live)

    def total(self, counter: Counter[Kind]) -> int:
        """Bytes of all kinds but those aside."""
        return sum(size for kind, size in counter.items() if kind not in self.aside)


class _Copies(TorchFunctionMode):
    """``copy.deepcopy`` of a tensor would copy a storage that is not there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


aten = torch.ops.aten
_DATA_DEPENDENT = {aten.nonzero.default, aten.index.Tensor, aten.masked_select.default, aten.equal.default}
_CHECKS = {aten.all.default: True, aten.any.default: False}
_FACTORIES = {aten.arange, aten.zeros, aten.ones, aten.full, aten.scalar_tensor}
_OUT_OF_PLACE = {aten.linalg_cholesky_ex, aten.cholesky_inverse, aten.sort, aten.argsort}
_RANKINGS = {aten.sort, aten.argsort}
_SOLVERS = {aten.linalg_cholesky_ex, aten.cholesky_inverse, aten.linalg_solve_triangular, aten.mm, aten.addmm_}


def _known(tensor: Tensor) -> Tensor | None:
    if not isinstance(tensor, FakeTensor):
        return tensor
    found: Tensor | None = getattr(tensor, "_known", None)
    return found


def _value(tensor: Tensor) -> Tensor:
    found = _known(tensor)
    return _likely(tensor) if found is None else found


def _likely(tensor: Tensor) -> Tensor:
    """1 for floats, 0 for counts (of what is wrong) and flags."""
    fill = 1 if tensor.dtype.is_floating_point else 0
    return torch.full(tensor.shape, fill, dtype=tensor.dtype)


def _as_numbers(indices: Any) -> list[Tensor | None]:
    """Masks whose values are known as the numbers of their entries."""
    numbers: list[Tensor | None] = []
    for index in indices:
        known = None if index is None else _known(index)
        mask = known is not None and known.dtype == torch.bool
        numbers += known.nonzero(as_tuple=True) if mask else [index]  # type: ignore[union-attr]
    return numbers


def _elements(packet: Any, args: Any) -> int:
    if packet is aten.arange:
        return max((int(value) for value in args if isinstance(value, int | float)), default=0)
    sizes = args[0] if args and isinstance(args[0], list | tuple) else ()
    return math.prod(sizes)
