"""Recurrent layers: the hidden units of every layer and direction are axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import _VF, Tensor

from secateur.core.errors import ModelError
from secateur.structure.dims import Dim, concat, factor, size
from secateur.structure.observe import Observer
from secateur.structure.table import Call, function

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@function(_VF.lstm, _VF.gru, _VF.rnn_tanh, _VF.rnn_relu)
def recurrent(run: Observer, call: Call) -> None:
    """weight_ih [gates * hidden, in], weight_hh [gates * hidden, hidden] for every layer and direction."""
    x, hidden, weights = call.args[0], call.args[1], call.args[2]
    if not isinstance(weights, (list, tuple)) or isinstance(call.args[3], (list, tuple)):
        raise ModelError(f"packed sequences cannot be observed: {run.reason('stopped')}; give padded ones")
    has_bias, layers, _, _, bidirectional = call.args[3:8]
    states = list(hidden) if isinstance(hidden, (list, tuple)) else [hidden]
    directions = 2 if bidirectional else 1
    per = len(weights) // (layers * directions)
    *rows, inner = run.dims(x)
    for dim in rows:
        run.fix(dim, "the order of steps matters")
    for layer in range(layers):
        starts = [(layer * directions + direction) * per for direction in range(directions)]
        outs = [_cell(run, call.name, inner, rows, Weights(weights[s : s + per], has_bias)) for s in starts]
        for other in outs[1:]:
            run.same(outs[0], other)  # the module has one hidden size
        inner = concat(*outs)
        for state in states:
            run.same(run.dims(state)[-1], outs[0])
    run.statistic([run.dims(weight)[-1] for weight in weights[1::per]], [*weights, *states])
    _results(run, call, states, inner)


@dataclass(frozen=True)
class Weights:
    """The tensors of one layer in one direction: weight_ih, weight_hh, biases, projection."""

    tensors: Sequence[Tensor]
    has_bias: bool

    @property
    def biases(self) -> Sequence[Tensor]:
        """bias_ih and bias_hh."""
        return self.tensors[2:4] if self.has_bias else ()

    @property
    def projection(self) -> Tensor | None:
        """What the hidden state is multiplied with before it comes back, if anything."""
        rest = self.tensors[4 if self.has_bias else 2 :]
        return rest[0] if rest else None


def _cell(run: Observer, name: str, inner: Dim, rows: list[Dim], weights: Weights) -> Dim:
    """Unify the tensors of one cell; returns the dimension of its output."""
    input_weight, hidden_weight = weights.tensors[:2]
    gates = GATES[name]
    gate, hidden = factor(
        run.dims(input_weight)[0], input_weight.shape[0] // gates, run.reason("gates of hidden units")
    )
    run.settings([gate])
    run.same(run.dims(input_weight)[1], inner)
    for tensor in (hidden_weight, *weights.biases):
        run.same(run.dims(tensor)[0], run.dims(input_weight)[0])
    out = run.dims(hidden_weight)[1]
    if weights.projection is None:
        out = run.same(out, hidden)
    else:
        run.same(run.dims(weights.projection)[1], hidden)
        out = run.same(run.dims(weights.projection)[0], out)
    run.multiply(gates, *rows, hidden, inner)
    run.multiply(gates, *rows, hidden, out)
    run.role("hidden", hidden)
    return out


def _results(run: Observer, call: Call, states: list[Tensor], last: Dim) -> None:
    x = call.args[0]
    if call.out is None:
        call.out = (run.make([*x.shape[:-1], size(last)], x), *(run.make(state.shape, state) for state in states))
    run.set(call.out[0], [*run.dims(x)[:-1], last])
    for end, state in zip(call.out[1:], states, strict=True):
        run.set(end, run.dims(state))
