"""``batch=`` of a step with ``micro_batches=``: every row reaches one micro-batch, or an error names what holds it."""

import dataclasses
import warnings
from collections import OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels.optim._batches.closures import split_batch

B, PIECES = 6, 3
X = torch.arange(12.0).reshape(B, 2)
Y = torch.arange(B)


@dataclasses.dataclass
class Sample:
    ids: Tensor
    length: int = 7
    mask: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.mask = self.ids > 3
        self.extra = self.ids * 2  # no field


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    ids: Tensor
    inner: Any = None


class Encoding(UserDict):  # type: ignore[type-arg]
    """As a tokenizer's: a mapping with a list of one object for each sample beside it, and a constructor of its own."""

    def __init__(self, data: Any, encodings: list[object] | None, *, tensor_type: str) -> None:
        super().__init__(data)
        self._encodings, self.tensor_type = encodings, tensor_type


@dataclasses.dataclass
class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As a transformer's: items that are attributes too."""

    logits: Tensor
    hidden: Any = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                OrderedDict.__setitem__(self, field.name, getattr(self, field.name))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)

    def __reduce__(self) -> Any:
        made, _, *rest = tuple(super().__reduce__())
        return (made, tuple(getattr(self, field.name) for field in dataclasses.fields(self)), *rest)


class ReadOnly(Mapping):  # type: ignore[type-arg]
    def __init__(self, items: Any) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Slotted:
    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Holder:
    def __init__(self, inside: Any) -> None:
        self.inside = inside


class SharedCopy(UserDict):  # type: ignore[type-arg]
    """A copy that writes into the original."""

    def __copy__(self) -> Any:
        new = SharedCopy.__new__(SharedCopy)
        new.data = self.data
        return new


class OneOf:
    def __init__(self, number: int) -> None:
        self.number = number


Pair = namedtuple("Pair", "ids labels")
sortings = torch.stack([Y, Y]).T.sort(1)

# What goes in, and how to get something of B rows, sample by sample, out of it
CASES: dict[str, tuple[Any, Any]] = {
    "tensor": (X, lambda v: v),
    "dict": ({"a": X}, lambda v: v["a"]),
    "ordered": (OrderedDict(a=X, b=Y), lambda v: v["b"]),
    "defaultdict": (defaultdict(list, a=X), lambda v: v["a"]),
    "user dict": (UserDict(a=X), lambda v: v["a"]),
    "proxy": (MappingProxyType({"a": X}), lambda v: v["a"]),
    "read-only mapping": (ReadOnly({"a": X}), lambda v: v["a"]),
    "shared copy": (SharedCopy(a=X), lambda v: v["a"]),
    "encoding": (Encoding({"ids": X}, None, tensor_type="pt"), lambda v: v["ids"]),
    "encodings": (Encoding({"ids": X}, [OneOf(i) for i in range(B)], tensor_type="pt"), lambda v: [e.number for e in v._encodings]),
    "model output": (ModelOutput(X), lambda v: v.logits),
    "model output's items": (ModelOutput(X, hidden=(X, Y)), lambda v: v["hidden"][1]),
    "dataclass": (Sample(X), lambda v: v.ids),
    "field without init": (Sample(X), lambda v: v.mask),
    "attribute that is no field": (Sample(X), lambda v: v.extra),
    "frozen": (Frozen(X, Frozen(Y, {"a": [X, Y]})), lambda v: v.inner.inner["a"][1]),
    "namespace": (SimpleNamespace(a=X, b=3), lambda v: v.a),
    "named tuple": (Pair(X, Y), lambda v: v.labels),
    "structseq": (sortings, lambda v: v.values),
    "list of tensors": ([X, Y], lambda v: v[1]),
    "list of one tensor for each sample": ([X] * B, lambda v: v[B - 1]),
    "tuple in list in tuple": ((([X, (Y,)]),), lambda v: v[0][1][0]),
    "user list": (UserList([X, Y]), lambda v: v[0]),
    "array": (np.arange(B), lambda v: v),
    "array in mapping": (UserDict(a=np.arange(2 * B).reshape(B, 2)), lambda v: v["a"]),
    "strings": ([f"s{i}" for i in range(B)], lambda v: v),
    "tuple of strings": (tuple(f"s{i}" for i in range(B)), lambda v: v),
    "numbers": ([0.5 * i for i in range(B)], lambda v: v),
    "numbers of any kind": ([Fraction(i, 2) for i in range(B)], lambda v: v),
    "ragged lists": ([[i] * i for i in range(B)], lambda v: v),
    "lists in a mapping": ({"texts": [{"text": str(i)} for i in range(B)]}, lambda v: v["texts"]),
    "objects": ([OneOf(i) for i in range(B)], lambda v: [each.number for each in v]),
    "range": (range(B), lambda v: v),
    "deque": (deque(range(B)), lambda v: v),
}


