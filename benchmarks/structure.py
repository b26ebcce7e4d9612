"""Structural pruning against Torch-Pruning 1.6.1 in one process: time, what the smaller network brings, coverage.

    python benchmarks/structure.py [times] [--networks resnet50 ...] [--rounds 3]
    python benchmarks/structure.py speed [--networks resnet18 ...] [--batches 16 1] [--seconds 2]
    python benchmarks/structure.py coverage --out coverage.json [--networks NAME ...] [--table NETWORKS.py]

`times`: seconds to find out what hangs together, and for the whole job (that, scores, half the channels
removed), each on a fresh copy at 224 px, batch 1; medians, interleaved. `speed`: dense against pruned networks,
the measured speed-up as a share of the FLOPs ratio. `coverage`: 30 % of the channels by random scores, one
process for each network. The peer is told what its own example scripts tell it: the output layers, the heads of
attention, and afterwards the widths that forward passes read from attributes.

The peer is looked for in $SECATEUR_PEERS (default: `peers` in the environment's folder), torchvision and timm in
$SECATEUR_NETWORKS (default: `networks` there) when they are not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.core.budget import Budget, Quantity
from secateur.core.method import Batch, Task
from secateur.core.plan import Plan
from secateur.measure import flops as count_flops
from secateur.measure import latency, parameters
from secateur.methods.channels import channel_norm
from secateur.shrink.verify import cut_
from secateur.structure.analysis import analyse

THREADS = 2
TIMED = ("resnet50", "mobilenet_v2", "densenet121", "vit_base_patch16_224", "vit_b_16")
SPED_UP = (
    "resnet18",
    "resnet50",
    "vgg16_bn",
    "mobilenet_v2",
    "densenet121",
    "regnet_x_400mf",
    "vit_base_patch16_224",
    "convnext_tiny",
)
LIMIT = 120.0  # seconds for one network's coverage
PRUNED, NOTHING = 0.10, 0.02  # shares of the parameters: removed enough, and next to nothing
Inputs = tuple[tuple[Any, ...], dict[str, Any]]

# ---------------------------------------------------------------------------------------------- ours


OURS: dict[str, Any] = {}  # settings from the command line
KINDS = "channel,neuron,head,kv_group,embedding"
"""As the peer's script: the embedding width of a transformer goes too."""


def ours(model: nn.Module, inputs: Tensor) -> tuple[float, float]:
    """Seconds of the analysis alone, and of the whole job on another fresh copy: half the channels, by magnitude."""
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    example = Batch((inputs,))
    begun = time.perf_counter()
    analyse(first, example)
    analysed = time.perf_counter()
    halve(second, example, Budget(0.5))
    return analysed - begun, time.perf_counter() - analysed


def ours_smaller(model: nn.Module, inputs: Tensor, flops: float) -> nn.Module:
    """A copy of the model with channels removed by magnitude until one forward pass takes at most `flops`."""
    smaller = copy.deepcopy(model)
    halve(smaller, Batch((inputs,)), Budget(flops / count_flops(model, Batch((inputs,))), Quantity.FLOPS))
    return smaller


def halve(model: nn.Module, example: Batch, budget: Budget) -> None:
    """Analyse, score, select and cut, in place, without the comparison with the masked model: the peer has none."""
    settings = channel_norm.ChannelNormSettings(kinds=KINDS, **OURS)
    decision = channel_norm.plan(Task(model, budget, example=example), settings)
    cut_(model, Plan(decision.sites, decision.masks), example, verify=False, structure=decision.structure)


# ---------------------------------------------------------------------------------------------- peer


@dataclass
class Known:
    """What a user of the peer has to know about a model.

    Attributes:
        ignored: layers that make the outputs.
        heads: projection of queries, keys or values -> its number of heads.
        whole: heads are removed whole, as the peer's script for language models does: rotary positions
            fix the width of a head.
        round_to: what widths must be multiples of; for `nn.MultiheadAttention`, which takes no heads.
    """

    ignored: list[nn.Module]
    heads: dict[nn.Module, int] = field(default_factory=dict)
    whole: bool = False
    round_to: int | None = None


FUSED = ("qkv", "qkv_proj")
SEPARATE = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
)
HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads")


def peer() -> Any:
    """The module `torch_pruning`."""
    folder = Path(os.environ.get("SECATEUR_PEERS", Path(sys.prefix) / "peers"))
    if importlib.util.find_spec("torch_pruning") is None:
        sys.path.append(str(folder))
    try:
        import torch_pruning
    except ImportError as error:
        raise SystemExit(
            f"Torch-Pruning cannot be imported from {folder} ({error}): pip install --no-deps --target {folder} "
            f"torch-pruning==1.6.1, or set SECATEUR_PEERS to a folder that has it"
        ) from error
    return torch_pruning


