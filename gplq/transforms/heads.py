"""R2 and R3: another basis for the queries and keys, and for the values, of each head of an attention.

    scores   (q Q) (k Q)^T = q k^T           rows of q and k times Q (their biases, too)
    output   (p v Q) (Q^T W^T) = p v W^T     rows of v times Q, the same columns of the projection times Q

Which rows of which linear make which head is found by experiment, so that no family of models needs code of its own:
each linear returns, instead of numbers, the index of its row, and whatever arrives at a product of the attention says
where it comes from. A norm, a rotary embedding or anything else in between garbles the indices, and is noticed by that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gplq.survey import ATTENTION, MATMULS, bind_linear, hooked, operands

# Indices have been through a few multiplications in FP64, or are garbled altogether.
_EXACT = 1e-3
_NOT_PLAIN = "more than a division into heads stands between linear and product (a norm, rotary positions, ...)"


@dataclass(frozen=True)
class Rows:
    """Which rows (or columns) of a linear belong to which channel of which head.

    Attributes:
        linear: its name.
        indices: int64 [heads, head_dim].
        bias: names of the parameters or buffers that its bias is put together from.
    """

    linear: str
    indices: Tensor
    bias: tuple[str, ...] = ()


@dataclass
class Heads:
    """What can be rotated in one module that computes an attention.

    Attributes:
        scores: queries and keys that are multiplied.
        values: values, and the columns of the linear that reads them once they are weighted.
        reasons: why something cannot, by ``queries and keys`` or ``values``.
    """

    scores: list[tuple[Rows, Rows]] = field(default_factory=list)
    values: list[tuple[Rows, Rows]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass
class _Product:
    """One call: the indices that arrived, as tensors with size 1 where they do not vary, or None if they are none."""

    module: str
    kind: str
    operands: list[Tensor | None]
    output: tuple[int, int] = (0, 0)  # first index and number of the indices that stood for its output


def find_heads(model: nn.Module, images: Tensor) -> dict[str, Heads]:
    """The attentions of ``model`` (FP64, evaluation mode) by the module that computes their products.

    Its activations are replaced; whatever the model caches of them is nonsense afterwards: give a copy.
    """
    total = sum(m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    watches = [_Indices(model, offset) for offset in (1, 1 + 64 * total)]
    for watch in watches:
        with torch.no_grad(), watch.watching():
            model(images)
    return _Matcher(*watches).heads()


class _Indices(TorchFunctionMode):
    """Runs a model with indices, from ``offset`` on, in place of what linears and attentions return."""

    def __init__(self, model: nn.Module, offset: int) -> None:
        super().__init__()
        self.model, self.offset = model, offset
        self.names = {id(module): name for name, module in model.named_modules()}
        self.owners = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear)}
        self.tensors = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self.ranges: dict[str, tuple[int, int]] = {}  # of a linear's rows: first index and how many
        self.biases: dict[str, tuple[str, ...] | None] = {}
        self.inputs: list[tuple[str, Tensor | None]] = []
        self.products: list[_Product] = []
        self.joined: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self.next = 0
        self.stack: list[nn.Module] = [model]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Install the mode and a hook on every module."""
        with hooked(self.model, self._enter, self._leave), self:
            yield

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.stack.append(module)

    def _leave(self, *_: Any) -> None:
        self.stack.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note products and linears, and put indices in place of what they return."""
        kwargs = kwargs or {}
        y = func(*args, **kwargs)
        if func is F.linear and id(bind_linear(*args, **kwargs)[1]) in self.owners:
            return self._linear(*bind_linear(*args, **kwargs), y)
        if func is ATTENTION:
            values = args[2] if len(args) > 2 else kwargs["value"]
            return self._attention(*operands(func, args, kwargs), values, y)
        if func in MATMULS:
            return self._matmul(*operands(func, args, kwargs), y)
        if func is torch.cat and args and all(id(part) in self.tensors for part in args[0]):
            self.joined[id(y)] = (y, list(args[0]))  # the tensor is kept so that its id is not used again
        return y

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
        linear = self.owners[id(weight)]
        name = self.names[id(linear)]
        self.inputs.append((name, _reduced(x, divided=False)))
        parts = [] if bias is None else self.joined.get(id(bias), (bias, [bias]))[1]
        known = all(id(part) in self.tensors for part in parts)
        self.biases[name] = tuple(self.tensors[id(part)] for part in parts) if known else None
        if name not in self.ranges:
            self.ranges[name] = self._take(len(weight))
        first, count = self.ranges[name]
        return self._numbers(first, count, y).expand_as(y).clone()

    def _take(self, count: int) -> tuple[int, int]:
        self.next += count
        return self.next - count, count

    def _numbers(self, first: int, count: int, like: Tensor) -> Tensor:
        return torch.arange(first, first + count, dtype=like.dtype, device=like.device) + self.offset

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, y: Tensor) -> Tensor:
        name = self.names[id(self.stack[-1])]
        self.products.append(_Product(name, "scores", [_reduced(query), _reduced(key)]))
        return self._weighted(name, _reduced(value), y)

    def _matmul(self, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
        name = self.names[id(self.stack[-1])]
        if a.ndim != b.ndim or a.ndim < 3:
            return y
        rows, columns, value = _reduced(a), _reduced(b.transpose(-2, -1)), _reduced(b)
        # Where nothing can be recognised, every other product is one of weights and values.
        count = sum(product.module == name for product in self.products)
        if (rows is not None and columns is not None) or (value is None and count % 2 == 0):
            self.products.append(_Product(name, "scores", [rows, columns]))
            return y
        return self._weighted(name, value, y)

    def _weighted(self, name: str, value: Tensor | None, y: Tensor) -> Tensor:
        """Values arrived at a product; its output is numbered as they are."""
        product = _Product(name, "values", [value])
        self.products.append(product)
        if value is None:
            return y
        product.output = self._take(value.numel())
        return self._numbers(*product.output, y).reshape(value.shape).expand_as(y).clone()


def _reduced(x: Tensor, divided: bool = True) -> Tensor | None:
    """The values [B, ..., tokens, channels] with size 1 for each axis along which they are constant.

    None unless that holds for images and tokens (all axes but the last, if not ``divided``) and the rest are distinct.
    """
    for axis in range(x.ndim - 1):
        first = x.narrow(axis, 0, 1)
        x = first if bool((x == first).all()) else x
    constant = x.shape[:1] + x.shape[-2:-1] if divided else x.shape[:-1]
    indices = set(constant) == {1} and x.numel() > 1 and len(x.unique()) == x.numel()
    return x.clone() if indices else None


class _Matcher:
    """Compares two passes whose indices begin at different offsets, and finds linears by them.

    q / sqrt(head_dim) is as good as q: the factor is that between the difference of the passes and of their offsets.
    """

    def __init__(self, first: _Indices, second: _Indices) -> None:
        self.first, self.second = first, second

    def heads(self) -> dict[str, Heads]:
        """What can be rotated, by module."""
        found: dict[str, Heads] = {}
        for one, two in zip(self.first.products, self.second.products, strict=True):
            heads = found.setdefault(one.module, Heads())
            rows = [self._rows(a, b) for a, b in zip(one.operands, two.operands, strict=True)]
            if one.kind == "scores":
                query, key = rows
                if query is None or key is None or query.indices.shape != key.indices.shape:
                    heads.reasons["queries and keys"] = _NOT_PLAIN
                else:
                    heads.scores.append((query, key))
            elif rows[0] is None:
                heads.reasons["values"] = _NOT_PLAIN
            else:
                columns = self._columns(one.output, rows[0])
                if columns is None:
                    heads.reasons["values"] = "no linear reads the weighted values as they are"
                else:
                    heads.values.append((rows[0], columns))
        return found

    def _rows(self, one: Tensor | None, two: Tensor | None) -> Rows | None:
        indices = self._indices(one, two)
        if one is None or indices is None:
            return None
        for name, (start, count) in self.first.ranges.items():
            bias = self.first.biases[name]
            if start <= int(indices.min()) and int(indices.max()) < start + count and bias is not None:
                return Rows(name, (indices - start).reshape(-1, one.shape[-1]), bias)  # [heads, head_dim]
        return None

    def _columns(self, output: tuple[int, int], rows: Rows) -> Rows | None:
        start, count = output
        found: dict[str, Tensor] = {}
        for (name, one), (_, two) in zip(self.first.inputs, self.second.inputs, strict=True):
            indices = self._indices(one, two)
            if indices is not None and len(indices) == count and start <= int(indices.min()) < start + count:
                found[name] = indices - start
        if len(found) != 1:
            return None
        ((name, order),) = found.items()
        return Rows(name, order.argsort().reshape(rows.indices.shape))

    def _indices(self, one: Tensor | None, two: Tensor | None) -> Tensor | None:
        """The distinct indices, flat, that both passes agree on."""
        if one is None or two is None or one.shape != two.shape:
            return None
        factors = (two - one).flatten() / (self.second.offset - self.first.offset)
        if not bool((factors != 0).all()) or not torch.allclose(factors, factors[:1]):
            return None
        exact = one.flatten() / factors - self.first.offset
        indices = exact.round()
        plain = float((exact - indices).abs().max()) < _EXACT
        return indices.long() if plain else None


@torch.no_grad()
def rotate_scores(model: nn.Module, query: Rows, key: Rows, rotations: Tensor) -> None:
    """R2, in place, with Q [heads, head_dim, head_dim]."""
    _rotate_rows(model, query, rotations)
    _rotate_rows(model, key, rotations)


@torch.no_grad()
def rotate_values(model: nn.Module, value: Rows, columns: Rows, rotations: Tensor) -> None:
    """R3, in place, with Q [heads, head_dim, head_dim]."""
    _rotate_rows(model, value, rotations)
    weight: Any = model.get_submodule(columns.linear).weight
    _rotate(weight.T, columns.indices, rotations)


def _rotate_rows(model: nn.Module, rows: Rows, rotations: Tensor) -> None:
    weight: Any = model.get_submodule(rows.linear).weight
    _rotate(weight, rows.indices, rotations)
    parameters = dict(model.named_parameters())
    if rows.bias:
        parts = [parameters[name] if name in parameters else model.get_buffer(name) for name in rows.bias]
        whole = torch.cat(parts)[:, None]
        _rotate(whole, rows.indices, rotations)
        for name, part, new in zip(rows.bias, parts, whole[:, 0].split([len(part) for part in parts]), strict=True):
            if name in parameters:  # EVA's zeros in place of a key's bias are a buffer that no checkpoint has
                part.copy_(new)


def _rotate(matrix: Tensor, indices: Tensor, rotations: Tensor) -> None:
    """Rows of ``matrix`` [N, K], taken by head as [heads, head_dim, K], times Q^T from the left; in place."""
    flat = indices.flatten().to(matrix.device)
    picked = matrix[flat].reshape(*indices.shape, matrix.shape[1])
    matrix[flat] = torch.einsum("hdk,hde->hek", picked, rotations.to(matrix)).flatten(0, 1)