@pytest.mark.parametrize("case", CASES)
def test_every_row_reaches_its_micro_batch(case: str) -> None:
    value, get = CASES[case]
    before = [plain(row) for row in get(value)]
    pieces = split_batch((X, value), PIECES)
    rows = [[plain(row) for row in get(piece[1])] for piece in pieces]
    assert [len(each) for each in rows] == [B // PIECES] * PIECES
    assert sum(rows, []) == before  # noqa: RUF017 - short
    assert [plain(row) for row in get(value)] == before  # the batch itself is not changed
    assert all(type(piece[1]) is type(value) for piece in pieces)
    assert split_batch((X, value), 1)[0][1] is value


def plain(row: Any) -> Any:
    return row.tolist() if isinstance(row, Tensor | np.ndarray) else row


def test_items_and_attributes_agree() -> None:
    for piece in split_batch((ModelOutput(X, hidden=(X, Y)),), PIECES):
        assert piece[0].logits is piece[0]["logits"]
        assert piece[0].hidden[1] is piece[0]["hidden"][1]
    encoding = split_batch((Encoding({"ids": X}, None, tensor_type="pt"),), PIECES)[0][0]
    assert (encoding.tensor_type, encoding._encodings) == ("pt", None)


def test_tensors_and_arrays_are_views() -> None:
    array = np.zeros((B, 2))
    for tensor, cut in split_batch((X, UserDict(a=array)), PIECES):
        assert tensor.untyped_storage().data_ptr() == X.untyped_storage().data_ptr()
        assert np.shares_memory(cut["a"], array)


SHARED = {
    "a number": 3.5,
    "a numpy number": np.float32(2.0),
    "a string": "mean",
    "None": None,
    "a size": (224, 224),
    "a torch size": torch.Size([B, 3]),
    "a dtype": torch.float32,
    "dtypes": [torch.float32, torch.float64],
    "a module": nn.Linear(B, B),
    "modules": [nn.Linear(2, 2), nn.Linear(2, 2)],
    "a function": plain,
    "a partial with a tensor": partial(torch.add, X),
    "a scaler": torch.amp.GradScaler("cpu"),
    "an object without tensors": OneOf(3),
    "an empty list": [],
    "settings in a mapping": {"reduction": "mean", "size": (3, 3)},
}


@pytest.mark.parametrize("what", SHARED)
def test_every_micro_batch_gets_it_as_it_is(what: str) -> None:
    value = SHARED[what]
    assert all(piece[1] is value for piece in split_batch((X, value), PIECES))


class DTensor(Tensor):
    """By its name alone: making one takes a process group."""


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # beta state, prototype stage
    compressed, nested = X.to_sparse_csr(), torch.nested.nested_tensor([X[0], X[1]])
    jagged = torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged)