def known(model: nn.Module, inputs: Inputs) -> Known:
    """Looks up output layers and attention; puts the model into the state the peer traces it in."""
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for config in (getattr(module, "config", None) for module in model.modules()):
        if hasattr(config, "use_cache"):
            config.use_cache = False  # a cache is an output like any other, and would freeze what makes it
    found = Known(output_layers(model, inputs))
    for module in model.modules():
        found.heads |= attention_heads(module)
        found.whole |= hasattr(module, "q_proj") and hasattr(getattr(module, "config", None), "rope_parameters")
    native = [module.num_heads for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    found.round_to = math.lcm(*native) if native else None
    return found


def tensors(outputs: Any) -> list[Tensor]:
    """Every tensor in a model's outputs."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def output_layers(model: nn.Module, inputs: Inputs) -> list[nn.Module]:
    """Layers from which autograd's graph leads to an output with no other layer in between."""
    layers = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
    makers: dict[Any, nn.Module] = {}

    def made(module: nn.Module, _: Any, outputs: Any) -> None:
        makers.update(dict.fromkeys((output.grad_fn for output in traced(outputs)), module))

    hooks = [module.register_forward_hook(made) for module in model.modules() if isinstance(module, layers)]
    stack, seen = [output.grad_fn for output in traced(model(*inputs[0], **inputs[1]))], set[Any]()
    for hook in hooks:
        hook.remove()
    found: dict[nn.Module, None] = {}
    while stack:
        node = stack.pop()
        if node in makers:
            found[makers[node]] = None
        elif node is not None and node not in seen:
            seen.add(node)
            stack += [child for child, _ in node.next_functions]
    return list(found)


def attention_heads(module: nn.Module) -> dict[nn.Module, int]:
    """The projections of an attention module, and how many heads each makes."""
    heads = attribute(module, HEADS)
    if heads is None:
        return {}
    layers = projections(module)
    shares = attribute(module, KEY_HEADS) or heads
    return {layer: heads if index == 0 else shares for index, layer in enumerate(layers)}


def projections(module: nn.Module) -> list[nn.Linear]:
    """One layer that makes queries, keys and values, or three; none where the module is no attention."""
    for names in (*((name,) for name in FUSED), *SEPARATE):
        layers = [getattr(module, name, None) for name in names]
        if all(isinstance(layer, nn.Linear) for layer in layers):
            return [layer for layer in layers if isinstance(layer, nn.Linear)]
    return []


def attribute(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first whole number among attributes of the module, then of its configuration."""
    values = (getattr(holder, name, None) for holder in (module, getattr(module, "config", None)) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def peer_prune(model: nn.Module, inputs: Inputs, knowledge: Known, ratio: float, importance: Any) -> None:
    """Removes a share of the channels in place."""
    heads = dict(knowledge.heads)
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        pruner = peer().pruner.BasePruner(
            model,
            inputs,
            importance,
            pruning_ratio=ratio,
            ignored_layers=knowledge.ignored,
            round_to=knowledge.round_to,
            num_heads=heads,
            prune_num_heads=knowledge.whole,
            prune_head_dims=not knowledge.whole,
            head_pruning_ratio=ratio if knowledge.whole else 0.0,
            in_channel_groups={},  # its defaults are shared between pruners, and written to
            out_channel_groups={},
            forward_fn=lambda model, inputs: model(*inputs[0], **inputs[1]),
            output_transform=traced,
        )
        pruner.step()
    for module in model.modules():
        correct_widths(module, pruner.num_heads)


def traced(outputs: Any) -> list[Tensor]:
    """The outputs that the peer can follow back."""
    return [output for output in tensors(outputs) if output.grad_fn is not None]


def correct_widths(module: nn.Module, heads: dict[nn.Module, int]) -> None:
    """Sets the widths that forward passes read from attributes, which the peer leaves to its user."""
    if hasattr(module, "conv_proj") and hasattr(module, "hidden_dim"):  # torchvision's vision transformer
        module.hidden_dim = module.conv_proj.out_channels
    layers = projections(module)
    if not layers or layers[0] not in heads:
        return
    width, count = layers[0].out_features // (3 if len(layers) == 1 else 1), heads[layers[0]]
    values = {
        **dict.fromkeys(HEADS, count),
        **dict.fromkeys(("head_dim", "attention_head_size", "key_value_proj_dim"), width // count),
        **dict.fromkeys(("all_head_size", "attn_dim", "inner_dim", "embed_dim"), width),
        "num_key_value_groups": count // heads[layers[-1]],
    }
    for name, value in values.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)


def peer_times(model: nn.Module, inputs: Tensor) -> tuple[float, float]:
    """Seconds to build the peer's graph, and of its whole job; what the user has to know comes for free."""
    library = peer()
    call: Inputs = ((inputs,), {})

    def build(copied: nn.Module, _: Known) -> None:
        library.DependencyGraph().build_dependency(copied, example_inputs=inputs, verbose=False)

    def whole(copied: nn.Module, knowledge: Known) -> None:
        peer_prune(copied, call, knowledge, 0.5, library.importance.MagnitudeImportance(p=2))

    found = []
    for work in (build, whole):
        copied = copy.deepcopy(model)
        knowledge = known(copied, call)
        gc.collect()
        start = time.perf_counter()
        work(copied, knowledge)
        found.append(time.perf_counter() - start)
    return found[0], found[1]


def peer_smaller(model: nn.Module, inputs: Tensor) -> nn.Module:
    """A copy of the model with half its channels."""
    copied = copy.deepcopy(model)
    call: Inputs = ((inputs,), {})
    peer_prune(copied, call, known(copied, call), 0.5, peer().importance.MagnitudeImportance(p=2))
    return copied


# ------------------------------------------------------------------------------------- times and speed


def builders() -> dict[str, Callable[[], nn.Module]]:
    """Networks with random weights by their names in torchvision, then in timm."""
    if importlib.util.find_spec("torchvision") is None:
        sys.path.append(os.environ.get("SECATEUR_NETWORKS", str(Path(sys.prefix) / "networks")))
        declare_operators()
    try:
        import timm
        import torchvision
    except ImportError as error:
        raise SystemExit(f"{error}: install torchvision and timm, or name their folder in SECATEUR_NETWORKS") from error
    models = torchvision.models
    found = {name: partial(timm.create_model, name) for name in timm.list_models()}
    return found | {name: partial(models.get_model, name, weights=None) for name in models.list_models(models)}


@cache  # the names last as long as the library object does
def declare_operators() -> torch.library.Library:
    """Names torchvision looks for at import; wheels that do not fit this torch still build every network."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def chosen(names: list[str] | None, default: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    known_names = builders()
    for name in names or default:
        if name not in known_names:
            raise SystemExit(f"neither torchvision nor timm has a network '{name}'")
        torch.manual_seed(0)
        yield name, known_names[name]().eval()


def attempt(work: Callable[[], Any]) -> Any:
    """The result, or None while our side is not there."""
    try:
        return work()
    except NotImplementedError:
        return None


def surroundings() -> str:
    """What the times depend on besides the machine: with other work on its cores, threads wait for each other."""
    return f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the start"


def times(args: argparse.Namespace) -> None:
    print(f"medians of {args.rounds}, {surroundings()}; seconds, and ours as a share of the peer's")
    print(f"{'':24s} {'graph: peer':>14s} {'ours':>8s} {'ratio':>7s} {'job: peer':>14s} {'ours':>8s} {'ratio':>7s}")
    inputs = torch.randn(1, 3, 224, 224)
    for name, model in chosen(args.networks, TIMED):
        rounds: list[list[float]] = []
        for _ in range(args.rounds):  # interleaved, so that drift hits both alike
            theirs, mine = peer_times(model, inputs), attempt(lambda model=model: ours(model, inputs))
            rounds.append([*theirs, *(mine or (math.nan, math.nan))])
        graph, job, analysis, whole = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(
            f"{name:24s} {graph:14.3f} {analysis:8.3f} {analysis / graph:7.3f} "
            f"{job:14.3f} {whole:8.3f} {whole / job:7.3f}",
            flush=True,
        )


def speed(args: argparse.Namespace) -> None:
    print(f"interleaved medians, {surroundings()}; dense, then pruned by either library")
    inputs = torch.randn(1, 3, 224, 224)
    for name, model in chosen(args.networks, SPED_UP):
        smaller = {"peer": peer_smaller(model, inputs)}
        budget = count_flops(smaller["peer"], Batch((inputs,)))
        mine = attempt(lambda model=model, budget=budget: ours_smaller(model, inputs, budget))
        smaller |= {"ours": mine} if mine is not None else {}
        for batch in args.batches:
            print(f"{name}, batch {batch}", flush=True)
            print_speed(model, smaller, torch.randn(batch, 3, 224, 224), args.seconds)


def print_speed(dense: nn.Module, smaller: dict[str, nn.Module], inputs: Tensor, seconds: float) -> None:
    """One row for each network: milliseconds, FLOPs, and the speed-up as a share of the FLOPs ratio."""
    batch, networks = Batch((inputs,)), {"dense": dense, **smaller}
    work = {name: count_flops(model, batch) for name, model in networks.items()}
    taken = latency({name: (model, batch) for name, model in networks.items()}, seconds=seconds, minimum=5)
    for name, model in networks.items():
        faster, fewer = taken["dense"].median / taken[name].median, work["dense"] / work[name]
        print(
            f"  {name:6s} {taken[name].median:9.2f} ms {work[name] / 1e9:8.2f} GFLOPs {parameters(model) / 1e6:7.2f} M"
            f"  {faster:5.2f}x faster, {fewer:5.2f}x fewer FLOPs: {faster / fewer:5.2f}",
            flush=True,
        )


# ------------------------------------------------------------------------------------------ coverage


def networks(table: Path) -> dict[str, Any]:
    """The dictionary NETWORKS in a file: name -> something with `build()` and `inputs()`."""
    if not table.is_file():
        raise SystemExit(f"there is no table of networks at {table}; name one with --table")
    sys.path.insert(0, str(table.parent))
    spec = importlib.util.spec_from_file_location(table.stem, table)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[table.stem] = module
    spec.loader.exec_module(module)
    return dict(module.NETWORKS)


def coverage(args: argparse.Namespace) -> None:
    rows: dict[str, dict[str, Any]] = {}
    for name in args.networks or networks(args.table):
        start = time.perf_counter()
        rows[name] = {**alone(name, args.table), "seconds": round(time.perf_counter() - start, 1)}
        print(f"{name:32s} {rows[name]['verdict']:8s} {rows[name]['why']}", flush=True)
        counts = Counter(row["verdict"] for row in rows.values())
        report = {"library": "torch_pruning", "counts": dict(counts), "networks": rows}
        args.out.write_text(json.dumps(report, indent=2) + "\n")  # each time, so that a stop loses nothing
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()), f"of {len(rows)}")


def alone(name: str, table: Path) -> dict[str, Any]:
    """One network's verdict from a process of its own: the peer may loop for ever, or take the process down."""
    command = [sys.executable, __file__, "one", "--networks", name, "--table", str(table)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"verdict": "refused", "stage": "prune", "why": f"no result within {LIMIT:.0f} s"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return {"verdict": "failed", "stage": "build", "why": f"exit code {done.returncode}: {last}"}


def one(args: argparse.Namespace) -> None:
    network = networks(args.table)[args.networks[0]]
    torch.manual_seed(0)
    print(json.dumps(verdict(network.build(), network.inputs())))


def verdict(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """What became of a network: handled, little, wrong (ran, but not as asked), or refused with the reason."""
    knowledge, before = known(model, inputs), parameters(model)
    with torch.no_grad():
        dense = [list(output.shape) for output in tensors(model(*inputs[0], **inputs[1]))]
    stage = "prune"
    try:
        peer_prune(model, inputs, knowledge, 0.3, peer().importance.RandomImportance())
        stage = "run"
        with torch.no_grad():
            pruned = [list(output.shape) for output in tensors(model(*inputs[0], **inputs[1]))]
    except Exception as error:  # whatever the peer raises is the finding
        first = (str(error).strip().splitlines() or [""])[0]
        return {"verdict": "refused", "stage": stage, "why": f"{type(error).__name__}: {first}"}
    removed = 1 - parameters(model) / before
    facts = {"stage": "done", "removed": round(removed, 4), "why": f"{removed:.1%} of the parameters removed"}
    if pruned != dense:
        return {**facts, "verdict": "wrong", "why": f"outputs {pruned} instead of {dense}"}
    return {**facts, "verdict": "handled" if removed >= PRUNED else "wrong" if removed < NOTHING else "little"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["times", "speed", "coverage", "one"], default="times")
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="instead of the command's own list")
    parser.add_argument("--rounds", type=int, default=3, help="times: runs of each")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 1], help="speed: batch sizes")
    parser.add_argument("--multiple", type=int, default=8, help="speed: what our widths are multiples of")
    parser.add_argument("--within-groups", action="store_true", help="speed: thin out groups of convolutions, too")
    parser.add_argument("--seconds", type=float, default=2.0, help="speed: time for each network and batch size")
    parser.add_argument("--table", type=Path, default=Path("tests/networks/networks.py"), help="coverage: NETWORKS")
    parser.add_argument("--out", type=Path, default=Path("coverage.json"), help="coverage: the JSON file to write")
    args = parser.parse_args()
    OURS.update(multiple=args.multiple, within_groups=args.within_groups)
    torch.set_num_threads(THREADS)
    {"times": times, "speed": speed, "coverage": coverage, "one": one}[args.command](args)


if __name__ == "__main__":
    main()
