"""Recurrent layers: the hidden units of every layer and direction are axes."""

from __future__ import annotations

from torch import Tensor, _VF

from secateur.structure.dims import Dim, concat, factor, size
from secateur.structure.observe import Observer
from secateur.structure.table import Call, function

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@function(_VF.lstm, _VF.gru, _VF.rnn_tanh, _VF.rnn_relu)
def recurrent(run: Observer, call: Call) -> None:
    """weight_ih [gates * hidden, in], weight_hh [gates * hidden, hidden] for every layer and direction."""
    x, hidden, weights = call.args[0], call.args[1], call.args[2]
    if not isinstance(weights, (list, tuple)) or isinstance(call.args[3], (list, tuple)):
        raise AssertionError("packed sequences")
    has_bias, layers, _, _, bidirectional, batch_first = call.args[3:9]
    states = list(hidden) if isinstance(hidden, (list, tuple)) else [hidden]
    directions = 2 if bidirectional else 1
    per = len(weights) // (int(layers) * directions)
    dims = list(run.dims(x))
    inner = dims[-1]
    for dim in dims[:-1]:
        run.fix(dim, "the order of steps matters")
    for layer in range(int(layers)):
        outs = []
        for direction in range(directions):
            start = (layer * directions + direction) * per
            outs.append(_cell(run, call.name, inner, list(weights[start : start + per]), dims, has_bias))
        for other in outs[1:]:
            run.same(outs[0], other)  # the module has one hidden size
        inner = concat(*outs)
        for state in states:
            run.same(run.dims(state)[-1], outs[0])
    run.statistic([hidden for hidden in map(_last, map(run.dims, weights[1::per])) if hidden], list(weights) + states)
    call.out = _results(run, call, x, states, inner, bool(batch_first))


def _last(dims: tuple[Dim, ...]) -> Dim:
    return dims[-1]


def _cell(run: Observer, name: str, inner: Dim, weights: list[Tensor], rows: list[Dim], has_bias: bool) -> Dim:
    input_weight, hidden_weight, *rest = weights
    gates = GATES[name]
    units = hidden_weight.shape[0] // gates
    why = run.reason("gates of hidden units")
    gate, hidden = factor(run.dims(input_weight)[0], units, why)
    run.settings([gate])
    run.same(run.dims(input_weight)[1], inner)
    run.same(run.dims(hidden_weight)[0], run.dims(input_weight)[0])
    for bias in rest[: 2 if has_bias else 0]:
        run.same(run.dims(bias)[0], run.dims(input_weight)[0])
    out = run.dims(hidden_weight)[1]
    if rest[2:] or (not has_bias and rest):  # a projection: what comes back is the projected state
        projection = rest[-1]
        run.same(run.dims(projection)[1], hidden)
        out = run.same(run.dims(projection)[0], out)
    else:
        out = run.same(out, hidden)
    run.multiply(gates, *rows[:-1], hidden, inner)
    run.multiply(gates, *rows[:-1], hidden, out)
    run.role("hidden", hidden)
    return out


def _results(run: Observer, call: Call, x: Tensor, states: list[Tensor], last: Dim, batch_first: bool) -> tuple[Tensor, ...]:
    out = call.out[0] if call.out is not None else run.make([*x.shape[:-1], size(last)], x)
    run.set(out, [*run.dims(x)[:-1], last])
    ends = []
    for i, state in enumerate(states):
        end = call.out[1 + i] if call.out is not None else run.make(state.shape, state)
        run.set(end, run.dims(state))
        ends.append(end)
    return (out, *ends)