packed = nn.utils.rnn.pack_padded_sequence(torch.ones(B, 4, 1), torch.full((B,), 4), batch_first=True)
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "other rows in a mapping": (UserDict(a=X[:5]), ValueError, r"batch\[1\]\['a'\] has 5 rows, batch\[0\] has 6"),
    "other rows in a dataclass": (Frozen(X[:4]), ValueError, r"batch\[1\]\.ids has 4 rows, batch\[0\] has 6"),
    "other rows in an array": (np.zeros(5), ValueError, r"batch\[1\] has 5 rows"),
    "an array without rows": (np.zeros(()), ValueError, r"batch\[1\] has no dimension to cut"),
    "a list of another length": ({"s": ["a", "b"]}, ValueError, r"batch\[1\]\['s'\] is a list of 2 entries.*batch\[0\] has 6 rows.*tuple"),
    "a list of more": (list(range(B + 1)), ValueError, r"batch\[1\] is a list of 7 entries"),
    "a tuple of numbers that could be either": (tuple(range(B)), ValueError, r"batch\[1\] is a tuple of 6 entries.*pass a list"),
    "an object": (Holder(X), TypeError, r"batch\[1\] is a Holder, which holds tensors and cannot be cut.*dataclass.*list of closures"),
    "an object with slots": ({"a": Slotted(X)}, TypeError, r"batch\[1\]\['a'\] is a Slotted"),
    "an object that hides it": (Holder([{"a": Holder(np.zeros(B))}]), TypeError, r"batch\[1\] is a Holder"),
    "a list of objects": ([Holder(X)] * B, TypeError, r"batch\[1\]\[0\] is a Holder"),
    "a distribution": (torch.distributions.Normal(torch.zeros(B), 1.0), TypeError, r"batch\[1\] is a Normal"),
    "a set of tensors": ({X}, TypeError, r"batch\[1\] is a set"),
    "a packed sequence": (packed, TypeError, r"batch\[1\] is a PackedSequence.*padded tensor and the lengths"),
    "a sparse tensor": (X.to_sparse(), TypeError, r"batch\[1\] is a torch.sparse_coo tensor.*dense"),
    "a compressed tensor": (compressed, TypeError, r"batch\[1\] is a torch.sparse_csr tensor"),
    "a nested tensor": (nested, TypeError, r"batch\[1\] is a nested tensor"),
    "a jagged tensor": (jagged, TypeError, r"batch\[1\] is a nested tensor"),
    "a distributed tensor": (X.as_subclass(DTensor), TypeError, r"batch\[1\] is a DTensor"),
    "an iterator": (iter([X]), TypeError, r"batch\[1\] is an iterator \(list_iterator\)"),
    "a generator": ((x for x in X), TypeError, r"batch\[1\] is an iterator \(generator\)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str) -> None:
    value, error, words = REFUSED[what]
    with pytest.raises(error, match=words):
        split_batch((X, value), PIECES)


def test_without_cutting_anything_goes() -> None:
    for what in ("an object", "a packed sequence", "a list of another length"):
        value = REFUSED[what][0]
        assert split_batch((X, value), 1)[0][1] is value


def test_a_mapping_that_cannot_be_made_again() -> None:
    class Unmakeable(ReadOnly):
        def __init__(self, items: Any, needed: int) -> None:
            super().__init__(items)

    with pytest.raises(TypeError, match=r"batch\[0\] is a Unmakeable, which cannot be made again with other entries.*plain dict"):
        split_batch((Unmakeable({"a": X}, 1),), PIECES)


def test_a_step_is_that_of_the_list_of_closures() -> None:
    torch.manual_seed(0)
    models = [nn.Linear(2, 1).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.1) for model in models)
    inputs, labels, scales = torch.randn(B, 2).double(), torch.randn(B, 1).double(), [0.5 * i for i in range(B)]

    def closure(optimizer: Any, model: nn.Module, encoding: Any, labels: Tensor, scales: list[float]) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = ((model(encoding["x"]) - labels).square().squeeze(1) * torch.tensor(scales).double()).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    batch = (Encoding({"x": inputs}, None, tensor_type="pt"), labels, scales)
    first.step(partial(closure, first, models[0]), batch=batch, micro_batches=3)
    parts = [slice(2 * j, 2 * j + 2) for j in range(3)]
    second.step([partial(closure, second, models[1], {"x": inputs[part]}, labels[part], scales[part]) for part in parts])
    assert torch.equal(models[0].weight, models[1].weight)
